"""What only a GPU can show; the default run checks the same under emulations. On a machine with one: pytest -m cuda."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tgate_fx
from benchmarks.cuda_graphs import recordings
from tests import tiny, zoo
from tests.test_compile import relative_error
from tests.test_upstream import LOADERS, STEPS
from tgate_fx.inputs import map_tensors

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
    # By torch itself, of float32 on a GPU that has faster kinds, of Lumina's complex rotary embeddings, of how
    # `test_nothing_waits_for_the_gpu` looks, and of AOTInductor's structures.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*prototype feature:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning"),
]

GATE = 2
ENTRIES = {entry.pipeline: entry for entry in zoo.entries()}
# One of each guidance form that goes on with one branch, and a companion.
FORMS = (
    "KolorsPipeline",
    "LuminaPipeline",
    "WanPipeline",
    "SanaSprintPipeline",
    "StableDiffusionControlNetPipeline",
)
RULES: tuple[dict[str, Any], ...] = (
    {"after_gate": "both"},
    {"after_gate": "guided", "forecast": 2},
    {"after_gate": "guided", "full_steps": (3,)},
)


@pytest.fixture(autouse=True)
def _in_float32() -> Iterator[None]:
    """No TensorFloat-32, so that tolerances are those of the CPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(pipe: Any) -> Any:
    pipe.to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(family: str, steps: int) -> dict[str, Any]:
    """As a text encoder on the GPU would give them."""
    return map_tensors(lambda tensor: tensor.cuda(), {**tiny.inputs(family), "num_inference_steps": steps})


def generate(pipe: Any, entry: zoo.Entry, **changes: Any) -> torch.Tensor:
    inputs = map_tensors(lambda tensor: tensor.cuda(), {**entry.inputs(), **changes})
    result: torch.Tensor = getattr(pipe(**inputs), entry.output)
    assert torch.isfinite(result).all()
    return result


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha"])
def test_eager_results_equal_upstreams(family: str) -> None:
    inputs = inputs_of(family, STEPS)
    off = {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}
    loaded = LOADERS[family](on_gpu(tiny.make(family)))
    generator = torch.Generator().manual_seed(7)
    expected = loaded.tgate(**inputs, generator=generator, output_type="latent", return_dict=False, gate_step=3, **off)[
        0
    ]
    assert torch.equal(tiny.latents(tgate_fx.gate(on_gpu(tiny.make(family)), 3), **inputs), expected)


@pytest.mark.parametrize("name", FORMS)
def test_replays_give_the_eager_result(name: str) -> None:
    """Over generations and gates nothing is compiled, recorded or copied again, and no CUDA graph was skipped."""
    entry = ENTRIES[name]
    eager = tgate_fx.gate(on_gpu(entry.make()), GATE)
    pipe = tgate_fx.compile(on_gpu(entry.make()), GATE, mode="reduce-overhead")
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    for _ in range(3):  # compiles, records, replays
        generate(pipe, entry)
    graphs, recorded = tgate_fx.report(pipe).compiled_graphs, recordings()
    for changes in ({}, {"gate_step": 1}, {"gate_step": 3}):
        assert relative_error(generate(pipe, entry, **changes), generate(eager, entry, **changes)) < 1e-3
    assert graphs == tgate_fx.report(pipe).compiled_graphs == entry.graphs
    assert recordings() - recorded - 1 == 0  # asking takes a number too
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skipped


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_under_replay(rule: dict[str, Any]) -> None:
    entry = ENTRIES["KolorsPipeline"]
    eager = tgate_fx.gate(on_gpu(entry.make()), GATE, **rule)
    pipe = tgate_fx.compile(on_gpu(entry.make()), GATE, mode="reduce-overhead", **rule)
    for _ in range(3):
        assert relative_error(generate(pipe, entry), generate(eager, entry)) < 1e-3


def test_the_gate_opens_by_itself_a_step_later_than_on_a_cpu() -> None:
    entry = ENTRIES["KolorsPipeline"]
    pipe = tgate_fx.gate(on_gpu(entry.make()), tgate_fx.AutoGate(similarity=-1.0))
    generate(pipe, entry)
    assert tgate_fx.report(pipe).gate == 2


