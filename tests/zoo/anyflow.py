"""AnyFlow, made from Wan: each step is told where it is to arrive."""

from __future__ import annotations

from typing import Any

from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from . import Entry, noise, quiet, seeded
from .wan import inputs, vae


def make() -> Any:
    transformer = seeded(
        lambda: AnyFlowTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
    )
    return quiet(
        AnyFlowPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=transformer,
            vae=vae(),
            scheduler=FlowMapEulerDiscreteScheduler(shift=5.0),
        )
    )


ENTRIES = [
    Entry("AnyFlowPipeline", make, inputs),
    Entry("AnyFlowPipeline from frames", make, lambda: inputs(video_latents=noise(1, 1, 16, 2, 2, seed=5))),
    Entry(
        "AnyFlowPipeline unguided", make, lambda: inputs(guidance_scale=1.0, negative_prompt_embeds=None), form="none"
    ),
]
