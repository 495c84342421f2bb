"""AnimateDiff and PIA: motion modules between the blocks of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import MotionAdapter, SparseControlNetModel, UNetMotionModel

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded
from .adapters import image_embeds, with_ip_adapters
from .controlnet import SDXL, controlnet

WIDTH = tiny.TEXT_WIDTH


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
    """A UNet that reads no text on its way up, unless told otherwise, for compiling one takes long."""
    added = {} if in_channels == 4 else {"conv_in_channels": in_channels}
    config = {**tiny.ONE_BLOCK, "up_block_types": ("UpBlock2D",), **changes}
    return seeded(lambda: UNetMotionModel.from_unet2d(tiny.unet(**config), adapter(**added)))


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


def sparse_controlnet() -> Any:
    return seeded(
        lambda: SparseControlNetModel(
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlockMotion",),
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
            motion_num_attention_heads=2,
            conditioning_embedding_out_channels=(8, 16),
        ),
        seed=1,
    )


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
    return inputs(video=list(noise(2, 3, 16, 16, seed=5).sigmoid()), strength=1.0)


def image_to_video() -> dict[str, Any]:
    return text_to_video(image=noise(1, 3, 16, 16, seed=5, scale=0.3).sigmoid())


def controlled() -> dict[str, Any]:
    return text_to_video(conditioning_frames=list(noise(2, 3, 16, 16, seed=5).sigmoid()))


def sparsely_controlled() -> dict[str, Any]:
    torch.manual_seed(0)  # the pipeline encodes the frames without its generator
    return text_to_video(conditioning_frames=noise(1, 3, 16, 16, seed=5).sigmoid(), controlnet_frame_indices=[0])


UNET: dict[str, Any] = {"latents": "sample", "denoisers": ("unet",)}

CONTROL: dict[str, Any] = {**UNET, "companions": ("controlnet",), "graphs": 4}

ENTRIES = [
    Entry("AnimateDiffPipeline", lambda: pipeline(unet=unet(**tiny.ONE_BLOCK)), text_to_video, **UNET),
    Entry(
        "AnimateDiffPipeline IP-Adapters",
        lambda: pipeline(unet=seeded(lambda: with_ip_adapters(unet()))),
        lambda: text_to_video(ip_adapter_image_embeds=image_embeds()),
        **UNET,
    ),
    Entry("AnimateDiffSDXLPipeline", xl, for_xl, **UNET),
    Entry(
        "AnimateDiffVideoToVideoPipeline",
        lambda: pipeline("AnimateDiffVideoToVideoPipeline"),
        video_to_video,
        **UNET,
    ),
    Entry("PIAPipeline", lambda: pipeline("PIAPipeline", unet=unet(9)), image_to_video, **UNET),
    Entry(
        "AnimateDiffControlNetPipeline",
        lambda: pipeline("AnimateDiffControlNetPipeline", controlnet=controlnet()),
        controlled,
        **CONTROL,
    ),
    Entry(
        "AnimateDiffVideoToVideoControlNetPipeline",
        lambda: pipeline("AnimateDiffVideoToVideoControlNetPipeline", controlnet=controlnet()),
        lambda: {**video_to_video(), "conditioning_frames": list(noise(2, 3, 16, 16, seed=6).sigmoid())},
        **CONTROL,
    ),
    Entry(
        "AnimateDiffSparseControlNetPipeline",
        lambda: pipeline("AnimateDiffSparseControlNetPipeline", controlnet=sparse_controlnet()),
        sparsely_controlled,
        **CONTROL,
    ),
]
