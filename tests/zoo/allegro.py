"""Allegro."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro

from tests.tiny import scheduler

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 32


def make() -> Any:
    transformer = seeded(
        lambda: AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_height=4,
            sample_width=4,
            sample_frames=2,
            caption_channels=WIDTH,
        )
    )
    vae = seeded(
        lambda: AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=32
        )
    )
    return quiet(
        AllegroPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler("DDIM")
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "height": 32,
        "width": 32,
        "num_frames": 8,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [Entry("AllegroPipeline", make, inputs)]
