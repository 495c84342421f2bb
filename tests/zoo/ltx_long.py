"""LTX for long videos: a loop of its own for each window of frames, with a prompt of its own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXEulerAncestralRFScheduler
from transformers import BatchEncoding, T5Config, T5EncoderModel

from . import STEPS, Entry, generator, seeded
from .ltx import WIDTH, pipeline


class Letters:
    """A tokenizer of single letters, padded at the end."""

    def __call__(self, text: list[str], **_: Any) -> BatchEncoding:
        ids = [[ord(letter) % 64 for letter in each.ljust(12)] for each in text]
        mask = [[int(letter < len(each)) for letter in range(12)] for each in text]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


def windows() -> Any:
    pipe = pipeline("LTXI2VLongMultiPromptPipeline")
    config = T5Config(vocab_size=64, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe.register_modules(
        text_encoder=seeded(lambda: T5EncoderModel(config)),
        tokenizer=Letters(),
        scheduler=LTXEulerAncestralRFScheduler(),
    )
    return pipe


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "a red cat|a blue dog",
        "negative_prompt": "dogs",
        "height": 32,
        "width": 32,
        "num_frames": 11,
        "temporal_tile_size": 8,
        "temporal_overlap": 4,
        "num_inference_steps": STEPS + 1,  # the last of its timesteps is not run
        "seed": None,
        "generator": generator(),
        **changes,
    }


# The second window has the end of the first one before it, and so a size and two graphs of its own.
ENTRIES = [
    Entry("LTXI2VLongMultiPromptPipeline", windows, inputs, form="none", loop=STEPS, graphs=4),
    Entry("LTXI2VLongMultiPromptPipeline guided", windows, lambda: inputs(guidance_scale=4.0), loop=STEPS, graphs=4),
]
