"""Compiled phases: how many graphs, what is in them, what they compute, and when guards are checked."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_refusals import says
from tgate_fx.compiled import variant
from tgate_fx.compiled.frozen_weights import FrozenWeights
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.inputs import canonical


def compiled(family: str, backend: Any, **kwargs: Any) -> Any:
    return tgate_fx.compile(tiny.make(family), gate_step=2, backend=backend, **kwargs)


def other_inputs(family: str, round_: int) -> dict[str, Any]:
    """Inputs of the same shape with other text."""
    kwargs = tiny.inputs(family, 2)
    if "prompt_embeds" in kwargs:
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"] + round_
    else:
        kwargs["prompt"] = [f"{prompt} {round_}" for prompt in kwargs["prompt"]]
    return kwargs


def input_names(graph: torch.fx.GraphModule) -> set[str]:
    """The names of everything that a graph reads: its inputs, and the parameters it holds."""
    return {node.name for node in graph.graph.nodes if node.op in ("placeholder", "get_attr")}


@pytest.mark.parametrize(
    "family",
    tiny.slow_but(
        ("sd-small", "pixart-alpha"), ["sd-small", "sd", "sd-lcm", "sdxl-small", "pixart-alpha", "pixart-sigma"]
    ),
)
def test_two_graphs_serve_three_generations_exactly_and_the_second_knows_no_text(
    family: str, backend: CountingBackend
) -> None:
    pipe = compiled(family, backend)
    eager = tgate_fx.gate(tiny.make(family), gate_step=2)
    settings: list[dict[str, Any]] = [
        {"num_inference_steps": 6},
        {"num_inference_steps": 8, "gate_step": 3, "guidance_scale": 3.0, "seed": 1},
        {"num_inference_steps": 7, "gate_step": 0.5, "guidance_scale": 9.0, "seed": 2},
    ]
    for round_, setting in enumerate(settings):
        kwargs = {**other_inputs(family, round_), **setting}
        with torch.compiler.set_stance("fail_on_recompile" if round_ else "default"):
            got = tiny.latents(pipe, **kwargs)
        report = tgate_fx.report(pipe)
        assert torch.equal(got, tiny.latents(eager, **kwargs))
        assert report.recompiles == 0
        assert report.compiled_graphs == 2
        assert sum(step.compiled for step in report.steps) == (0 if round_ else 2)
    pre, post = map(input_names, backend.graphs)
    assert any("encoder_hidden_states" in name for name in pre)
    assert any("attn2" in name for name in pre)
    for text in ("attn2", "encoder_hidden_states", "encoder_attention_mask", "caption_projection"):
        assert not [name for name in post if text in name]
    assert len([name for name in post if "cache" in name]) == len(tgate_fx.sites(pipe))


@pytest.mark.parametrize("after_gate", tiny.slow_but(("positive",), ("positive", "both")))
def test_other_branches_need_two_graphs_too(after_gate: str, backend: CountingBackend) -> None:
    pipe = compiled("sdxl-small", backend, after_gate=after_gate)
    eager = tgate_fx.gate(tiny.make("sdxl-small"), gate_step=2, after_gate=after_gate)
    for steps in (5, 6):
        kwargs = {**tiny.inputs("sdxl"), "num_inference_steps": steps}
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


@pytest.mark.parametrize("family", tiny.slow_but(("sd-small",), ("sd-small", "pixart-alpha")))
def test_schedulers_with_other_timesteps_share_the_graphs(family: str, backend: CountingBackend) -> None:
    """DDIM hands over int64, Euler float32 timesteps; both are exact as float32."""
    pipe = compiled(family, backend)
    eager = tgate_fx.gate(tiny.make(family), gate_step=2)
    for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"):
        pipe.scheduler, eager.scheduler = tiny.scheduler(name), tiny.scheduler(name)
        kwargs = {**tiny.inputs(family), "num_inference_steps": 5}
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_a_new_shape_compiles_once_more_and_the_old_one_stays(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)

    def run(**extra: Any) -> tuple[int, int]:
        kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4, **extra}
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
        report = tgate_fx.report(pipe)
        assert report.compiled_graphs == len(backend.graphs)
        return len(backend.graphs), report.recompiles

    assert run() == (2, 0)
    assert run(height=24) == (4, 2)
    assert run() == (4, 0)
    assert run(height=24) == (4, 0)
    assert run(prompt=["a cat", "a dog"]) == (6, 2)
    # Without guidance the batch of one is new before the gate; after it, it is the one that guidance left.
    assert run(guidance_scale=1.0) == (7, 1)
    assert run(guidance_scale=1.0) == (7, 0)
    assert run() == (7, 0)


def test_a_new_dtype_compiles_once_more(backend: CountingBackend) -> None:
    pipe = compiled("pixart-small", backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 4}
    single = tiny.latents(pipe, **kwargs)
    pipe.to(torch.bfloat16)
    half = tiny.latents(pipe, **kwargs)
    assert half.dtype == torch.bfloat16
    assert tgate_fx.report(pipe).recompiles == 2
    pipe.to(torch.float32)
    tiny.latents(pipe, **kwargs)
    assert single.dtype == torch.float32


@pytest.mark.slow
def test_latents_keep_the_layout_that_a_form_was_compiled_with(backend: CountingBackend) -> None:
    """Image latents come channels-last from the VAE; others take that layout after the first step of such a model."""
    pipe = compiled("sd-small", backend)
    latents = torch.randn(1, 4, 8, 8)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4, "output_type": "latent"}
    plain = pipe(**kwargs, latents=latents).images
    last = pipe(**kwargs, latents=latents.to(memory_format=torch.channels_last)).images
    assert torch.equal(plain, last)
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_more_shapes_than_the_recompile_limit(backend: CountingBackend) -> None:
    pipe = compiled("pixart-small", backend)
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(2, 5):
            tiny.latents(pipe, **{**tiny.inputs("pixart-small"), "height": 8 * rows}, num_inference_steps=3)
    assert tgate_fx.report(pipe).compiled_graphs == 6


def test_more_changes_of_a_module_than_the_recompile_limit(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("pixart-small"), gate_step=None, backend=backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 2}
    with torch._dynamo.config.patch(recompile_limit=2):
        for change in range(3):
            pipe.transformer.set_attn_processor(type(f"Processor{change}", (AttnProcessor2_0,), {})())
            tiny.latents(pipe, **kwargs)
            assert tgate_fx.report(pipe).compiled_graphs == change + 1


@pytest.mark.slow
def test_dynamic_shapes_share_one_pair_of_graphs(backend: CountingBackend) -> None:
    """Squares and rectangles, whichever comes first."""
    family = "sd-small"
    pipe = compiled(family, backend, dynamic=True)
    eager = tgate_fx.gate(tiny.make(family), gate_step=2)
    for height, width in ((32, 32), (24, 32), (48, 16), (16, 16)):
        kwargs = {**tiny.inputs(family), "height": height, "width": width, "num_inference_steps": 4}
        torch.testing.assert_close(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


@pytest.mark.slow
@pytest.mark.inductor
def test_dynamic_shapes_with_inductor() -> None:
    """As on a CPU by default: with the weights held by the graphs."""
    pipe, eager = (tiny.sd(**tiny.ONE_BLOCK) for _ in range(2))
    tgate_fx.compile(pipe, gate_step=2, dynamic=True)
    tgate_fx.gate(eager, gate_step=2)
    for height, width in ((32, 32), (24, 32), (48, 16)):
        kwargs = {**tiny.inputs("sd"), "height": height, "width": width, "num_inference_steps": 4}
        assert relative_error(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs)) < 1e-4
    assert tgate_fx.report(pipe).compiled_graphs == 2


def test_dynamic_shapes_of_a_model_that_computes_with_them_are_refused() -> None:
    pipe = tiny.make("pixart-alpha-256")
    with pytest.raises(
        tgate_fx.UnsupportedError, match=says("dynamic=True", "PixArtTransformer2DModel", "regional=True")
    ):
        tgate_fx.compile(pipe, dynamic=True)
    tgate_fx.compile(pipe, dynamic=True, regional=True)


@pytest.mark.slow
def test_pipelines_do_not_share_graphs_or_recompile_limits() -> None:
    with torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(4):
            backend = CountingBackend()
            pipe = compiled("pixart-small", backend)
            for _ in range(2):
                tiny.latents(pipe, **tiny.inputs("pixart-small"), num_inference_steps=4)
            assert len(backend.graphs) == 2


def test_disabled_runs_the_compiled_pre_gate_graph(backend: CountingBackend) -> None:
    pipe = compiled("pixart-small", backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 4}
    expected = tiny.latents(tiny.make("pixart-small"), **kwargs)
    with tgate_fx.disabled(pipe):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    assert [step.phase for step in tgate_fx.report(pipe).steps] == ["pre-gate"] * 4
    assert len(backend.graphs) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"sp_interval": 2, "fi_interval": 2},
        pytest.param({"sp_interval": 2}, marks=pytest.mark.slow),
        pytest.param({"deepcache": tgate_fx.DeepCache(2)}, marks=pytest.mark.slow),
    ],
)
def test_disabled_needs_no_graph_of_its_own(settings: dict[str, Any], backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend, **settings)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 7}
    tiny.latents(pipe, **kwargs, gate_step=4)
    graphs = len(backend.graphs)
    expected = tiny.latents(tiny.make("sd-small"), **kwargs)
    with tgate_fx.disabled(pipe):
        for gate in (None, 4, 0.5):
            assert torch.equal(tiny.latents(pipe, **kwargs, gate_step=gate), expected)
            assert tgate_fx.report(pipe).gate is None
    assert len(backend.graphs) == graphs


class Calls:
    """Counts how often torch.compile's own entry, which checks the guards, is gone through."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        guarded = variant.Variant.__call__

        def counting(variant: Any, *args: Any) -> Any:
            self.count += 1
            return guarded(variant, *args)

        monkeypatch.setattr(variant.Variant, "__call__", counting)


