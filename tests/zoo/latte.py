"""Latte."""

from __future__ import annotations

from typing import Any

from diffusers import LattePipeline, LatteTransformer3DModel

from tests.tiny import scheduler, vae

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 32


def make() -> Any:
    transformer = seeded(
        lambda: LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=WIDTH,
            video_length=2,
        )
    )
    return quiet(
        LattePipeline(
            tokenizer=None,
            text_encoder=None,
            vae=seeded(vae),
            transformer=transformer,
            scheduler=scheduler("DDIM"),
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "height": 16,
        "width": 16,
        "video_length": 2,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [
    Entry("LattePipeline", make, inputs),
    Entry("LattePipeline of pictures alone", make, lambda: inputs(enable_temporal_attentions=False)),
]
