"""Kandinsky 5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2IPipeline,
    Kandinsky5I2VPipeline,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from . import STEPS, Entry, generator, noise, quiet, seeded
from .wan_image_to_video import picture

_SIZE = 32


def transformer(**changes: Any) -> Any:
    return seeded(
        lambda: Kandinsky5Transformer3DModel(
            **{
                "in_visual_dim": 4,
                "out_visual_dim": 4,
                "in_text_dim": 32,
                "in_text_dim2": 16,
                "time_dim": 16,
                "model_dim": 24,
                "ff_dim": 32,
                "num_text_blocks": 1,
                "num_visual_blocks": 2,
                "axes_dims": (4, 4, 4),
                **changes,
            }
        )
    )


def video_vae() -> Any:
    return seeded(
        lambda: AutoencoderKLHunyuanVideo(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4
        )
    )


def image_vae() -> Any:
    return seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
    )


def pipeline(cls: type[Any], vae: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    parts = {"tokenizer": None, "text_encoder": None, "tokenizer_2": None, "text_encoder_2": None}
    model = transformer(**changes).to(dtype)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in model._keep_in_fp32_modules:
            module.float()
    pipe = cls(transformer=model, vae=vae.to(dtype), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **parts)
    if hasattr(pipe, "resolutions"):
        pipe.resolutions = [(_SIZE, _SIZE)]  # of images, which are made of no other size
    return quiet(pipe)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds_qwen": noise(1, 8, 32, seed=1),
        "prompt_embeds_clip": noise(1, 16, seed=2),
        "prompt_cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
        "negative_prompt_embeds_qwen": noise(1, 8, 32, seed=3),
        "negative_prompt_embeds_clip": noise(1, 16, seed=4),
        "negative_prompt_cu_seqlens": torch.tensor([0, 8], dtype=torch.int32),
        "height": _SIZE,
        "width": _SIZE,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def shorter_negative() -> dict[str, Any]:
    return inputs(
        num_frames=5,
        negative_prompt_embeds_qwen=noise(1, 5, 32, seed=3),
        negative_prompt_cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
    )


ENTRIES = [
    Entry(
        "Kandinsky5T2VPipeline",
        lambda: pipeline(Kandinsky5T2VPipeline, video_vae()),
        lambda: inputs(num_frames=5),
        form="calls",
    ),
    Entry(
        "Kandinsky5T2VPipeline with prompts of two lengths",
        lambda: pipeline(Kandinsky5T2VPipeline, video_vae()),
        shorter_negative,
        form="calls",
        graphs=3,  # before the gate one for each length
    ),
    Entry(
        "Kandinsky5I2VPipeline",
        lambda: pipeline(Kandinsky5I2VPipeline, video_vae(), visual_cond=True),
        lambda: inputs(num_frames=17, image=picture(_SIZE)),
        form="calls",
    ),
    Entry(
        "Kandinsky5T2IPipeline",
        lambda: pipeline(Kandinsky5T2IPipeline, image_vae()),
        inputs,
        form="calls",
        output="image",
    ),
    Entry(
        "Kandinsky5I2IPipeline",
        lambda: pipeline(Kandinsky5I2IPipeline, image_vae(), visual_cond=True),
        lambda: inputs(image=picture(_SIZE)),
        form="calls",
        output="image",
    ),
    Entry(
        "Kandinsky5T2VPipeline unguided",
        lambda: pipeline(Kandinsky5T2VPipeline, video_vae()),
        lambda: inputs(num_frames=5, guidance_scale=1.0),
        form="none",
    ),
]
