"""Bit-exact parity with upstream `tgate` 1.0.0, with its self-attention cache off."""

from __future__ import annotations

from typing import Any

import pytest
import tgate
import torch
from diffusers import PixArtAlphaPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import tgate_fx
from tests import reference, tiny

STEPS = 7
LOADERS = {
    "sd": tgate.TgateSDLoader,
    "sd-2.1": tgate.TgateSDLoader,
    "sdxl": tgate.TgateSDXLLoader,
    "sdxl-lcm": tgate.TgateSDXLLoader,
    "pixart-alpha": tgate.TgatePixArtAlphaLoader,
    "pixart-alpha-256": tgate.TgatePixArtAlphaLoader,
    "pixart-alpha-lcm": tgate.TgatePixArtAlphaLoader,
    "pixart-sigma": tgate.TgatePixArtSigmaLoader,
}
SCHEDULERS = {
    "sd": ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "EulerAncestralDiscrete", "UniPCMultistep"),
    "sdxl": ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete"),
    "pixart-alpha": ("DPMSolverMultistep", "DDIM", "EulerDiscrete"),
    "pixart-sigma": ("DPMSolverMultistep", "DDIM", "EulerDiscrete"),
}


def upstream(family: str, scheduler: str, gate: int, **kwargs: Any) -> torch.Tensor:
    """The latents of upstream's pipeline."""
    pipe = tiny.make(family)
    pipe.scheduler = tiny.scheduler(scheduler)
    pipe = LOADERS[family](pipe)
    if family.endswith("lcm"):
        kwargs["lcm"] = True
    return pipe.tgate(
        **kwargs,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
        gate_step=gate,
        sp_interval=1,
        fi_interval=1,
        warm_up=0,
    )[0]


def ours(family: str, scheduler: str, gate: int, **kwargs: Any) -> torch.Tensor:
    pipe = tiny.make(family)
    pipe.scheduler = tiny.scheduler(scheduler)
    return tiny.latents(tgate_fx.gate(pipe, gate_step=gate), **kwargs)


@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("gate", [1, 5, STEPS - 1, STEPS])
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize(("family", "scheduler"), [(f, s) for f, names in SCHEDULERS.items() for s in names])
def test_equal_under_guidance(family: str, scheduler: str, prompts: int, gate: int) -> None:
    kwargs = {**tiny.inputs(family, prompts), "num_inference_steps": STEPS}
    assert torch.equal(ours(family, scheduler, gate, **kwargs), upstream(family, scheduler, gate, **kwargs))


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("sd", {"num_images_per_prompt": 2}),
        ("sd", {"guidance_rescale": 0.7}),
        ("sd", {"guidance_scale": 12.0, "negative_prompt": ["dog", "cat"]}),
        ("sd", {"scheduler": "EulerDiscrete", "timesteps": [900, 700, 400, 300, 100]}),
        ("sd", {"scheduler": "EulerDiscrete", "sigmas": [14.0, 8.0, 3.0, 1.0, 0.3]}),
        ("sd-2.1", {}),
        ("sdxl", {"num_images_per_prompt": 2}),
        ("sdxl", {"guidance_rescale": 0.7}),
        ("sdxl", {"clip_skip": 1}),
        ("sdxl", {"denoising_end": 0.8}),
        ("pixart-alpha", {"num_images_per_prompt": 2}),
        ("pixart-alpha-256", {}),
        ("pixart-sigma", {"num_images_per_prompt": 2}),
    ],
)
def test_equal_with_the_pipelines_other_arguments(family: str, extra: dict[str, Any]) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": STEPS, **extra}
    scheduler = kwargs.pop("scheduler", "DPMSolverMultistep" if family.startswith("pixart") else "DDIM")
    assert torch.equal(ours(family, scheduler, 3, **kwargs), upstream(family, scheduler, 3, **kwargs))


def test_each_row_keeps_its_own_size_condition() -> None:
    """SDXL with negative sizes hands over the time ids of two prompts as [neg, pos, neg, pos].

    Upstream gives every row the negative ids after the gate; here a row goes on with those it had before. With one
    prompt the two are the same.
    """
    sizes = {"negative_original_size": (8, 8), "negative_target_size": (4, 4), "num_inference_steps": STEPS}
    kwargs = {**tiny.inputs("sdxl", 1), **sizes}
    assert torch.equal(ours("sdxl", "DDIM", 3, **kwargs), upstream("sdxl", "DDIM", 3, **kwargs))
    kwargs = {**tiny.inputs("sdxl", 2), **sizes}
    expected = tiny.latents(reference.gate(tiny.make("sdxl"), 3, guided=True), **kwargs)
    assert torch.equal(ours("sdxl", "DDIM", 3, **kwargs), expected)


