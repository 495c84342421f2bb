"""Gated pipelines of every kind, eager, against the plain reference and against the untouched pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from PIL import Image

import tgate_fx
from tests import oracle, reference, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error

STEPS = 8
UNGUIDED = ("lcm", "lcm-img2img", "sd-lcm", "sdxl-lcm", "pixart-alpha-lcm")


def gated_and_expected(family: str, gate: int, after_gate: str = "negative", **extra: Any) -> tuple[Any, Any]:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": STEPS, **extra}
    pipe = tgate_fx.gate(tiny.make(family), gate_step=gate, after_gate=after_gate)
    guided = family not in UNGUIDED and kwargs.get("guidance_scale", 5.0) > 1
    plain = reference.gate(tiny.make(family), gate, guided=guided, after_gate=after_gate)
    return tiny.latents(pipe, **kwargs), tiny.latents(plain, **kwargs)


@pytest.mark.parametrize("family", tiny.MAKERS)
def test_every_family_equals_the_reference(family: str) -> None:
    got, expected = gated_and_expected(family, gate=2)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("after_gate", ["positive", "both"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd-inpaint-9", "pixart-alpha", "pixart-sigma"])
def test_other_branches_after_the_gate(family: str, after_gate: str) -> None:
    got, expected = gated_and_expected(family, 3, after_gate)
    assert torch.equal(got, expected)


def test_the_branch_matters_where_conditioning_is_not_by_cross_attention_alone() -> None:
    results = {
        after_gate: gated_and_expected("sdxl", 3, after_gate)[0] for after_gate in ("negative", "positive", "both")
    }
    assert not torch.equal(results["negative"], results["positive"])
    assert not torch.equal(results["negative"], results["both"])


@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "lcm-img2img", "sd-inpaint"])
def test_never_gated_equals_the_untouched_pipeline(family: str) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": STEPS}
    pipe = tiny.make(family)
    expected = tiny.latents(pipe, **kwargs)
    tgate_fx.gate(pipe, gate_step=2)
    gated = tiny.latents(pipe, **kwargs)
    assert not torch.equal(gated, expected)
    for gate_step in (None, STEPS, STEPS + 5):
        assert torch.equal(tiny.latents(pipe, **kwargs, gate_step=gate_step), expected)
    with tgate_fx.disabled(pipe):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
        assert torch.equal(tiny.latents(pipe, **kwargs, gate_step=3), expected)
    assert torch.equal(tiny.latents(pipe, **kwargs), gated)


@pytest.mark.parametrize("gate_step", [1, 3, 0.5, None])
def test_override_for_one_call(gate_step: int | float | None) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": STEPS}
    pipe = tgate_fx.gate(tiny.sd(), gate_step=5)
    before = tiny.latents(pipe, **kwargs)
    expected = tiny.latents(tgate_fx.gate(tiny.sd(), gate_step=gate_step), **kwargs)
    assert torch.equal(tiny.latents(pipe, **kwargs, gate_step=gate_step), expected)
    assert torch.equal(tiny.latents(pipe, **kwargs), before)


@pytest.mark.parametrize(
    ("family", "extra", "steps"),
    [
        ("sd", {"num_inference_steps": 6}, 6),
        ("sd-img2img", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sd-inpaint", {"num_inference_steps": 10, "strength": 0.4}, 4),
        ("sdxl-img2img", {"num_inference_steps": 10, "strength": 0.5}, 5),
        ("sdxl", {"num_inference_steps": 10, "denoising_end": 0.6}, 6),
        ("pixart-alpha", {"num_inference_steps": 7}, 7),
    ],
)
def test_a_share_is_of_the_steps_that_are_run(family: str, extra: dict[str, Any], steps: int) -> None:
    pipe = tgate_fx.gate(tiny.make(family), gate_step=0.5)
    tiny.latents(pipe, **{**tiny.inputs(family), **extra})
    report = tgate_fx.report(pipe)
    assert len(report.steps) == steps
    assert report.gate == round(steps / 2)


def test_a_count_left_by_an_earlier_generation_is_not_taken_for_this_ones() -> None:
    """PixArt records no number of steps; whatever is recorded on it is somebody else's, and stays."""
    pipe = tgate_fx.gate(tiny.pixart(), gate_step=0.5)
    pipe._num_timesteps = 4
    tiny.latents(pipe, **tiny.pixart_inputs(), num_inference_steps=8)
    assert tgate_fx.report(pipe).gate == 4
    assert len(tgate_fx.report(pipe).steps) == 8
    assert pipe._num_timesteps == 4


