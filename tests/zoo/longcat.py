"""LongCat's sound from text."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import LongCatAudioDiTPipeline, LongCatAudioDiTTransformer, LongCatAudioDiTVae

from . import STEPS, Entry, noise, quiet, seeded

_CHANNELS = 8
_TOKENS = {"a": 8, "b": 5}


def encode_prompt(prompt: list[str], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeds prompts of one letter, in place of the pipeline's own method, which takes no embeddings."""
    tokens = [_TOKENS[text] for text in prompt]
    embeds = torch.cat([noise(1, max(tokens), 32, seed=count) for count in tokens])
    return embeds.to(device), torch.tensor(tokens, device=device)


def make(**changes: Any) -> Any:
    transformer = seeded(
        lambda: LongCatAudioDiTTransformer(
            dit_dim=24, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=_CHANNELS, ff_mult=2.0, **changes
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about how it normalises weights
        vae = LongCatAudioDiTVae(
            channels=8, c_mults=[1, 2], strides=[2], latent_dim=_CHANNELS, encoder_latent_dim=16, downsampling_ratio=2
        )
    pipe = LongCatAudioDiTPipeline(vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    pipe.encode_prompt = encode_prompt
    return quiet(pipe)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "a",
        "latents": noise(1, 12, _CHANNELS, seed=5),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        **changes,
    }


ENTRIES = [
    # The mean of the text enters every block beside cross-attention.
    Entry("LongCatAudioDiTPipeline", make, inputs, form="calls", output="audios", only_cross=False),
    Entry(
        "LongCatAudioDiTPipeline with prompts of two lengths",
        lambda: make(adaln_use_text_cond=False),
        lambda: inputs(negative_prompt="b"),
        form="calls",
        output="audios",
        graphs=3,  # before the gate one for each length
    ),
    Entry(
        "LongCatAudioDiTPipeline unguided",
        make,
        lambda: inputs(guidance_scale=1.0),
        form="none",
        output="audios",
        only_cross=False,
    ),
]
