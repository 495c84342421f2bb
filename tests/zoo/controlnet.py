"""Stable Diffusion with one ControlNet or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = tiny.TEXT_WIDTH
SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
}


def controlnet(cls: Callable[..., Any] = ControlNetModel, **changes: Any) -> Any:
    config = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
        "conditioning_embedding_out_channels": (8, 16),  # halves the image, as the VAE does
    }
    return seeded(lambda: cls(**{**config, **changes}), seed=1)


def pipeline(name: str, **changes: Any) -> Any:
    parts = {
        "vae": seeded(tiny.vae),
        "text_encoder": None,
        "tokenizer": None,
        "unet": seeded(lambda: tiny.unet(**tiny.ONE_BLOCK)),
        "scheduler": tiny.scheduler(),
    }
    return quiet(getattr(diffusers, name)(**{**parts, **changes}))


def sd(name: str, **changes: Any) -> Any:
    return pipeline(name, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **changes)


def with_controlnet(name: str) -> Any:
    return sd(name, controlnet=controlnet())


def xl(name: str, **changes: Any) -> Any:
    parts = {
        "unet": seeded(lambda: tiny.unet(**tiny.ONE_BLOCK, **SDXL)),
        "controlnet": controlnet(**SDXL),
        "text_encoder_2": None,
        "tokenizer_2": None,
        "add_watermarker": False,
    }
    return pipeline(name, **{**parts, **changes})


def union(name: str) -> Any:
    added = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return xl(name, controlnet=controlnet(ControlNetUnionModel, **added, **SDXL))


def image(seed: int = 5) -> torch.Tensor:
    return noise(1, 3, 16, 16, seed=seed).sigmoid()


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 12, WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, 12, WIDTH, seed=2),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def pooled(**changes: Any) -> dict[str, Any]:
    return {
        "pooled_prompt_embeds": noise(1, WIDTH, seed=3),
        "negative_pooled_prompt_embeds": noise(1, WIDTH, seed=4),
        **changes,
    }


def from_image(**changes: Any) -> dict[str, Any]:
    return inputs(image=image(6), control_image=image(), strength=1.0, **changes)


def inpaint(**changes: Any) -> dict[str, Any]:
    return from_image(mask_image=(noise(1, 1, 16, 16, seed=7) > 0).float(), height=16, width=16, **changes)


UNET: dict[str, Any] = {"latents": "sample", "output": "images", "denoisers": ("unet",)}
CONTROL: dict[str, Any] = {**UNET, "companions": ("controlnet",), "graphs": 4}
SD, XL, UNION = (f"StableDiffusion{kind}" for kind in ("ControlNet", "XLControlNet", "XLControlNetUnion"))
MODE = {"control_mode": [1]}

ENTRIES = [
    Entry(f"{SD}Pipeline", lambda: with_controlnet(f"{SD}Pipeline"), lambda: inputs(image=image()), **CONTROL),
    Entry(
        f"{SD}Pipeline two, guess mode",
        lambda: sd(f"{SD}Pipeline", controlnet=[controlnet(), controlnet()]),
        lambda: inputs(image=[image(), image(6)], guess_mode=True),
        companions_form="none",
        **{**CONTROL, "companions": ("controlnet.nets.0", "controlnet.nets.1"), "graphs": 6},
    ),
    Entry(f"{SD}Img2ImgPipeline", lambda: with_controlnet(f"{SD}Img2ImgPipeline"), from_image, **CONTROL),
    Entry(f"{SD}InpaintPipeline", lambda: with_controlnet(f"{SD}InpaintPipeline"), inpaint, **CONTROL),
    Entry(f"{XL}Pipeline", lambda: xl(f"{XL}Pipeline"), lambda: inputs(image=image(), **pooled()), **CONTROL),
    Entry(f"{XL}Img2ImgPipeline", lambda: xl(f"{XL}Img2ImgPipeline"), lambda: from_image(**pooled()), **CONTROL),
    Entry(f"{XL}InpaintPipeline", lambda: xl(f"{XL}InpaintPipeline"), lambda: inpaint(**pooled()), **CONTROL),
    Entry(
        f"{UNION}Pipeline",
        lambda: union(f"{UNION}Pipeline"),
        lambda: inputs(control_image=[image()], **pooled(**MODE)),
        **CONTROL,
    ),
    Entry(
        f"{UNION}Img2ImgPipeline",
        lambda: union(f"{UNION}Img2ImgPipeline"),
        lambda: from_image(**pooled(**MODE)),
        **CONTROL,
    ),
    Entry(
        f"{UNION}InpaintPipeline",
        lambda: union(f"{UNION}InpaintPipeline"),
        lambda: inpaint(**pooled(**MODE)),
        **CONTROL,
    ),
]