@pytest.mark.parametrize(("scheduler", "evaluations"), [("HeunDiscrete", 11), ("PNDM", 7), ("EulerDiscrete", 6)])
def test_steps_are_evaluations_of_the_denoiser(scheduler: str, evaluations: int) -> None:
    pipe = tiny.sd()
    pipe.scheduler = tiny.scheduler(scheduler)
    tgate_fx.gate(pipe, gate_step=0.5)
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=6)
    assert [step.index for step in tgate_fx.report(pipe).steps] == list(range(evaluations))
    assert tgate_fx.report(pipe).gate == round(evaluations / 2)


@pytest.mark.parametrize("custom", [{"timesteps": [900, 700, 400, 100]}, {"sigmas": [14.0, 8.0, 2.0, 0.5, 0.0]}])
def test_custom_timesteps_are_counted(custom: dict[str, Any]) -> None:
    pipe = tiny.sd()
    pipe.scheduler = tiny.scheduler("EulerDiscrete")
    tgate_fx.gate(pipe, gate_step=0.5)
    tiny.latents(pipe, **tiny.inputs("sd"), **custom)
    assert [step.phase for step in tgate_fx.report(pipe).steps] == ["pre-gate"] * 2 + ["post-gate"] * 2


def test_guidance_may_change_from_call_to_call() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    for scale in (7.5, 1.0, 0.0, 3.0):
        kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": STEPS, "guidance_scale": scale}
        expected = tiny.latents(reference.gate(tiny.sd(), 3, guided=scale > 1), **kwargs)
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
        assert tgate_fx.report(pipe).steps[0].batch == (4 if scale > 1 else 2)
        assert tgate_fx.report(pipe).steps[-1].batch == 2


def test_guidance_scale_given_by_position() -> None:
    """PixArt decides by the bound argument alone."""
    pipe = tgate_fx.gate(tiny.pixart(), gate_step=2)
    kwargs = tiny.pixart_inputs()
    position = (kwargs.pop("prompt"), kwargs.pop("negative_prompt"), 4, None, None, 1.0)
    pipe(*position, **kwargs, output_type="latent")
    assert [step.batch for step in tgate_fx.report(pipe).steps] == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    kwargs = {**tiny.inputs(family), "num_inference_steps": 6}
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor) and name.endswith("embeds"):
            kwargs[name] = value.to(dtype)
    got = tiny.latents(tgate_fx.gate(tiny.make(family).to(dtype), gate_step=2), **kwargs)
    expected = tiny.latents(reference.gate(tiny.make(family).to(dtype), 2, guided=True), **kwargs)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_every_kind_of_output(output_type: str, return_dict: bool) -> None:
    def images(pipe: Any) -> Any:
        result = pipe(
            **tiny.inputs("sd"),
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(1),
            output_type=output_type,
            return_dict=return_dict,
        )
        return result.images if return_dict else result[0]

    got = images(tgate_fx.gate(tiny.sd(), gate_step=2))
    expected = images(reference.gate(tiny.sd(), 2, guided=True))
    assert type(got) is type(expected)
    if output_type == "pil":
        assert isinstance(got[0], Image.Image)
        got, expected = np.asarray(got[0]), np.asarray(expected[0])
    assert np.array_equal(np.asarray(got), np.asarray(expected))


def test_callbacks_see_every_step_and_may_change_the_latents() -> None:
    seen: list[int] = []

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return {"latents": values["latents"] * 0.9}

    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": 5, "callback_on_step_end": callback}
    got = tiny.latents(tgate_fx.gate(tiny.sd(), gate_step=2), **kwargs)
    assert seen == [0, 1, 2, 3, 4]
    assert torch.equal(got, tiny.latents(reference.gate(tiny.sd(), 2, guided=True), **kwargs))