def test_guards_are_checked_once_for_each_phase_of_a_generation(
    backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = compiled("pixart-small", backend)
    calls = Calls(pipe, monkeypatch)
    for generation in (1, 2, 3):
        tiny.latents(pipe, **tiny.inputs("pixart-small"), num_inference_steps=6)
        assert calls.count == 2 * generation


def test_guards_are_checked_at_every_step_where_a_callback_may_change_modules(
    backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    calls = Calls(pipe, monkeypatch)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 3:  # the denoiser's structure changes in the middle of the post-gate phase
            pipe.unet.conv_norm_out = nn.Identity()
        return {}

    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6, "callback_on_step_end": callback}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert calls.count == 6
    assert tgate_fx.report(pipe).recompiles == 0
    assert len(backend.graphs) == 3


def test_a_changed_module_is_noticed_by_the_next_generation(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    before = tiny.latents(pipe, **kwargs)
    plain = pipe.unet.conv_norm_out
    for graphs, module in ((4, nn.Identity()), (4, plain), (4, nn.Identity())):
        pipe.unet.conv_norm_out = eager.unet.conv_norm_out = module
        got = tiny.latents(pipe, **kwargs)
        assert torch.equal(got, tiny.latents(eager, **kwargs))
        assert torch.equal(got, before) is (module is plain)
        assert len(backend.graphs) == graphs


def test_changed_weights_need_no_new_graph(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    before = tiny.latents(pipe, **kwargs)
    for each in (pipe, eager):
        each.unet.conv_in.weight.data.mul_(1.5)
    got = tiny.latents(pipe, **kwargs)
    assert not torch.equal(got, before)
    assert torch.equal(got, tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


def test_what_breaks_the_graph_is_an_error_and_leaves_the_pipeline_usable(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    expected = tiny.latents(pipe, **kwargs)
    plain = pipe.unet.mid_block.forward

    def breaks(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return plain(*args, **kwargs)

    pipe.unet.mid_block.forward = breaks
    with pytest.raises(
        tgate_fx.CompileError, match=r"pre-gate phase could not be compiled as one graph(.|\n)*gate\(pipe"
    ):
        tiny.latents(pipe, **kwargs)
    del pipe.unet.mid_block.forward
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_a_recompile_can_be_forbidden(backend: CountingBackend) -> None:
    pipe = compiled("pixart-small", backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        tiny.latents(pipe, **{**kwargs, "height": 24})
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_force_eager_runs_every_step_eagerly(backend: CountingBackend) -> None:
    pipe = compiled("pixart-small", backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    ran = backend.ran
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    assert backend.ran == ran == 4
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    assert backend.ran == 8


def test_eager_on_recompile_runs_no_stale_graph(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    tiny.latents(pipe, **kwargs)
    for each in (pipe, eager):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with torch.compiler.set_stance("eager_on_recompile"):
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


class InPlaceProcessor(AttnProcessor2_0):
    """An attention processor that writes into its result, and uses no value of what it writes with."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().__call__(*args, **kwargs).clone()
        out.mul_(3.0)
        out += 1
        out[:, 0] = 0
        torch.add(out, 1, out=out)
        nn.functional.relu(out, True)
        nn.functional.hardtanh(out, -0.5, 0.5, inplace=True)
        return out


def test_writes_in_place_are_not_dead_code(backend: CountingBackend) -> None:
    pipe = compiled("sd-small", backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    for each in (pipe, eager):
        each.unet.set_attn_processor(InPlaceProcessor())
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))


def test_compiled_pipelines_are_freed(backend: CountingBackend) -> None:
    import weakref

    pipe = compiled("pixart-small", backend)
    tiny.latents(pipe, **tiny.inputs("pixart-small"), num_inference_steps=4)
    gone = weakref.ref(pipe.transformer)
    tgate_fx.restore(pipe)
    backend.graphs.clear()
    del pipe
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest latent: every step adds rounding, and single latents may be near zero."""
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_agrees_with_eager_on_a_transformer_whose_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor freezes weights into its graphs; one that is written to, past its version counter even, is noticed."""
    pipe, eager = tiny.make("pixart-small"), tiny.make("pixart-small")
    tgate_fx.compile(pipe, gate_step=2)
    tgate_fx.gate(eager, gate_step=2)
    kwargs = {**tiny.pixart_inputs(), "num_inference_steps": 5}
    before = tiny.latents(eager, **kwargs)
    assert relative_error(tiny.latents(pipe, **kwargs), before) < 1e-4
    for each in (pipe, eager):
        next(p for n, p in each.transformer.named_parameters() if "ff.net.2.weight" in n).data.add_(0.3)
    changed = tiny.latents(eager, **kwargs)
    assert relative_error(changed, before) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(FrozenWeights, "changed", lambda _: False)
        assert relative_error(tiny.latents(pipe, **kwargs), before) < 1e-4  # the weights really are in the graphs
    assert relative_error(tiny.latents(pipe, **kwargs), changed) < 1e-4
    assert tgate_fx.report(pipe).recompiles == 2
    assert tgate_fx.report(pipe).compiled_graphs == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backend": "bogus"}, "torch.compile does not take backend='bogus'"),
        ({"backend": None}, "backend=None (NoneType) was given: expected a backend's name"),
        ({"mode": "bogus"}, "mode='bogus'"),
        ({"mode": 5}, "mode=5 (int) was given"),
        ({"options": {"bogus": 1}}, "Unexpected optimization option bogus"),
        ({"options": {"freezing": "no"}}, "freezing, got str should be bool"),
        ({"options": [1]}, "options=[1] (list) was given"),
        ({"options": {1: 1}}, "expected a dict of options by name"),
        ({"dynamic": "yes"}, "dynamic='yes' (str) was given"),
        ({"regional": "no"}, "regional='no' (str) was given: expected True or False"),
        ({"gate_companions": "no"}, "gate_companions='no' (str) was given"),
    ],
)
def test_settings_that_torch_does_not_take_are_refused_at_once(given: dict[str, Any], message: str) -> None:
    pipe = tiny.make("sd-small")
    with pytest.raises(tgate_fx.ArgumentError, match=says(message)):
        tgate_fx.compile(pipe, 2, **given)
    tgate_fx.compile(pipe, 2, backend="eager")


@pytest.mark.filterwarnings("ignore:.*callback:FutureWarning")
@pytest.mark.parametrize(("name", "given"), [("callback", {"callback_steps": 1}), ("callback_on_step_end", {})])
def test_what_a_callback_changes_counts_from_the_next_step_on(
    name: str, given: dict[str, Any], backend: CountingBackend
) -> None:
    """diffusers' older callback too."""
    call = {**tiny.inputs("sd-small"), "num_inference_steps": 7}
    results = []
    for put in (tgate_fx.gate, lambda *args: tgate_fx.compile(*args, backend=backend)):
        pipe = put(tiny.make("sd-small"), 2)

        def turn_on(*args: Any, pipe: Any = pipe) -> dict[str, Any]:
            if args[0 if name == "callback" else 1] == 3:
                pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
            return {}

        without = tiny.latents(pipe, **call)
        results.append(tiny.latents(pipe, **call, **{name: turn_on}, **given))
        assert not torch.equal(results[-1], without)
    assert torch.equal(*results)


def test_torchs_backend_of_bare_cuda_graphs_is_refused() -> None:
    with pytest.raises(tgate_fx.UnsupportedError, match=says("cudagraphs", "overwrite", 'mode="reduce-overhead"')):
        tgate_fx.compile(tiny.make("sd-small"), 2, backend="cudagraphs")


@pytest.mark.parametrize(
    ("settings", "device", "options"),
    [
        (CompileSettings(), "cpu", {"freezing": True}),
        (CompileSettings(), "cuda", None),
        (CompileSettings(options={"freezing": False}), "cpu", {"freezing": False}),
        (CompileSettings(options={"max_autotune": True}), "cpu", {"max_autotune": True, "freezing": True}),
        (CompileSettings(options={"freezing": True}), "cuda", {"freezing": True}),
        (CompileSettings(mode="reduce-overhead"), "cpu", None),
        (CompileSettings(backend="eager"), "cpu", None),
    ],
)
def test_options_for_a_device(settings: CompileSettings, device: str, options: dict[str, Any] | None) -> None:
    assert settings.options_for(torch.device(device)) == options
    assert settings.freezes(torch.device(device)) is bool(options and options.get("freezing"))


def test_which_graphs_may_be_cuda_graph_replays() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert CompileSettings(mode="reduce-overhead").uses_cuda_graphs(cuda)
    assert CompileSettings(mode="max-autotune").uses_cuda_graphs(cuda)
    assert CompileSettings(options={"triton.cudagraphs": True}).uses_cuda_graphs(cuda)
    assert not CompileSettings(mode="max-autotune-no-cudagraphs").uses_cuda_graphs(cuda)
    assert not CompileSettings().uses_cuda_graphs(cuda)
    assert not CompileSettings(mode="reduce-overhead").uses_cuda_graphs(cpu)


def test_the_report_says_what_is_in_force() -> None:
    assert CompileSettings().describe(torch.device("cpu")) == "torch.compile (inductor, freezing=True)"
    pipe = tgate_fx.compile(tiny.sd(), mode="reduce-overhead", dynamic=True)
    assert tgate_fx.report(pipe).compiler == "torch.compile (inductor, mode=reduce-overhead, dynamic)"


@pytest.mark.slow
def test_mode_and_options_are_handed_to_the_backend() -> None:
    seen: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        seen.append(kwargs)
        return graph.forward

    for extra in ({"mode": "max-autotune"}, {"options": {"level": 3}}, {}):
        pipe = tgate_fx.compile(tiny.pixart(), gate_step=None, backend=backend, **extra)
        tiny.latents(pipe, **tiny.pixart_inputs(), num_inference_steps=2)
    assert seen == [{"mode": "max-autotune"}, {"options": {"level": 3}}, {}]


def test_canonical_form() -> None:
    sample = torch.randn(2, 4, 8, 8)
    inputs = {"sample": sample, "timestep": 500, "added": {"text_embeds": sample[0]}, "return_dict": False}
    result, form = canonical(inputs)
    assert result["timestep"].dtype == torch.float32
    assert result["sample"] is sample

    def changed(**changes: Any) -> bool:
        return canonical({**inputs, **changes})[1] != form

    assert not changed(sample=sample.to(memory_format=torch.channels_last), timestep=torch.tensor(3))
    assert canonical({**inputs, "added": {"text_embeds": sample[0].mT}})[0]["added"]["text_embeds"].is_contiguous()
    assert changed(sample=sample[:1])
    assert changed(sample=sample.double())
    assert changed(timestep=torch.tensor([500]))
    assert changed(return_dict=0)
    assert changed(added={"text_embeds": sample[1, :2]})
    assert changed(added={"text_embeds": sample[0], "time_ids": sample[0]})
    residuals = canonical({"sample": sample, "residuals": [sample[0], (sample[1].mT, None)]})
    again = canonical({"sample": sample + 1, "residuals": [sample[0] + 1, (sample[1] + 1, None)]})
    assert residuals[1] == again[1]
    assert type(residuals[0]["residuals"]) is list
    assert residuals[0]["residuals"][1][0].is_contiguous()
    assert canonical({"sample": sample, "residuals": [sample[0], (sample[1, :2], None)]})[1] != residuals[1]
    twice = canonical({"sample": sample, "other": sample})[1]
    assert twice != canonical({"sample": sample, "other": sample.clone()})[1]
