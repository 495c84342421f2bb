"""The models that can be timed: how each one's pipeline is put together and called, and who cannot take part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..macs.architecture import Architecture

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIDES = ("prompt", "negative_prompt")

# Makes a random tensor of a shape, on the device and of the dtype of a run.
Embedding = Callable[..., torch.Tensor]


def _nothing_more(embedding: Embedding, architecture: Architecture) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Model:
    """How one model is run.

    Attributes:
        pipeline: puts the pipeline around the denoiser, without what runs once an image only: text encoder and VAE.
        inputs: what the pipeline's call needs besides embedded prompts and the size.
        batch: the keyword of its call for how many images there are of a prompt.
        without: who does not take part, by a part of their names.
    """

    pipeline: Callable[[nn.Module], Any]
    inputs: Callable[[Embedding, Architecture], dict[str, Any]] = _nothing_more
    batch: str = "num_images_per_prompt"
    without: tuple[str, ...] = ()


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


def _sdxl_inputs(embedding: Embedding, architecture: Architecture) -> dict[str, Any]:
    return {f"{side}_embeds": embedding(1, 1280) for side in ("pooled_prompt", "negative_pooled_prompt")}


def _pixart(transformer: nn.Module) -> Any:
    scheduler = _made("DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02)
    return _made(
        "PixArtAlphaPipeline", tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )


def _pixart_inputs(embedding: Embedding, architecture: Architecture) -> dict[str, Any]:
    mask = torch.ones_like(embedding(1, architecture.tokens), dtype=torch.float32)
    masks = {f"{side}_attention_mask": mask for side in SIDES}
    return {**masks, "use_resolution_binning": False, "negative_prompt": None}


def _wan(transformer: nn.Module) -> Any:
    scheduler = _made(
        "UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _made(
        "WanPipeline", tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )


def _wan_inputs(embedding: Embedding, architecture: Architecture) -> dict[str, Any]:
    assert architecture.latents is not None
    return {"num_frames": 4 * (architecture.latents[1] - 1) + 1}


_UNETS_ONLY = ("cutoff", "deepcache")  # diffusers' callbacks, and deep branches

MODELS: dict[str, Model] = {
    "demo": Model(_sd),
    "sd15": Model(_sd),
    "sd21": Model(_sd),
    "sdxl": Model(_sdxl, _sdxl_inputs),
    "pixart-alpha": Model(_pixart, _pixart_inputs, without=_UNETS_ONLY),
    # Upstream `tgate` has no loader for it.
    "wan-1.3b": Model(_wan, _wan_inputs, "num_videos_per_prompt", without=(*_UNETS_ONLY, "tgate")),
}
