"""PixArt."""

from __future__ import annotations

import functools
from typing import Any

from tests.tiny import pixart, pixart_inputs

from . import STEPS, Entry, generator, seeded


def make(name: str, **changes: Any) -> Any:
    pipe = pixart(name, **changes)
    pipe.transformer = seeded(lambda: pipe.transformer)
    return pipe


def inputs() -> dict[str, Any]:
    return {
        **pixart_inputs(),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
    }


ENTRIES = [
    Entry(
        "PixArtAlphaPipeline",
        functools.partial(make, "PixArtAlphaPipeline", sample_size=128, use_additional_conditions=True),
        inputs,
        output="images",
    ),
    Entry("PixArtAlphaPipeline of 256 pixels", functools.partial(make, "PixArtAlphaPipeline"), inputs, output="images"),
    Entry("PixArtSigmaPipeline", functools.partial(make, "PixArtSigmaPipeline"), inputs, output="images"),
]
