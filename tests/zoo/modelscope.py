"""ModelScope's text-to-video and I2VGen-XL: UNets with attention over frames between the blocks."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy
import PIL.Image
import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded
from .sd_variants import image_encoder

WIDTH = tiny.TEXT_WIDTH


def unet(cls: Any) -> Any:
    return seeded(
        lambda: cls(
            block_out_channels=(32,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock3D",),
            up_block_types=("UpBlock3D",),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )


def pipeline(name: str, unet_class: Any = UNet3DConditionModel, **changes: Any) -> Any:
    return quiet(
        getattr(diffusers, name)(
            vae=seeded(tiny.vae),
            text_encoder=None,
            tokenizer=None,
            unet=unet(unet_class),
            scheduler=tiny.scheduler(),
            **changes,
        )
    )


def i2vgen() -> Any:
    return pipeline(
        "I2VGenXLPipeline",
        I2VGenXLUNet,
        image_encoder=image_encoder(),
        feature_extractor=tiny.image_processor(16),
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 12, WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, 12, WIDTH, seed=2),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def with_image() -> dict[str, Any]:
    torch.manual_seed(0)  # the pipeline encodes the image without its generator
    pixels = (noise(16, 16, 3, seed=5).sigmoid() * 255).numpy().astype(numpy.uint8)
    return inputs(image=PIL.Image.fromarray(pixels), num_frames=2, height=16, width=16)


UNET: dict[str, Any] = {"latents": "sample", "denoisers": ("unet",)}

ENTRIES = [
    Entry(
        "TextToVideoSDPipeline",
        lambda: pipeline("TextToVideoSDPipeline"),
        lambda: inputs(num_frames=2, height=16, width=16),
        **UNET,
    ),
    Entry(
        "VideoToVideoSDPipeline",
        lambda: pipeline("VideoToVideoSDPipeline"),
        lambda: inputs(video=[noise(2, 3, 16, 16, seed=5).sigmoid()], strength=1.0),
        **UNET,
    ),
    Entry("I2VGenXLPipeline", i2vgen, with_image, **UNET),
]
