"""Pipelines under what CUDA-graph replay does to a graph's inputs and outputs, emulated on the CPU."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import pytest
import torch
from click.testing import CliRunner

import tgate_fx
from benchmarks import cuda_graphs
from tests import tiny
from tests.replay import ReplayBackend, ReplayError, copies_of
from tests.test_refusals import says
from tests.zoo import entry_of
from tgate_fx import cache
from tgate_fx.bench.prepare import keep_outputs
from tgate_fx.compiled import settings, whole

_FIRST = ("sd-small", "pixart-alpha")
_DEEPCACHE = tgate_fx.DeepCache(interval=2, branch=0)
_INTERVALS = {"sp_interval": 2, "fi_interval": 2}
EVERY = [
    *[
        pytest.param(family, {}, marks=pytest.mark.slow if family not in _FIRST else ())
        for family in ("sd-small", "sd-lcm", "sdxl-small", "pixart-alpha", "svd")
    ],
    pytest.param("sdxl-small", {"after_gate": "both"}, marks=pytest.mark.slow),
    *[
        pytest.param(*setting, marks=pytest.mark.slow)
        for setting in (
            ("sd-small", _INTERVALS),
            ("sd-small", {"deepcache": _DEEPCACHE}),
            ("sd-small", {"deepcache": tgate_fx.DeepCache(interval=2, branch=0, order=1)}),
            ("sdxl-small", {"after_gate": "positive"}),
            ("sd-small", {"after_gate": "guided", "cache_weight": 1.0, "forecast": 2, "full_steps": (4,)}),
        )
    ],
]


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch) -> ReplayBackend:
    """A backend under which the CPU passes for a device with CUDA graphs."""
    monkeypatch.setattr(settings, "_has_cuda_graphs", lambda device: True)
    return ReplayBackend()


def compiled(family: str, backend: ReplayBackend, **settings: Any) -> Any:
    return tgate_fx.compile(tiny.make(family), **{"gate_step": 3, **settings}, backend=backend, mode="reduce-overhead")


@pytest.mark.parametrize(("family", "settings"), EVERY)
def test_every_pipeline_gives_the_eager_result_under_replay(
    family: str, settings: dict[str, Any], replay: ReplayBackend
) -> None:
    pipe = compiled(family, replay, **settings)
    eager = tgate_fx.gate(tiny.make(family), **{"gate_step": 3, **settings})
    for round_, steps in enumerate((7, 9, 7)):
        kwargs = {**tiny.inputs(family), "num_inference_steps": steps, "seed": round_}
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert replay.replays > 6
    if not settings:
        assert len(replay.graphs) == 2
    assert copies_of(replay, "cache") == 0
    assert copies_of(replay, "weight") == 0
    assert copies_of(replay, "timestep") > 0


def test_each_step_is_marked(replay: ReplayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that torch knows that the outputs of the step before are not read any more."""
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(0))
    pipe = compiled("sd-small", replay)
    for _ in range(2):  # the first one compiles
        marks.clear()
        tiny.latents(pipe, **tiny.inputs("sd-small"), num_inference_steps=5)
    assert len(marks) == 5


@pytest.mark.slow
def test_two_shapes_taking_turns_keep_their_addresses(replay: ReplayBackend) -> None:
    pipe = compiled("sd-small", replay)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    for round_ in range(6):
        shape = {"height": 16 if round_ % 2 else 24, "width": 16}
        kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6, "seed": round_, **shape}
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(replay.graphs) == 4
    assert copies_of(replay, "cache") == 0


