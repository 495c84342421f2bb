"""Sana's videos."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler, SanaVideoTransformer3DModel

from . import Entry, quiet, seeded
from .sana import CONFIG, negative, picture
from .sana import inputs as image_inputs
from .wan import vae


def pipeline(name: str) -> Any:
    changes = {"in_channels": 16, "out_channels": 16, "attention_head_dim": 12, "sample_size": 30}
    changes |= {"cross_attention_dim": 24, "cross_attention_head_dim": 12}
    return quiet(
        getattr(diffusers, name)(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=seeded(
                lambda: SanaVideoTransformer3DModel(**{**CONFIG, **changes}, patch_size=(1, 2, 2), rope_max_seq_len=32)
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return image_inputs(**negative(), frames=5, **changes)


ENTRIES = [
    Entry("SanaVideoPipeline", lambda: pipeline("SanaVideoPipeline"), inputs),
    # The first frame, which is the image, has a timestep of its own.
    Entry("SanaImageToVideoPipeline", lambda: pipeline("SanaImageToVideoPipeline"), lambda: inputs(image=picture())),
]
