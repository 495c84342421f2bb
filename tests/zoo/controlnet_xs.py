"""Stable Diffusion with a ControlNet-XS: a UNet and its control in one, each with attention to the text."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetXSAdapter

from tests import tiny

from . import Entry, seeded
from .controlnet import SDXL, UNET, image, inputs, pipeline, pooled, sd

SD, XL = "StableDiffusionControlNetXSPipeline", "StableDiffusionXLControlNetXSPipeline"


def parts(**changes: Any) -> dict[str, Any]:
    """A UNet, and a control that is made for it: the pipeline makes one of both."""
    unet = seeded(lambda: tiny.unet(layers_per_block=2, **changes))
    embedding = {"conditioning_embedding_out_channels": (8, 16)}
    return {"unet": unet, "controlnet": seeded(lambda: ControlNetXSAdapter.from_unet(unet, size_ratio=1, **embedding))}


def xl() -> Any:
    return pipeline(XL, text_encoder_2=None, tokenizer_2=None, add_watermarker=False, **parts(**SDXL))


ENTRIES = [
    Entry(SD, lambda: sd(SD, **parts()), lambda: inputs(image=image()), **UNET),
    Entry(XL, xl, lambda: inputs(image=image(), **pooled()), **UNET),
]
