"""AnimateDiff and PIA: motion modules between the blocks of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import MotionAdapter, UNetMotionModel

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = tiny.TEXT_WIDTH
SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}


def adapter(**changes: Any) -> Any:
    return MotionAdapter(
        block_out_channels=(16,),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
        **changes,
    )


def unet(in_channels: int = 4, **changes: Any) -> Any:
    added = {} if in_channels == 4 else {"conv_in_channels": in_channels}
    return seeded(
        lambda: UNetMotionModel.from_unet2d(tiny.unet(**tiny.ONE_BLOCK, **changes), adapter(**added)),
    )


def pipeline(name: str = "AnimateDiffPipeline", **changes: Any) -> Any:
    parts = {
        "vae": seeded(tiny.vae),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet(),
        "motion_adapter": None,
        "scheduler": tiny.scheduler(),
    }
    return quiet(getattr(diffusers, name)(**{**parts, **changes}))


def xl() -> Any:
    return pipeline("AnimateDiffSDXLPipeline", unet=unet(**SDXL), text_encoder_2=None, tokenizer_2=None)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 12, WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, 12, WIDTH, seed=2),
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def text_to_video(**changes: Any) -> dict[str, Any]:
    return inputs(num_frames=2, **changes)


def for_xl() -> dict[str, Any]:
    return text_to_video(
        pooled_prompt_embeds=noise(1, WIDTH, seed=3), negative_pooled_prompt_embeds=noise(1, WIDTH, seed=4)
    )


def video_to_video() -> dict[str, Any]:
    return inputs(video=[list(noise(2, 3, 16, 16, seed=5, scale=0.3))], strength=1.0)


def image_to_video() -> dict[str, Any]:
    return text_to_video(image=noise(1, 3, 16, 16, seed=5, scale=0.3))


UNET: dict[str, Any] = {"latents": "sample", "denoisers": ("unet",)}

ENTRIES = [
    Entry("AnimateDiffPipeline", pipeline, text_to_video, **UNET),
    Entry("AnimateDiffSDXLPipeline", xl, for_xl, **UNET),
    Entry(
        "AnimateDiffVideoToVideoPipeline",
        lambda: pipeline("AnimateDiffVideoToVideoPipeline"),
        video_to_video,
        **UNET,
    ),
    Entry("PIAPipeline", lambda: pipeline("PIAPipeline", unet=unet(9)), image_to_video, **UNET),
]
