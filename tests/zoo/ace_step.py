"""ACE-Step: songs from text and lyrics."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 16
CHANNELS = 4
HEADS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def encode_prompt(prompt: str | list[str], *, device: Any, **_: Any) -> tuple[torch.Tensor, ...]:
    """Embeds any prompts and lyrics, in place of the pipeline's own method, which takes no embeddings."""
    rows = 1 if isinstance(prompt, str) else len(prompt)
    mask = torch.ones(rows, 6, dtype=torch.long, device=device)
    text, lyrics = (noise(rows, 6, WIDTH, seed=seed).to(device) for seed in (1, 2))
    return text, mask, lyrics, mask


def make(**changes: Any) -> Any:
    transformer = seeded(
        lambda: AceStepTransformer1DModel(
            **HEADS,
            num_hidden_layers=2,
            in_channels=3 * CHANNELS,
            audio_acoustic_hidden_dim=CHANNELS,
            sliding_window=4,
            **changes,
        )
    )
    condition_encoder = seeded(
        lambda: AceStepConditionEncoder(
            **HEADS,
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=CHANNELS,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how it normalises weights
        vae = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=CHANNELS,
            sampling_rate=16,
        )
    pipe = AceStepPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        condition_encoder=condition_encoder,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )
    pipe.encode_prompt = encode_prompt
    return quiet(pipe)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "a song",
        "audio_duration": 4.0,  # 8 latents
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


ENTRIES = [
    Entry("AceStepPipeline", make, inputs, form="reversed", output="audios"),
    Entry("AceStepPipeline turbo", lambda: make(is_turbo=True), inputs, form="none", output="audios"),
]
