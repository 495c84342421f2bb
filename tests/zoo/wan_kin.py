"""Models made from Wan: ChronoEdit, Lucy Edit, Helios."""

from __future__ import annotations

import warnings
from typing import Any

from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LucyEditPipeline,
)

from . import STEPS, Entry, quiet, seeded
from .wan import inputs, transformer, unipc, vae
from .wan_image_to_video import image_encoder, image_processor, picture, with_long_text

_CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}


def pipeline(cls: type[Any], **parts: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return quiet(cls(**{"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": scheduler, **parts}))


def chronoedit(**parts: Any) -> Any:
    return pipeline(
        ChronoEditPipeline,
        transformer=seeded(
            lambda: ChronoEditTransformer3DModel(
                in_channels=36, image_dim=8, added_kv_proj_dim=24, rope_max_seq_len=32, **_CONFIG
            )
        ),
        image_encoder=image_encoder(),
        image_processor=image_processor(),
        **parts,
    )


def helios(cls: type[Any] = HeliosPipeline, stage_range: tuple[float, ...] = (0, 1)) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it gives numpy tensors
        scheduler = HeliosScheduler(stages=len(stage_range) - 1, stage_range=list(stage_range), gamma=0.3)
    return pipeline(
        cls,
        transformer=seeded(lambda: HeliosTransformer3DModel(in_channels=16, rope_dim=(4, 4, 4), **_CONFIG)),
        scheduler=scheduler,
    )


def lucy_inputs() -> dict[str, Any]:
    return inputs(video=[picture(seed=seed) for seed in range(5)])


def pyramid_inputs(stages: int, **changes: Any) -> dict[str, Any]:
    given = inputs(num_frames=9, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1], **changes)
    given["pyramid_num_inference_steps_list"] = [given.pop("num_inference_steps")] * stages
    return given


ENTRIES = [
    Entry(
        "ChronoEditPipeline",
        chronoedit,
        lambda: with_long_text(),
        form="calls",
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    Entry(
        "ChronoEditPipeline with temporal reasoning before the gate",
        lambda: chronoedit(scheduler=unipc()),
        # After the first step only the first and the last frame go on.
        lambda: with_long_text(num_frames=13, enable_temporal_reasoning=True, num_temporal_reasoning_steps=1),
        form="calls",
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
        graphs=3,  # before the gate one for each number of frames
    ),
    Entry(
        "LucyEditPipeline",
        lambda: pipeline(LucyEditPipeline, transformer=transformer(in_channels=32)),
        lucy_inputs,
        form="calls",
    ),
    Entry(
        "HeliosPipeline",
        helios,
        lambda: inputs(num_frames=9, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1]),
        form="calls",
    ),
    Entry(
        "HeliosPipeline in two chunks",
        helios,
        lambda: inputs(num_frames=18, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1]),
        form="calls",
        loop=STEPS,
    ),
    Entry(
        "HeliosPyramidPipeline of one stage",
        lambda: helios(HeliosPyramidPipeline),
        lambda: pyramid_inputs(1),
        form="calls",
        graphs=3,  # the first step's latents have other strides in their dimension of one row
    ),
    # Each stage is a loop, with latents of twice the size.
    Entry(
        "HeliosPyramidPipeline of two stages",
        lambda: helios(HeliosPyramidPipeline, (0, 0.5, 1)),
        lambda: pyramid_inputs(2, height=32, width=32),
        form="calls",
        loop=STEPS,
        graphs=4,
    ),
]