def test_nothing_waits_for_the_gpu_between_two_steps() -> None:
    pipe = tgate_fx.gate(on_gpu(tiny.make("sd")), GATE)
    denoiser, waits = pipe.unet, []
    inputs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    tiny.latents(pipe, **inputs)

    def begin(module: Any, args: Any, kwargs: Any) -> None:
        if waits:  # the first step looks whether both branches arrive as is assumed
            torch.cuda.set_sync_debug_mode("error")

    def end(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(0)

    handles = [
        denoiser.register_forward_pre_hook(begin, with_kwargs=True),
        denoiser.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        tiny.latents(pipe, **inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()
    assert len(waits) == 5


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "blocks": lambda pipe: by_groups(on_gpu(pipe), "block_level", num_blocks_per_group=1),
    "blocks, with a stream": lambda pipe: by_groups(
        on_gpu(pipe), "block_level", num_blocks_per_group=1, use_stream=True
    ),
    "leaves": lambda pipe: by_groups(on_gpu(pipe), "leaf_level"),
    "casting": lambda pipe: on_gpu(pipe).transformer.enable_layerwise_casting(torch.bfloat16, torch.float32),
}


def by_groups(pipe: Any, level: str, **settings: Any) -> None:
    pipe.transformer.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type=level, **settings)


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("before", [True, False])
def test_weights_that_rest_on_the_cpu(how: str, before: bool) -> None:
    inputs = inputs_of("pixart-alpha", 4)
    held = tiny.make("pixart-alpha")
    if how == "casting":
        OFFLOADS[how](held)
    expected = tiny.latents(tgate_fx.gate(on_gpu(held), GATE), **inputs)
    pipe = tiny.make("pixart-alpha")
    if before:
        OFFLOADS[how](pipe)
    tgate_fx.gate(pipe, GATE)
    if not before:
        OFFLOADS[how](pipe)
    for _ in range(2):
        assert relative_error(tiny.latents(pipe, **inputs), expected) < 1e-5


def test_blocks_are_compiled_beneath_group_offloading() -> None:
    inputs = inputs_of("pixart-alpha", 4)
    expected = tiny.latents(tgate_fx.gate(on_gpu(tiny.make("pixart-alpha")), GATE), **inputs)
    pipe = tgate_fx.compile(tiny.make("pixart-alpha"), GATE, regional=True)
    OFFLOADS["blocks"](pipe)
    for _ in range(2):
        assert relative_error(tiny.latents(pipe, **inputs), expected) < 1e-3
    assert tgate_fx.report(pipe).compiled_graphs == 2


@pytest.mark.parametrize(("settings", "graphs"), [({}, 0), ({"mode": "reduce-overhead"}, 2)])
def test_an_artifact(settings: dict[str, Any], graphs: int, tmp_path: Path) -> None:
    """Packages, and torch's caches where phases are CUDA graphs."""
    inputs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    expected = tiny.latents(tgate_fx.gate(on_gpu(tiny.make("sd-small")), GATE), **inputs)
    pipe = tgate_fx.compile(on_gpu(tiny.make("sd-small")), GATE, **settings)
    tgate_fx.save(pipe, tmp_path / "artifact", height=inputs["height"], width=inputs["width"])
    loaded = tgate_fx.load(on_gpu(tiny.make("sd-small")), tmp_path / "artifact")
    for _ in range(2):
        assert relative_error(tiny.latents(loaded, gate_step=GATE, **inputs), expected) < 1e-3
    assert tgate_fx.report(loaded).compiled_graphs == graphs


def test_restore_frees_the_memory_of_caches() -> None:
    inputs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    pipe = on_gpu(tiny.make("sd-small"))
    tiny.latents(pipe, **inputs)
    gc.collect()
    before = torch.cuda.memory_allocated()
    tiny.latents(tgate_fx.gate(pipe, GATE), **inputs)
    gc.collect()
    assert torch.cuda.memory_allocated() > before
    tgate_fx.restore(pipe)
    gc.collect()
    assert torch.cuda.memory_allocated() == before
