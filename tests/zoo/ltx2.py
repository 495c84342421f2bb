"""LTX 2 and 2.3, videos with sound: without the guidance that takes calls of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from PIL import Image

from . import STEPS, Entry, generator, noise, quiet, seeded

CHANNELS = 8
WIDTH = 16
FACTOR = 2  # layers of the text encoder, whose states come side by side
TOKENS = 8


def vae() -> Any:
    """Makes latents of half as many frames and an eighth of the size."""
    return seeded(
        lambda: AutoencoderKLLTX2Video(
            latent_channels=CHANNELS,
            block_out_channels=(8,),
            down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,),
            layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatiotemporal",),
            upsample_type=("spatiotemporal",),
            upsample_residual=(False,),
            upsample_factor=(1,),
        )
    )


def audio_vae() -> Any:
    """Makes latents of 2 channels and 2 bins."""
    return seeded(lambda: AutoencoderKLLTX2Audio(base_channels=4, ch_mult=(1,), latent_channels=2, mel_bins=8))


def pipeline(name: str, config: Mapping[str, Any] = MappingProxyType({}), newer: bool = False, **parts: Any) -> Any:
    transformer = seeded(
        lambda: LTX2VideoTransformer3DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            vae_scale_factors=(2, 8, 8),
            num_layers=1,
            caption_channels=WIDTH,
            **config,
        )
    )
    own_widths = {"per_modality_projections": True, "video_hidden_dim": 24, "audio_hidden_dim": 16}
    connectors = seeded(
        lambda: LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=FACTOR,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=12 if newer else 8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=4,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=4,
            **(own_widths if newer else {}),
        )
    )
    return quiet(
        getattr(diffusers, name)(
            **{
                "scheduler": FlowMatchEulerDiscreteScheduler(),
                "vae": vae(),
                "audio_vae": audio_vae(),
                "text_encoder": None,
                "tokenizer": None,
                "connectors": connectors,
                "transformer": transformer,
                "vocoder": None,
                **parts,
            }
        )
    )


def newer() -> Any:
    """LTX 2.3, in whose blocks the text is scaled by the step's sigma."""
    return pipeline(
        "LTX2Pipeline",
        {
            "gated_attn": True,
            "cross_attn_mod": True,
            "audio_gated_attn": True,
            "audio_cross_attn_mod": True,
            "use_prompt_embeddings": False,
            "perturbed_attn": True,
        },
        newer=True,
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, :2] = 0
    return {
        "prompt_embeds": noise(1, TOKENS, WIDTH * FACTOR, seed=1),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(1, TOKENS, WIDTH * FACTOR, seed=2),
        "negative_prompt_attention_mask": torch.ones_like(mask),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "audio_guidance_scale": 5.0,
        "stg_scale": 0.0,
        "audio_stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_modality_scale": 1.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def picture() -> Image.Image:
    pixels = torch.randint(256, (32, 32, 3), generator=generator(), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


BOTH: dict[str, Any] = {
    "text": ("encoder_hidden_states", "audio_encoder_hidden_states"),
    "latents": ("hidden_states", "audio_hidden_states"),
}

ENTRIES = [
    Entry("LTX2Pipeline", lambda: pipeline("LTX2Pipeline"), inputs, **BOTH),
    Entry("LTX2Pipeline sound", lambda: pipeline("LTX2Pipeline"), inputs, output="audio", **BOTH),
    Entry("LTX2Pipeline 2.3", newer, inputs, **BOTH),
    Entry(
        "LTX2ImageToVideoPipeline",
        lambda: pipeline("LTX2ImageToVideoPipeline"),
        lambda: inputs(image=picture(), image_crf=0),
        **BOTH,
    ),
    Entry(
        "LTX2ConditionPipeline",
        lambda: pipeline("LTX2ConditionPipeline"),
        lambda: inputs(conditions=[LTX2VideoCondition(frames=picture(), index=0, strength=1.0, crf=0)]),
        **BOTH,
    ),
]
