"""Wan 2.1 and 2.2 from an image."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.tiny import IMAGE_PROCESSOR

from . import Entry, noise, quiet, seeded
from .wan import inputs, transformer, vae

# The latents, a mask of four channels and the image's latents.
_CHANNELS = {"in_channels": 36, "out_channels": 16}
_IMAGE_DIM = 8
_WITH_IMAGE = {**_CHANNELS, "image_dim": _IMAGE_DIM, "added_kv_proj_dim": 24}


def image_encoder() -> Any:
    """Embeds each image into 257 tokens; the pipelines take no image together with its embedding."""
    config = CLIPVisionConfig(
        hidden_size=_IMAGE_DIM,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=2,
    )
    return seeded(lambda: CLIPVisionModel(config))


def image_processor() -> Any:
    return IMAGE_PROCESSOR(size=32, crop_size=32)


def image_to_video(**changes: Any) -> Any:
    encoder = {"image_encoder": image_encoder(), "image_processor": image_processor()}
    parts = {**encoder, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": vae(), **changes}
    return quiet(WanImageToVideoPipeline(tokenizer=None, text_encoder=None, **parts))


def picture(size: int = 16, seed: int = 5) -> Image.Image:
    pixels = noise(size, size, 3, seed=seed).clamp(0, 1) * 255
    return Image.fromarray(pixels.numpy().astype(np.uint8))


def with_long_text(**changes: Any) -> dict[str, Any]:
    """Models that are given an embedded image beside the text expect 512 tokens of text."""
    return inputs(
        image=picture(),
        prompt_embeds=noise(1, 512, 32, seed=1),
        negative_prompt_embeds=noise(1, 512, 32, seed=2),
        **changes,
    )


_BOTH = ("encoder_hidden_states", "encoder_hidden_states_image")

ENTRIES = [
    Entry(
        "WanImageToVideoPipeline 2.1",
        lambda: image_to_video(transformer=transformer(**_WITH_IMAGE)),
        with_long_text,
        form="calls",
        text=_BOTH,
    ),
    Entry(
        "WanImageToVideoPipeline 2.1 first and last image",
        lambda: image_to_video(transformer=transformer(**_WITH_IMAGE, pos_embed_seq_len=2 * 257)),
        lambda: with_long_text(last_image=picture(seed=6)),
        form="calls",
        text=_BOTH,
    ),
    Entry(
        "WanImageToVideoPipeline 2.2 5B",
        lambda: image_to_video(transformer=transformer(), expand_timesteps=True),
        lambda: inputs(image=picture()),
        form="calls",
    ),
    Entry(
        "WanImageToVideoPipeline 2.2 14B",
        lambda: image_to_video(
            transformer=transformer(**_CHANNELS), transformer_2=transformer(seed=1, **_CHANNELS), boundary_ratio=0.75
        ),
        lambda: inputs(image=picture(), num_inference_steps=6),  # three for each of the two
        form="calls",
        denoisers=("transformer", "transformer_2"),
        graphs=4,
    ),
]
