"""Denoisers of sound."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import PROMPT, Architecture


def _stable_audio_inputs(rows: int) -> dict[str, Any]:
    return {
        "global_hidden_states": torch.randn(rows, 1, 1536),
        "rotary_embedding": (torch.ones(1025, 32), torch.ones(1025, 32)),
    }


def _stable_audio3_inputs(rows: int) -> dict[str, Any]:
    return {
        "global_hidden_states": torch.randn(rows, 768),
        "encoder_attention_mask": torch.ones(rows, 257, dtype=torch.bool),
    }


def _audioldm2_inputs(rows: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states_1": torch.randn(rows, PROMPT, 1024),
        "encoder_attention_mask_1": torch.ones(rows, PROMPT),
    }


def _ace_step_inputs(rows: int) -> dict[str, Any]:
    return {"timestep_r": torch.full((rows,), 500.0), "context_latents": torch.randn(rows, 1500, 128)}


def _longcat_inputs(rows: int) -> dict[str, Any]:
    return {
        "encoder_attention_mask": torch.ones(rows, PROMPT, dtype=torch.bool),
        "attention_mask": torch.ones(rows, 351, dtype=torch.bool),
        "latent_cond": torch.randn(rows, 351, 64),
    }


# The unet's config.json of cvssp/audioldm2. The first transformer of three reads no text.
_AUDIOLDM2: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (128, 256, 384, 640),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    "cross_attention_dim": ((None, 768, 1024),) * 4,
}

SOUNDS = {
    "stable-audio-open": Architecture(
        "Stable Audio Open, 47 s", "StableAudioDiTModel", {}, 130, 768, _stable_audio_inputs, latents=(64, 1024)
    ),
    "stable-audio-3": Architecture(
        "Stable Audio 3 medium, 10 s",
        "StableAudio3DiTModel",
        {},
        257,
        768,
        _stable_audio3_inputs,
        latents=(256, 108),
        guided=False,
    ),
    "audioldm2": Architecture(
        "AudioLDM 2, 10 s",
        "AudioLDM2UNet2DConditionModel",
        _AUDIOLDM2,
        8,
        768,
        _audioldm2_inputs,
        latents=(8, 256, 16),
    ),
    # A prompt and lyrics of 256 tokens.
    "ace-step": Architecture(
        "ACE-Step 1.5 base, 60 s",
        "AceStepTransformer1DModel",
        {},
        PROMPT + 256,
        2048,
        _ace_step_inputs,
        latents=(1500, 64),
    ),
    "longcat-audio": Architecture(
        "LongCat-AudioDiT 1B, 30 s",
        "LongCatAudioDiTTransformer",
        {},
        PROMPT,
        768,
        _longcat_inputs,
        latents=(351, 64),
    ),
}
