"""Guidance by more than a text and its absence, with a chunk of the batch for each."""

from __future__ import annotations

from typing import Any

import torch

from tests import tiny

from . import Entry, seeded
from .controlnet import SDXL, image, inputs, pipeline, pooled, sd
from .pag import WHOLE
from .sd_variants import unet, worded


def with_words(name: str) -> Any:
    return sd(name, tokenizer=tiny.tokenizer(), text_encoder=seeded(tiny.text_encoder))


def safe() -> Any:
    """It can only give images, so that it is made to take latents for these."""
    pipe = with_words("StableDiffusionPipelineSafe")
    pipe.decode_latents = torch.Tensor.numpy
    return pipe


def edited_by_text() -> Any:
    return sd("StableDiffusionInstructPix2PixPipeline", unet=unet(in_channels=8))


def edited_by_text_xl() -> Any:
    return pipeline(
        "StableDiffusionXLInstructPix2PixPipeline",
        unet=unet(in_channels=8, **SDXL),
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def to_edit(**changes: Any) -> dict[str, Any]:
    return inputs(image=image(), image_guidance_scale=2.0, **changes)


def safely() -> dict[str, Any]:
    """It is safe from the second step on, by much, so that the text shows."""
    return worded(
        height=16, width=16, guidance_scale=15.0, sld_guidance_scale=5000, sld_warmup_steps=1, output_type="np"
    )


def with_edits() -> dict[str, Any]:
    """Two edits, from the second step on, to a half of what the picture has."""
    return worded(height=16, width=16, editing_prompt=["dogs", "red"], edit_warmup_steps=1, edit_threshold=0.5)


ENTRIES = [
    Entry("StableDiffusionInstructPix2PixPipeline", edited_by_text, to_edit, **WHOLE),
    Entry(
        "StableDiffusionXLInstructPix2PixPipeline",
        edited_by_text_xl,
        lambda: to_edit(height=16, width=16, **pooled()),
        **WHOLE,
    ),
    Entry("StableDiffusionPipelineSafe", safe, safely, **WHOLE),
    Entry(
        "SemanticStableDiffusionPipeline", lambda: with_words("SemanticStableDiffusionPipeline"), with_edits, **WHOLE
    ),
]