@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("gate", [1, 2, 3, 4])
@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("scheduler", ["LCM", "EulerDiscrete", "DDIM"])
@pytest.mark.parametrize("family", ["sdxl-lcm", "pixart-alpha-lcm"])
def test_equal_for_lcm(family: str, scheduler: str, prompts: int, gate: int) -> None:
    kwargs = {**tiny.inputs(family, prompts), "num_inference_steps": 4}
    assert torch.equal(ours(family, scheduler, gate, **kwargs), upstream(family, scheduler, gate, **kwargs))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_without_guidance_upstream_splits_the_prompts(family: str) -> None:
    """Upstream averages the halves of the batch even where it is not a guidance batch.

    One prompt then fails to unpack; of two prompts each gets the average of both. Here each prompt keeps its own.
    """
    off = {"guidance_scale": 1.0, "num_inference_steps": STEPS}
    with pytest.raises(ValueError, match="not enough values to unpack"):
        upstream(family, "DDIM", 3, **tiny.inputs(family, 1), **off)
    for prompts in (1, 2):
        kwargs = {**tiny.inputs(family, prompts), **off}
        expected = tiny.latents(reference.gate(tiny.make(family), 3, guided=False), **kwargs)
        assert torch.equal(ours(family, "DDIM", 3, **kwargs), expected)


@pytest.mark.parametrize("family", ["pixart-alpha", "pixart-sigma"])
def test_without_guidance_on_pixart(family: str) -> None:
    """Upstream's PixArt loaders have the same fault as its SD loaders."""
    kwargs = {**tiny.inputs(family, 2), "guidance_scale": 1.0, "num_inference_steps": STEPS}
    expected = tiny.latents(reference.gate(tiny.make(family), 3, guided=False), **kwargs)
    assert torch.equal(ours(family, "DPMSolverMultistep", 3, **kwargs), expected)


@pytest.mark.parametrize("gate", [1, 4])
def test_pndm_is_counted_in_evaluations(gate: int) -> None:
    """PNDM evaluates the denoiser N + 1 times in N steps; upstream counts from -1 there, tgate_fx from 0."""
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": STEPS}
    assert torch.equal(ours("sd", "PNDM", gate + 1, **kwargs), upstream("sd", "PNDM", gate, **kwargs))


def test_heun_is_counted_in_evaluations() -> None:
    """Heun evaluates the denoiser twice a step; upstream's flags and its batch disagree there."""
    pipe = tiny.sd()
    pipe.scheduler = tiny.scheduler("HeunDiscrete")
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": STEPS}
    expected = tiny.latents(reference.gate(pipe, 5, guided=True), **kwargs)
    assert torch.equal(ours("sd", "HeunDiscrete", 5, **kwargs), expected)


class HalvingProcessor(AttnProcessor2_0):
    """An attention processor of the user's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(*args, **kwargs) / 2


def test_attention_processors_are_used() -> None:
    """Upstream runs its own attention in place of whatever processor is set."""
    kwargs = {**tiny.inputs("sd", 2), "num_inference_steps": STEPS}
    pipes = [tiny.sd() for _ in range(3)]
    for pipe in pipes:
        pipe.unet.set_attn_processor(HalvingProcessor())
    got = tiny.latents(tgate_fx.gate(pipes[0], 3), **kwargs)
    assert torch.equal(got, tiny.latents(reference.gate(pipes[1], 3, guided=True), **kwargs))
    ignored = tgate.TgateSDLoader(pipes[2]).tgate(
        **kwargs,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
        gate_step=3,
        sp_interval=1,
        warm_up=0,
    )[0]
    assert not torch.equal(got, ignored)
    assert torch.equal(ignored, ours("sd", "DDIM", 3, **kwargs))


class ByName(PixArtAlphaPipeline):
    """A subclass of a user's, whose call takes any keyword."""

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        return super().__call__(prompt, **kwargs)


class AnyCall(PixArtAlphaPipeline):
    """A subclass of a user's, whose call hands everything on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("cls", [ByName, AnyCall])
def test_defaults_of_the_calls_that_a_subclass_overrides_count(cls: type[Any]) -> None:
    """PixArt's guidance is told by its call's default alone."""
    base = tiny.make("pixart-small")
    pipe = cls(**base.components)
    pipe.set_progress_bar_config(disable=True)
    inputs = {**tiny.inputs("pixart-small"), "num_inference_steps": 4}
    expected = tiny.latents(tgate_fx.gate(base, 2), **inputs)
    tgate_fx.restore(base)
    assert torch.equal(tiny.latents(tgate_fx.gate(pipe, 2), **inputs), expected)
    assert [step.batch for step in tgate_fx.report(pipe).steps] == [2, 2, 1, 1]
