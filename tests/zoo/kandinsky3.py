"""Kandinsky 3: its cross-attentions are told from its self-attentions by their place in a block only."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DDPMScheduler, Kandinsky3UNet, VQModel

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 24


def pipeline(name: str) -> Any:
    unet = seeded(
        lambda: Kandinsky3UNet(
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 16),
            cross_attention_dim=16,
            encoder_hid_dim=WIDTH,
        )
    )
    movq = seeded(
        lambda: VQModel(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            num_vq_embeddings=8,
        )
    )
    return quiet(
        getattr(diffusers, name)(
            tokenizer=None,
            text_encoder=None,
            unet=unet,
            scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
            movq=movq,
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 12, WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, 12, WIDTH, seed=2),
        "attention_mask": (noise(1, 12) < 1).long(),
        "negative_attention_mask": (noise(1, 12, seed=5) < 1).long(),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


# Text reaches the embedding of the time, too.
UNET: dict[str, Any] = {"latents": "sample", "output": "images", "denoisers": ("unet",), "only_cross": False}

ENTRIES = [
    Entry(
        "Kandinsky3Pipeline",
        lambda: pipeline("Kandinsky3Pipeline"),
        lambda: inputs(height=64, width=64),
        **UNET,
    ),
    Entry(
        "Kandinsky3Img2ImgPipeline",
        lambda: pipeline("Kandinsky3Img2ImgPipeline"),
        lambda: inputs(image=noise(1, 3, 16, 16, seed=6).sigmoid(), strength=1.0),
        **UNET,
    ),
]
