"""Sana, its distilled Sprint, and its ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 32

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": WIDTH,
    "sample_size": 32,
}


def vae() -> Any:
    return seeded(
        lambda: AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        )
    )


def pipeline(name: str, scheduler: Any = None, *, changes: dict[str, Any] | None = None, **parts: Any) -> Any:
    return quiet(
        getattr(diffusers, name)(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=seeded(lambda: SanaTransformer2DModel(**{**CONFIG, **(changes or {})})),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
            **parts,
        )
    )


def sprint(name: str) -> Any:
    changes = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return pipeline(name, SCMScheduler(prediction_type="trigflow", sigma_data=0.5), changes=changes)


def with_controlnet() -> Any:
    config = {name: value for name, value in CONFIG.items() if name != "num_layers"}
    return pipeline(
        "SanaControlNetPipeline", controlnet=seeded(lambda: SanaControlNetModel(**config, num_layers=1), seed=1)
    )


def negative() -> dict[str, Any]:
    return {
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, 8),
    }


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def picture() -> torch.Tensor:
    return torch.rand((1, 3, 32, 32), generator=generator())


ENTRIES = [
    Entry("SanaPipeline", lambda: pipeline("SanaPipeline"), lambda: inputs(**negative()), output="images"),
    Entry(
        "SanaSprintPipeline",
        lambda: sprint("SanaSprintPipeline"),
        lambda: inputs(intermediate_timesteps=None),
        form="none",
        output="images",
    ),
    Entry(
        "SanaSprintImg2ImgPipeline",
        lambda: sprint("SanaSprintImg2ImgPipeline"),
        lambda: inputs(intermediate_timesteps=None, image=picture(), strength=0.8, num_inference_steps=5),
        form="none",
        output="images",
    ),
    Entry(
        "SanaControlNetPipeline",
        with_controlnet,
        lambda: inputs(**negative(), control_image=picture()),
        output="images",
        companions=("controlnet",),
        graphs=4,
    ),
]
