"""Stable Audio."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 16


def make() -> Any:
    transformer = seeded(
        lambda: StableAudioDiTModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=2 * WIDTH,
            cross_attention_input_dim=WIDTH,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how it normalises weights
        vae = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=16,
        )
    return quiet(
        StableAudioPipeline(
            vae=vae,
            text_encoder=None,
            projection_model=seeded(
                lambda: StableAudioProjectionModel(
                    text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
                )
            ),
            tokenizer=None,
            transformer=transformer,
            scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, 8, WIDTH, seed=1),
        "attention_mask": mask,
        "negative_prompt_embeds": noise(1, 8, WIDTH, seed=2),
        "negative_attention_mask": torch.ones_like(mask),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [
    Entry("StableAudioPipeline", make, inputs, output="audios"),
    Entry(
        "StableAudioPipeline without a negative prompt",
        make,
        lambda: inputs(negative_prompt_embeds=None, negative_attention_mask=None),
        output="audios",
    ),
]
