"""Wan from a video: VACE, video to video, Animate."""

from __future__ import annotations

from typing import Any

from diffusers import (
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

from . import STEPS, Entry, noise, quiet, seeded
from .wan import inputs, transformer, unipc, vae
from .wan_image_to_video import image_encoder, image_processor, picture


def video(frames: int = 5, size: int = 16) -> list[Image.Image]:
    return [picture(size, seed) for seed in range(frames)]


def pipeline(cls: type[Any], **parts: Any) -> Any:
    return quiet(cls(**{"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": unipc(), **parts}))


def vace(seed: int = 0) -> Any:
    return seeded(
        lambda: WanVACETransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            vace_layers=[0],
            vace_in_channels=96,
        ),
        seed,
    )


def animate() -> Any:
    return seeded(
        lambda: WanAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            image_dim=8,
            added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        )
    )


def animate_pipeline() -> Any:
    return pipeline(
        WanAnimatePipeline, transformer=animate(), image_processor=image_processor(), image_encoder=image_encoder()
    )


def animate_inputs(**changes: Any) -> dict[str, Any]:
    given = inputs(
        image=picture(),
        pose_video=video(),
        face_video=video(),
        segment_frame_length=5,
        prompt_embeds=noise(1, 512, 32, seed=1),
        negative_prompt_embeds=noise(1, 512, 32, seed=2),
        **changes,
    )
    del given["num_frames"]
    return given


def video_to_video_inputs() -> dict[str, Any]:
    given = inputs(video=video(), num_inference_steps=6, strength=0.7)  # four of the six
    del given["num_frames"]
    return given


_BOTH = ("encoder_hidden_states", "encoder_hidden_states_image")

ENTRIES = [
    Entry(
        "WanVACEPipeline",
        lambda: pipeline(WanVACEPipeline, transformer=vace()),
        lambda: inputs(video=video(), mask=video(), conditioning_scale=0.7),
        form="calls",
    ),
    Entry(
        "WanVACEPipeline 2.2 14B with reference",
        lambda: pipeline(WanVACEPipeline, transformer=vace(), transformer_2=vace(seed=1), boundary_ratio=0.75),
        lambda: inputs(num_inference_steps=6, reference_images=[picture()]),  # three for each of the two
        form="calls",
        denoisers=("transformer", "transformer_2"),
        graphs=4,
    ),
    Entry(
        "WanVideoToVideoPipeline",
        lambda: pipeline(
            WanVideoToVideoPipeline,
            transformer=transformer(),
            scheduler=UniPCMultistepScheduler(flow_shift=3.0),
        ),
        video_to_video_inputs,
        form="calls",
    ),
    Entry("WanAnimatePipeline", animate_pipeline, animate_inputs, form="calls", text=_BOTH),
    Entry(
        "WanAnimatePipeline in two segments",
        animate_pipeline,
        lambda: {**animate_inputs(), "pose_video": video(9), "face_video": video(9)},
        form="calls",
        text=_BOTH,
        loop=STEPS,
    ),
    Entry(
        "WanAnimatePipeline unguided",
        animate_pipeline,
        lambda: animate_inputs(guidance_scale=1.0),
        form="none",
        text=_BOTH,
    ),
]
