"""Pipelines that diffusers keeps but no longer develops, with the UNet of Stable Diffusion."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers.pipelines.deprecated.alt_diffusion import AltDiffusionImg2ImgPipeline, AltDiffusionPipeline
from diffusers.pipelines.deprecated.stable_diffusion_diffedit import StableDiffusionDiffEditPipeline
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_inpaint_legacy import (
    StableDiffusionInpaintPipelineLegacy,
)
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_model_editing import (
    StableDiffusionModelEditingPipeline,
)

from tests import tiny

from . import STEPS, Entry, noise, quiet, seeded
from .controlnet import UNET, image, inputs
from .sd_variants import unet


def pipeline(cls: type[Any], **changes: Any) -> Any:
    parts = {
        "vae": seeded(tiny.vae),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet(),
        "scheduler": tiny.scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the class is deprecated
        return quiet(cls(**{**parts, **changes}))


def mask() -> torch.Tensor:
    return (noise(1, 1, 16, 16, seed=7) > 0).float()


def edited() -> dict[str, Any]:
    """The image as it was at each step, which its inversion gives."""
    at_each_step = torch.stack([noise(4, 8, 8, seed=20 + step) for step in range(STEPS)])[None]
    where = (noise(1, 8, 8, seed=7) > 0).float()
    return inputs(mask_image=where, image_latents=at_each_step, inpaint_strength=1.0)


ENTRIES = [
    Entry(
        "StableDiffusionInpaintPipelineLegacy",
        lambda: pipeline(StableDiffusionInpaintPipelineLegacy),
        lambda: inputs(image=image(6) * 2 - 1, mask_image=mask(), strength=1.0),
        **UNET,
    ),
    Entry(
        "StableDiffusionModelEditingPipeline",
        lambda: pipeline(StableDiffusionModelEditingPipeline),
        lambda: inputs(height=16, width=16),
        **UNET,
    ),
    Entry("AltDiffusionPipeline", lambda: pipeline(AltDiffusionPipeline), lambda: inputs(height=16, width=16), **UNET),
    Entry(
        "AltDiffusionImg2ImgPipeline",
        lambda: pipeline(AltDiffusionImg2ImgPipeline),
        lambda: inputs(image=image(6), strength=1.0),
        **UNET,
    ),
    Entry("StableDiffusionDiffEditPipeline", lambda: pipeline(StableDiffusionDiffEditPipeline), edited, **UNET),
]
