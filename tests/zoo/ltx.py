"""LTX, from text, from an image, and from conditions at any frame."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

from . import STEPS, Entry, generator, noise, quiet, seeded

CHANNELS = 8
WIDTH = 32


def vae() -> Any:
    """Makes latents of half as many frames and an eighth of the size."""
    return seeded(
        lambda: AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, False, False, False),
            decoder_spatio_temporal_scaling=(True, False, False, False),
        )
    )


def pipeline(name: str) -> Any:
    transformer = seeded(
        lambda: LTXVideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=WIDTH,
        )
    )
    return quiet(
        getattr(diffusers, name)(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, 8),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def picture() -> torch.Tensor:
    return torch.rand((1, 3, 32, 32), generator=generator())


ENTRIES = [
    Entry("LTXPipeline", lambda: pipeline("LTXPipeline"), inputs),
    Entry("LTXImageToVideoPipeline", lambda: pipeline("LTXImageToVideoPipeline"), lambda: inputs(image=picture())),
    Entry("LTXConditionPipeline", lambda: pipeline("LTXConditionPipeline"), lambda: inputs(image=picture())),
    # An image elsewhere than at the first frame makes tokens of its own.
    Entry(
        "LTXConditionPipeline at another frame",
        lambda: pipeline("LTXConditionPipeline"),
        lambda: inputs(image=picture(), frame_index=4),
    ),
    Entry("LTXConditionPipeline without an image", lambda: pipeline("LTXConditionPipeline"), inputs),
]
