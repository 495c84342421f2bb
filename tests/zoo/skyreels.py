"""SkyReels V2, whole videos and diffusion forcing."""

from __future__ import annotations

from typing import Any

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

from . import STEPS, Entry, quiet, seeded
from .wan import inputs, unipc, vae
from .wan_image_to_video import image_encoder, image_processor, picture, with_long_text


def transformer(**changes: Any) -> Any:
    return seeded(
        lambda: SkyReelsV2Transformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 16,
                "out_channels": 16,
                "text_dim": 32,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 2,
                "rope_max_seq_len": 32,
                **changes,
            }
        )
    )


def pipeline(cls: type[Any], transformer: Any, **parts: Any) -> Any:
    return quiet(cls(tokenizer=None, text_encoder=None, transformer=transformer, vae=vae(), scheduler=unipc(), **parts))


ENTRIES = [
    Entry("SkyReelsV2Pipeline", lambda: pipeline(SkyReelsV2Pipeline, transformer()), inputs, form="calls"),
    Entry(
        "SkyReelsV2ImageToVideoPipeline",
        lambda: pipeline(
            SkyReelsV2ImageToVideoPipeline,
            transformer(in_channels=36, image_dim=8, added_kv_proj_dim=24),
            image_encoder=image_encoder(),
            image_processor=image_processor(),
        ),
        lambda: with_long_text(),
        form="calls",
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
    ),
    Entry(
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: pipeline(SkyReelsV2DiffusionForcingPipeline, transformer(inject_sample_info=True)),
        lambda: inputs(prompt=None),
        form="calls",
    ),
    Entry(
        "SkyReelsV2DiffusionForcingPipeline frame after frame",
        lambda: pipeline(SkyReelsV2DiffusionForcingPipeline, transformer()),
        lambda: inputs(prompt=None, ar_step=1, causal_block_size=1),
        form="calls",
    ),
    Entry(
        "SkyReelsV2DiffusionForcingPipeline in two windows",
        lambda: pipeline(SkyReelsV2DiffusionForcingPipeline, transformer()),
        lambda: inputs(prompt=None, num_frames=13, base_num_frames=9, overlap_history=5),
        form="calls",
        loop=STEPS,
    ),
    Entry(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        lambda: pipeline(SkyReelsV2DiffusionForcingImageToVideoPipeline, transformer()),
        lambda: inputs(image=picture()),
        form="calls",
    ),
    Entry(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        lambda: pipeline(SkyReelsV2DiffusionForcingVideoToVideoPipeline, transformer()),
        lambda: inputs(
            video=[picture(seed=seed) for seed in range(9)], num_frames=13, base_num_frames=9, overlap_history=5
        ),
        form="calls",
        loop=STEPS,
    ),
]
