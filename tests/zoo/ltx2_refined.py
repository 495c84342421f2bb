"""LTX 2 with keyframes that are generated beside the video, from references, and in high dynamic range."""

from __future__ import annotations

from typing import Any

from diffusers import LTXEulerAncestralRFScheduler
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from . import STEPS, Entry, noise, seeded
from .ltx2 import BOTH, CHANNELS, inputs, picture, pipeline

SIGMAS = [1.0, 0.9, 0.7, 0.4]


def keyframes(name: str, **parts: Any) -> Any:
    return pipeline(name, {"use_keyframes_abs_pos_embedding": True}, **parts)


def refine() -> Any:
    upsampler = seeded(
        lambda: LTX2LatentUpsamplerModel(
            in_channels=CHANNELS,
            mid_channels=32,
            num_blocks_per_stage=1,
            spatial_upsample=False,
            temporal_upsample=True,
            use_rational_resampler=False,
        )
    )
    return keyframes(
        "LTX2DFRTemporalRefinePipeline",
        scheduler=LTXEulerAncestralRFScheduler(eta=0.5),
        temporal_latent_upsampler=upsampler,
    )


def without_guidance(**changes: Any) -> dict[str, Any]:
    given = inputs(num_frames=7, sigmas=SIGMAS, **changes)
    left_out = ("negative", "guidance_scale", "stg_scale", "modality_scale", "num_inference_steps")
    return {name: value for name, value in given.items() if not any(part in name for part in left_out)}


def refined() -> dict[str, Any]:
    """What the passes before would give: a video, its keyframes, and its sound."""
    return without_guidance(
        latents=noise(1, CHANNELS, 7, 4, 4, seed=5),
        keyframes_latents=noise(1, CHANNELS, 2, 4, 4, seed=6),
        keyframe_positions=[6, 12],
        audio_latents=noise(1, 2, 13, 2, seed=7),
    ) | {"num_frames": 13}


def high_range(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in inputs(**changes).items() if not name.startswith("audio_")}


ENTRIES = [
    Entry("LTX2DFRPipeline", lambda: keyframes("LTX2DFRPipeline"), without_guidance, form="none", **BOTH),
    Entry("LTX2DFRTemporalRefinePipeline", refine, refined, form="none", loop=STEPS, **BOTH),
    Entry(
        "LTX2InContextPipeline",
        lambda: pipeline("LTX2InContextPipeline"),
        lambda: inputs(reference_conditions=LTX2ReferenceCondition(frames=[picture()] * 5)),
        **BOTH,
    ),
    Entry(
        "LTX2HDRPipeline",
        lambda: pipeline("LTX2HDRPipeline"),
        lambda: high_range(
            reference_conditions=LTX2HDRReferenceCondition(frames=noise(1, 5, 3, 32, 32, seed=8).sigmoid())
        ),
        **BOTH,
    ),
    Entry("LTX2HDRPipeline text", lambda: pipeline("LTX2HDRPipeline"), high_range, **BOTH),
]