def test_the_emulation_catches_a_cache_that_is_a_graphs_output(
    replay: ReplayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the static cache is for: without it, what was captured is overwritten at the next replay."""
    monkeypatch.setattr(cache.StaticCache, "keep", lambda self, kind, captured, slot: tuple(captured))
    pipe = compiled("sd-small", replay)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}
    assert torch.isnan(pipe(**kwargs).images).any()


def test_schedulers_that_keep_outputs_get_copies(replay: ReplayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNDM keeps the outputs of several steps, which are a graph's: without the copies they are lost."""
    pipe, eager = compiled("sd-small", replay), tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    for each in (pipe, eager):
        each.scheduler = tiny.scheduler("PNDM")
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6, "guidance_scale": 1.0}
    expected = tiny.latents(eager, **kwargs)
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    monkeypatch.setattr(whole, "map_tensors", lambda _, output: output)
    generator = torch.Generator().manual_seed(7)
    assert not torch.equal(pipe(**kwargs, generator=generator, output_type="latent").images, expected)


def test_the_emulation_catches_static_inputs_that_move() -> None:
    backend = ReplayBackend()
    twice = torch.compile(lambda value: value * 2, backend=backend, fullgraph=True)
    first, second = torch.zeros(2), torch.zeros(2)
    for value in (first, second):
        torch._dynamo.mark_static_address(value)
    twice(first)
    twice(first)
    with pytest.raises(ReplayError, match="has moved"):
        twice(second)


def test_the_emulation_catches_graphs_that_write_to_their_inputs() -> None:
    def bump(value: torch.Tensor) -> torch.Tensor:
        return value.add_(1)

    with pytest.raises(ReplayError, match="writes to its inputs"):
        torch.compile(bump, backend=ReplayBackend(), fullgraph=True)(torch.zeros(2))