@pytest.mark.parametrize("how", tiny.slow_but(("gate",), ("gate", "compile")))
@pytest.mark.parametrize("after", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("family", "callback"), [("sd-small", SDCFGCutoffCallback), ("sdxl-small", SDXLCFGCutoffCallback)]
)
def test_diffusers_callbacks_that_drop_guidance(
    family: str, callback: type[Any], after: int, how: str, backend: CountingBackend
) -> None:
    """Before the gate, at the step right before it and at its first: from then on there is one branch, here too."""
    gate = 3
    plain = tiny.make(family)
    sites = [site.name for site in tgate_fx.sites(plain)]
    call = {**tiny.inputs(family), "num_inference_steps": 6}
    call["callback_on_step_end"] = callback(cutoff_step_ratio=None, cutoff_step_index=after)
    kept: dict[str, torch.Tensor] = {}
    step = [-1]

    def keep_or_replace(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if step[0] == gate - 1:
                first, second = output.chunk(2) if len(output) == 2 else (output, output)
                # Its own, where guidance ends with that step.
                kept[name] = second if after == gate - 1 else (first + second) / 2
            return output if step[0] < gate else torch.cat([kept[name]] * len(output))

        return hook

    def answer(module: Any, args: Any, output: Any) -> Any:
        if step[0] < gate:
            return output
        return oracle.mapped(lambda tensor: torch.cat([tensor[:1]] * len(tensor)), output)

    unet = plain.unet
    handles = [unet.register_forward_pre_hook(lambda *_: step.__setitem__(0, step[0] + 1))]
    handles += [unet.get_submodule(name).register_forward_hook(keep_or_replace(name)) for name in sites]
    with oracle.hooked(*handles, unet.register_forward_hook(answer)):
        expected = tiny.latents(plain, **call)
    pipe = tiny.make(family)
    tgate_fx.gate(pipe, gate) if how == "gate" else tgate_fx.compile(pipe, gate, backend=backend)
    got = tiny.latents(pipe, **call)
    assert relative_error(got, expected) < 3e-7
    if how == "compile":
        assert len(backend.graphs) == (3 if after < gate - 1 else 2)
    assert [row.batch for row in tgate_fx.report(pipe).steps] == [
        2 if index < min(gate, after + 1) else 1 for index in range(6)
    ]
    assert relative_error(got, tiny.latents(pipe, **call, gate_step=None)) > 1e-6


def test_prompt_embeddings_given_directly() -> None:
    pipe = tiny.sd()
    with torch.no_grad():
        embeds, negative = pipe.encode_prompt("a cat", torch.device("cpu"), 1, True, "a dog")
    kwargs = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "height": 16, "width": 16}
    expected = tiny.latents(
        tgate_fx.gate(tiny.sd(), 2), prompt="a cat", negative_prompt="a dog", height=16, width=16, num_inference_steps=5
    )
    assert torch.equal(tiny.latents(tgate_fx.gate(pipe, 2), **kwargs, num_inference_steps=5), expected)


def test_resolution_and_batch_may_change_from_call_to_call() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=2)
    for prompts, size in ((1, 16), (2, 24), (1, 16), (3, 32)):
        kwargs = {**tiny.inputs("sd", prompts), "height": size, "width": 16, "num_inference_steps": 4}
        expected = tiny.latents(reference.gate(tiny.sd(), 2, guided=True), **kwargs)
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_the_denoiser_may_return_its_output_class() -> None:
    """Some pipelines take `.sample` of the output instead of asking for a tuple."""
    pipe = tiny.sd()
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": 4}
    expected = tiny.latents(tgate_fx.gate(tiny.sd(), 2), **kwargs)
    tgate_fx.gate(pipe, 2)
    dispatched = pipe.unet.forward

    class Tuple:
        def __call__(self, *args: Any, return_dict: bool = True, **kw: Any) -> Any:
            assert not return_dict
            return (dispatched(*args, **kw).sample,)

    pipe.unet.forward = Tuple()
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def _channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "channels last": _channels_last,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("how", tiny.slow_but(("gate",), ("gate", "compile")))
def test_changes_to_the_denoiser_after_gating(how: str, change: Callable[[Any], Any], backend: CountingBackend) -> None:
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": 5}
    pipe = getattr(tgate_fx, how)(tiny.make("sd-small"), 2, **({"backend": backend} if how == "compile" else {}))
    change(pipe)
    plain = tiny.make("sd-small")
    change(plain)
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(reference.gate(plain, 2, guided=True), **kwargs))
    assert len(backend.graphs) == (2 if how == "compile" else 0)


@pytest.mark.parametrize("rule", [{"gate_step": 3}, {"gate_step": 0.5}, {"gate_step": 3, "forecast": 2}], ids=str)
def test_an_interrupted_generation_leaves_nothing_behind(rule: dict[str, Any]) -> None:
    """Nor is it refused, where a rule depends on how many steps there are."""
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": 6}
    pipe = tgate_fx.gate(tiny.sd(), **rule)
    expected = tiny.latents(pipe, **kwargs)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 3
        return {}

    tiny.latents(pipe, **kwargs, callback_on_step_end=callback)
    assert len(tgate_fx.report(pipe).steps) == 4
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
