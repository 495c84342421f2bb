"""Stable Diffusion's own pipelines, what is made from them, and Stable Video Diffusion."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers import PaintByExamplePipeline
from transformers import CLIPVisionConfig

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded
from .controlnet import SDXL, UNET, WIDTH, image, inputs, pipeline, pooled, sd
from .sd_variants import depth, marigold, unet, worded


def latent_consistency(name: str) -> Any:
    return sd(name, unet=unet(time_cond_proj_dim=8), scheduler=tiny.scheduler("LCM"))


def gligen() -> Any:
    """With boxes, which a self-attention of their own reads in the first steps."""
    return sd(
        "StableDiffusionGLIGENPipeline",
        unet=unet(attention_type="gated"),
        tokenizer=tiny.tokenizer(),
        text_encoder=seeded(tiny.text_encoder),
    )


def paint_by_example() -> Any:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=16,
        intermediate_size=37,
        patch_size=8,
    )
    package = PaintByExamplePipeline.__module__.rpartition(".")[0]  # another one in another diffusers
    encoder_class = importlib.import_module(f"{package}.image_encoder").PaintByExampleImageEncoder
    encoder = seeded(lambda: encoder_class(config, proj_size=WIDTH))
    parts = {"vae": seeded(tiny.vae), "unet": unet(in_channels=9), "scheduler": tiny.scheduler()}
    return quiet(PaintByExamplePipeline(image_encoder=encoder, safety_checker=None, feature_extractor=None, **parts))


def xl_inpaint() -> Any:
    name = "StableDiffusionXLInpaintPipeline"
    return pipeline(name, unet=unet(**SDXL), text_encoder_2=None, tokenizer_2=None, add_watermarker=False)


def mask() -> torch.Tensor:
    return (noise(1, 1, 16, 16, seed=7) > 0).float()


def masked(**changes: Any) -> dict[str, Any]:
    return inputs(image=image(6), mask_image=mask(), height=16, width=16, strength=1.0, **changes)


def boxed(beta: float = 1.0) -> dict[str, Any]:
    """With boxes that count for this share of the steps."""
    given = worded(height=16, width=16, gligen_phrases=["dogs"], gligen_boxes=[[0.1, 0.1, 0.6, 0.6]])
    return {**given, "gligen_scheduled_sampling_beta": beta}


def painted() -> dict[str, Any]:
    given = inputs(image=image(6) * 2 - 1, mask_image=mask(), example_image=image(8), height=16, width=16)
    return {name: value for name, value in given.items() if not name.endswith("prompt_embeds")}


def unguided(**changes: Any) -> dict[str, Any]:
    given = inputs(prompt_embeds=noise(1, 12, WIDTH, seed=1, scale=9.0), **changes)
    del given["negative_prompt_embeds"]
    return given


def video() -> dict[str, Any]:
    return {
        **tiny.svd_inputs(),
        "min_guidance_scale": 2.0,
        "max_guidance_scale": 4.0,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": generator(),
    }


NAME = "StableDiffusion"
LCM = "LatentConsistencyModel"

ENTRIES = [
    Entry(
        f"{NAME}Img2ImgPipeline",
        lambda: sd(f"{NAME}Img2ImgPipeline"),
        lambda: inputs(image=image(6), strength=1.0),
        **UNET,
    ),
    Entry(f"{NAME}InpaintPipeline", lambda: sd(f"{NAME}InpaintPipeline"), masked, **UNET),
    Entry(
        f"{NAME}InpaintPipeline of nine channels",
        lambda: sd(f"{NAME}InpaintPipeline", unet=unet(in_channels=9)),
        masked,
        **UNET,
    ),
    Entry(
        f"{NAME}LDM3DPipeline",
        lambda: sd(f"{NAME}LDM3DPipeline", image_encoder=None, vae=seeded(lambda: tiny.vae(out_channels=6))),
        lambda: inputs(height=16, width=16, output_type="np"),
        **{**UNET, "output": "rgb"},
    ),
    Entry(f"{NAME}GLIGENPipeline", gligen, boxed, **UNET),
    Entry(
        f"{NAME}GLIGENPipeline whose boxes count for a part of the steps",
        gligen,
        lambda: boxed(0.75),
        **{**UNET, "graphs": 3, "graphs_of_full": 1},
    ),
    Entry("PaintByExamplePipeline", paint_by_example, painted, **UNET),
    Entry(
        f"{LCM}Pipeline",
        lambda: latent_consistency(f"{LCM}Pipeline"),
        lambda: unguided(height=16, width=16),
        form="none",
        **UNET,
    ),
    Entry(
        f"{LCM}Img2ImgPipeline",
        lambda: latent_consistency(f"{LCM}Img2ImgPipeline"),
        lambda: unguided(image=image(6), strength=1.0),
        form="none",
        **UNET,
    ),
    Entry(
        f"{NAME}XLInpaintPipeline",
        xl_inpaint,
        lambda: masked(**pooled()),
        **UNET,
    ),
    Entry("MarigoldNormalsPipeline", lambda: marigold("Normals"), depth, form="none", **{**UNET, "output": "latent"}),
    Entry(
        "StableVideoDiffusionPipeline",
        tiny.svd,
        video,
        text=("encoder_hidden_states",),
        latents="sample",
        denoisers=("unet",),
    ),
]
