"""Wan 2.1 and 2.2."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from . import STEPS, Entry, generator, noise, quiet, seeded


def transformer(seed: int = 0, **changes: Any) -> Any:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return seeded(lambda: WanTransformer3DModel(**{**config, **changes}), seed)


def vae() -> Any:
    return seeded(
        lambda: AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )


def unipc() -> Any:
    """Wan 2.2's scheduler, whose first timestep is below 1000, so that a boundary ratio of 1 is never reached."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def text_to_video(**changes: Any) -> Any:
    parts = {"transformer": transformer(), "vae": vae(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0)}
    return quiet(WanPipeline(tokenizer=None, text_encoder=None, **{**parts, **changes}))


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 16, 32, seed=1),
        "negative_prompt_embeds": noise(1, 16, 32, seed=2),
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [
    Entry("WanPipeline", text_to_video, inputs, form="calls"),
    Entry(
        "WanPipeline 2.2 14B",
        lambda: text_to_video(transformer_2=transformer(seed=1), boundary_ratio=0.9),
        lambda: inputs(num_inference_steps=6),  # three for each of the two
        form="calls",
        denoisers=("transformer", "transformer_2"),
        graphs=4,
    ),
    Entry(
        "WanPipeline 2.2 14B low noise only",
        lambda: text_to_video(transformer=None, transformer_2=transformer(), boundary_ratio=1.0, scheduler=unipc()),
        inputs,
        form="calls",
        denoisers=("transformer_2",),
    ),
    Entry(
        "WanPipeline 2.2 14B high noise only",
        lambda: text_to_video(transformer_2=None, boundary_ratio=0.0, scheduler=unipc()),
        inputs,
        form="calls",
    ),
    Entry("WanPipeline 2.2 5B", lambda: text_to_video(expand_timesteps=True), inputs, form="calls"),
    Entry(
        "WanPipeline unguided", text_to_video, lambda: inputs(guidance_scale=1.0, negative_prompt_embeds=None), "none"
    ),
]
