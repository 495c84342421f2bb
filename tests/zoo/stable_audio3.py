"""Stable Audio 3: from text, within a recording, and from a recording."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderSAME, FlowMatchEulerDiscreteScheduler, StableAudio3DiTModel
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 16
CHANNELS = 4


def vae() -> Any:
    """Makes a latent of 8 samples, 2 of them a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how it normalises weights
        return seeded(
            lambda: AutoencoderSAME(
                audio_channels=2,
                patch_size=4,
                encoder_channels=8,
                encoder_c_mults=[1],
                encoder_strides=[2],
                encoder_transformer_depths=[1],
                latent_dim=CHANNELS,
                dim_heads=4,
                sampling_rate=16,
            )
        )


def pipeline(name: str) -> Any:
    transformer = seeded(
        lambda: StableAudio3DiTModel(
            io_channels=CHANNELS,
            embed_dim=16,
            depth=2,
            num_heads=2,
            cond_token_dim=WIDTH,
            global_cond_dim=WIDTH,
            local_add_cond_dim=1 + CHANNELS,
            timestep_features_dim=8,
            ff_mult=2.0,
            num_memory_tokens=2,
        )
    )
    return quiet(
        getattr(diffusers, name)(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            duration_embedder=seeded(lambda: StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=8)),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "encoder_attention_mask": mask,
        "duration": 4.0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def guided() -> dict[str, Any]:
    return inputs(
        guidance_scale=4.0,
        negative_prompt_embeds=noise(1, 8, WIDTH, seed=2),
        negative_encoder_attention_mask=torch.ones(1, 8, dtype=torch.long),
    )


def recording() -> torch.Tensor:
    return noise(1, 2, 64, seed=5, scale=0.1)


ENTRIES = [
    Entry("StableAudio3Pipeline", lambda: pipeline("StableAudio3Pipeline"), guided, output="audios"),
    Entry("StableAudio3Pipeline unguided", lambda: pipeline("StableAudio3Pipeline"), inputs, "none", output="audios"),
    Entry(
        "StableAudio3InpaintPipeline",
        lambda: pipeline("StableAudio3InpaintPipeline"),
        lambda: inputs(audio=recording(), mask_start_seconds=1.0, mask_end_seconds=2.0),
        form="none",
        output="audios",
    ),
    Entry(
        "StableAudio3AudioToAudioPipeline",
        lambda: pipeline("StableAudio3AudioToAudioPipeline"),
        lambda: inputs(audio=recording(), init_noise_level=0.8),
        form="none",
        output="audios",
    ),
]