def test_the_emulation_counts_caches_that_are_copied(replay: ReplayBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What marking them as static is for."""
    monkeypatch.setattr(settings.CompileSettings, "needs_static_addresses", lambda self, device: False)
    pipe = compiled("sd-small", replay)
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=8)
    assert copies_of(replay, "cache") > 0


def test_warmup_records(replay: ReplayBackend) -> None:
    """A graph is recorded when it runs again: with the first request there is nothing left but to replay."""
    pipe = compiled("sd-small", replay)
    tgate_fx.warmup(pipe, height=16, width=16)
    assert [graph.outputs == [] for graph in replay.graphs] == [False, False]


def test_regions_under_replay_are_refused(replay: ReplayBackend) -> None:
    pipe = compiled("sd-small", replay, regional=True)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("regional=True", "CUDA graphs", "Leave regional out")):
        tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=4)
    tgate_fx.restore(pipe)
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=4)


def test_weights_that_move_are_refused_under_replay(replay: ReplayBackend) -> None:
    """torch would record each phase in every generation again."""
    pipe = compiled("sd-small", replay)
    call = {**tiny.inputs("sd-small"), "num_inference_steps": 5}
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    message = says("mode=reduce-overhead", "accelerate", "enable_model_cpu_offload", "max-autotune-no-cudagraphs")
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        tiny.latents(pipe, **call)
    accelerate.hooks.remove_hook_from_module(pipe.unet)
    expected = tiny.latents(tgate_fx.gate(tiny.make("sd-small"), 3), **call)
    assert torch.equal(tiny.latents(pipe, **call), expected)


def test_pipelines_in_two_threads_take_turns_where_replays_share_memory(
    replay: ReplayBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipes = [compiled("sd-small", replay) for _ in range(2)]
    calls = [{**tiny.inputs("sd-small"), "num_inference_steps": 8, "seed": seed} for seed in range(2)]
    for pipe in pipes:
        for _ in range(2):  # compiles, and records
            tiny.latents(pipe, **calls[0])
    eager = tgate_fx.gate(tiny.make("sd-small"), 3)
    expected = [tiny.latents(eager, **call) for call in calls]
    copy = whole.map_tensors

    def later(*args: Any) -> Any:
        time.sleep(0.005)  # in which the other thread would replay
        return copy(*args)

    monkeypatch.setattr(whole, "map_tensors", later)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            results = list(pool.map(lambda pipe, call: tiny.latents(pipe, **call), pipes, calls))
            assert all(map(torch.equal, results, expected))


def test_the_benchs_ungated_graphs_keep_what_a_step_of_two_calls_reads(replay: ReplayBackend) -> None:
    entry = entry_of("WanPipeline")
    pipe = entry.make()
    expected = entry.run(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend=replay, fullgraph=True)
    keep_outputs(pipe.transformer)
    for _ in range(3):
        assert torch.equal(entry.run(pipe), expected)
    assert replay.replays > 0


def test_a_graph_that_freezes_copies_its_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is marked as static would be one of its constants."""
    monkeypatch.setattr(settings, "_has_cuda_graphs", lambda device: True)
    device = torch.device("cpu")
    replays = settings.CompileSettings(mode="reduce-overhead")
    freezes = settings.CompileSettings(options={"freezing": True, "triton.cudagraphs": True})
    assert (replays.needs_static_addresses(device), freezes.needs_static_addresses(device)) == (True, False)
    assert freezes.uses_cuda_graphs(device)


@pytest.mark.inductor
@pytest.mark.slow
def test_a_phase_that_torch_would_run_without_a_cuda_graph_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch itself skips the CUDA graph of what is on a CPU, and logs a line."""
    pipe, call = tiny.make("sd-small"), {**tiny.inputs("sd"), "num_inference_steps": 3}
    expected = tiny.latents(pipe, **call)
    monkeypatch.setattr(settings, "_has_cuda_graphs", lambda device: True)
    tgate_fx.compile(pipe, 2, mode="reduce-overhead")
    for _ in range(2):
        message = says("ask for CUDA graphs", "without one", "TORCH_LOGS=cudagraphs", "max-autotune-no-cudagraphs")
        with pytest.raises(tgate_fx.CompileError, match=message):
            tiny.latents(pipe, **call)
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **call), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_for_one_says_so() -> None:
    result = CliRunner().invoke(cuda_graphs.main, [])
    assert result.exit_code == 2
    assert "needs a GPU with CUDA" in result.output


_VIEWS = {"aten::chunk", "aten::select", "aten::slice"}
_GRAPH = "graph"


def operations_between_graphs(pipe: Any, call: dict[str, Any]) -> list[Counter[str]]:
    """What runs before each graph of a generation and since the one before it, but for views."""
    for _ in range(2):
        pipe(**call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pipe(**call)
    found: list[Counter[str]] = [Counter()]
    inside = 0  # until when a graph or an operation runs
    for event in sorted(profile.events(), key=lambda each: (each.time_range.start, -each.time_range.end)):
        if event.time_range.start < inside or not (event.name == _GRAPH or event.name.startswith("aten::")):
            continue
        inside = event.time_range.end
        if event.name == _GRAPH:
            found.append(Counter())
        elif event.name not in _VIEWS:
            found[-1][event.name] += 1
    return found[:-1]


def marked(graph: torch.fx.GraphModule, _: list[Any], **settings: Any) -> Any:
    """A backend whose graphs are events of the profiler."""

    def run(*args: Any) -> Any:
        with torch.profiler.record_function(_GRAPH):
            return graph(*args)

    return run


@pytest.mark.parametrize("scheduler", tiny.slow_but(("DDIM",), ("DDIM", "EulerDiscrete")))
def test_a_gated_step_has_few_operations_of_its_own(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a launch on a GPU: the timestep as a float, a copy of what replay overwrites, one output for both."""
    monkeypatch.setattr(settings, "_has_cuda_graphs", lambda device: True)
    plain, pipe = tiny.make("sd-small"), tiny.make("sd-small")
    for each in (plain, pipe):
        each.scheduler = tiny.scheduler(scheduler)
    plain.unet.compile(backend=marked, fullgraph=True)
    tgate_fx.compile(pipe, 3, after_gate="positive", backend=marked, mode="reduce-overhead")
    call = {**tiny.inputs("sd-small"), "num_inference_steps": 8, "output_type": "latent"}
    ungated, gated = (operations_between_graphs(each, call) for each in (plain, pipe))
    assert len(ungated) == len(gated)
    own = {"aten::to": 1, "aten::clone": 1}
    assert gated[2] - ungated[2] == own
    for step in (5, 6):
        assert gated[step] - ungated[step] == {**own, "aten::cat": 1}
