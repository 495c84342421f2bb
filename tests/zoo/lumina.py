"""Lumina-Next."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline

from tests.tiny import vae

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 32


def make() -> Any:
    transformer = seeded(
        lambda: LuminaNextDiT2DModel(
            sample_size=4,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=WIDTH,
        )
    )
    return quiet(
        LuminaPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=seeded(vae),
            text_encoder=None,
            tokenizer=None,
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "negative_prompt_attention_mask": torch.ones_like(mask),
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [
    # Pooled, the text also joins the embedding of the time.
    Entry("LuminaPipeline", make, inputs, form="reversed", output="images", only_cross=False),
    Entry(
        "LuminaPipeline unguided",
        make,
        lambda: inputs(guidance_scale=1.0, negative_prompt_embeds=None, negative_prompt_attention_mask=None),
        form="none",
        output="images",
        only_cross=False,
    ),
]
