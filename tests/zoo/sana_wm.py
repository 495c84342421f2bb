"""Sana-WM: a video from an image and the way of a camera."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMPipeline, SanaWMTransformer3DModel

from . import STEPS, Entry, generator, noise, quiet, seeded
from .ltx2 import CHANNELS, picture, vae

WIDTH = 16
FRAMES = 5


def pipeline() -> Any:
    transformer = seeded(
        lambda: SanaWMTransformer3DModel(
            in_channels=CHANNELS,
            num_layers=1,
            hidden_size=32,
            num_attention_heads=2,
            linear_head_dim=16,
            softmax_every_n=1,  # its linear attention takes longer to trace
            chunk_plucker_channels=12,  # six for each frame of a latent
            chunk_plucker_post_attn_blocks=1,
            caption_channels=WIDTH,
            mlp_ratio=2.0,
        )
    )
    return quiet(
        SanaWMPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )


def inputs() -> dict[str, Any]:
    way = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    way[:, 2, 3] = np.linspace(0, 0.4, FRAMES)
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "image": picture(),
        "prompt": "",
        "prompt_embeds": noise(1, 1, 8, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 1, 8, WIDTH, seed=2),
        "negative_prompt_attention_mask": torch.ones_like(mask),
        "c2w": way,
        "intrinsics": [20.0, 20.0, 16.0, 16.0],
        "height": 32,
        "width": 32,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
    }


ENTRIES = [Entry("SanaWMPipeline", pipeline, inputs)]
