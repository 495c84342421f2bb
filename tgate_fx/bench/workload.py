"""What every contender is given: one model with the same random weights, the same inputs, the same steps."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..macs.architectures import ARCHITECTURES

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _made(name: str, **parts: Any) -> Any:
    """Return an object of one of diffusers' classes, which takes time to import and has no types."""
    return getattr(importlib.import_module("diffusers"), name)(**parts)


def _sd(unet: nn.Module) -> Any:
    scheduler = _made("DDIMScheduler", **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return _made(
        "StableDiffusionPipeline",
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(unet: nn.Module) -> Any:
    return _made(
        "StableDiffusionXLPipeline",
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=_made("EulerDiscreteScheduler", **_BETAS, steps_offset=1),
        add_watermarker=False,
    )


def _pixart(transformer: nn.Module) -> Any:
    scheduler = _made("DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02)
    return _made(
        "PixArtAlphaPipeline", tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )


# How each model's pipeline is put together, without what runs once an image only: text encoder and VAE.
PIPELINES: dict[str, Callable[[nn.Module], Any]] = {
    "demo": _sd,
    "sd15": _sd,
    "sd21": _sd,
    "sdxl": _sdxl,
    "pixart-alpha": _pixart,
}


@dataclass(frozen=True)
class Workload:
    """One model and how it is run.

    Attributes:
        arch: a name in `PIPELINES`.
        size: latents per side.
        steps: of an image.
        gates: the gate steps that gated contenders are timed with.
        dtype: of weights and latents, such as "float32".
        device: "cpu" or "cuda", where the weights of UNets are channels last, as diffusers advises.
        batch: images of a call.
    """

    arch: str
    size: int
    steps: int
    gates: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    batch: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def save_denoiser(self, path: Path) -> float:
        """Write a denoiser with random weights to a file; how many GiB it takes."""
        torch.manual_seed(0)
        # nn.Module's own, since diffusers' warns of modules that are better kept in float32 even if there are none.
        torch.save(nn.Module.to(ARCHITECTURES[self.arch].build("cpu"), self.torch_dtype), path)
        return path.stat().st_size / 2**30

    def pipeline(self, denoiser: Path) -> Any:
        """Return the pipeline around a denoiser that `save_denoiser` wrote, ready to be called with `inputs`."""
        # The file is this run's own. Mapped, its weights are in memory once for all processes.
        module: nn.Module = torch.load(denoiser, mmap=True, weights_only=False)
        if self.device == "cuda":
            module = nn.Module.to(module, self.device)
            if hasattr(module, "down_blocks"):
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pipe = PIPELINES[self.arch](module)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call: embedded prompts and the image's size."""
        architecture = ARCHITECTURES[self.arch]
        noise = torch.Generator().manual_seed(1)

        def embedding(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=noise).to(self.device, self.torch_dtype)

        sides = ("prompt", "negative_prompt")
        text = {f"{side}_embeds": embedding(1, architecture.tokens, architecture.text_width) for side in sides}
        if self.arch == "sdxl":
            text |= {f"{side}_embeds": embedding(1, 1280) for side in ("pooled_prompt", "negative_pooled_prompt")}
        more: dict[str, Any] = {}
        if self.arch == "pixart-alpha":
            mask = torch.ones(1, architecture.tokens, device=self.device)
            more = {f"{side}_attention_mask": mask for side in sides}
            more |= {"use_resolution_binning": False, "negative_prompt": None}
        return {**text, **more, "height": 8 * self.size, "width": 8 * self.size}

    def latents(self, call: Callable[..., Any], steps: int, *, seed: int = 0, **more: Any) -> torch.Tensor:
        """Return the latents that a call of a pipeline ends with, given `inputs` and ``more``."""
        result = call(
            **self.inputs,
            num_inference_steps=steps,
            num_images_per_prompt=self.batch,
            generator=torch.Generator(self.device).manual_seed(seed),
            output_type="latent",
            return_dict=False,
            **more,
        )
        latents: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
        return latents
