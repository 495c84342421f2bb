"""Stable Diffusion with T2I-Adapters, and with IP-Adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import T2IAdapter
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import (
    ImageProjection,
    IPAdapterFaceIDImageProjection,
    IPAdapterFaceIDPlusImageProjection,
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
)

from tests import tiny

from . import Entry, noise, seeded
from .controlnet import SDXL, UNET, WIDTH, image, inputs, pipeline, pooled, sd

IMAGE_WIDTH = 12
IMAGE_TOKENS = 4


def adapter(kind: str) -> Any:
    return seeded(lambda: T2IAdapter(channels=[16], num_res_blocks=1, downscale_factor=2, adapter_type=kind), seed=1)


def with_adapter() -> Any:
    return sd("StableDiffusionAdapterPipeline", adapter=adapter("full_adapter"))


def xl_with_adapter() -> Any:
    return pipeline(
        "StableDiffusionXLAdapterPipeline",
        unet=seeded(lambda: tiny.unet(**tiny.ONE_BLOCK, **SDXL)),
        adapter=adapter("full_adapter_xl"),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def plain_projection() -> Any:
    return ImageProjection(IMAGE_WIDTH, WIDTH, IMAGE_TOKENS)


def plus_projection() -> Any:
    """Of an IP-Adapter Plus, which reads all of an image's features."""
    return IPAdapterPlusImageProjection(IMAGE_WIDTH, WIDTH, 16, depth=1, dim_head=8, heads=2, num_queries=IMAGE_TOKENS)


def face_projection() -> Any:
    return IPAdapterFaceIDImageProjection(IMAGE_WIDTH, WIDTH, num_tokens=IMAGE_TOKENS)


def face_plus_projection() -> Any:
    """Of an IP-Adapter for faces, whose module is given the image's features besides: rows of its own."""
    projection = IPAdapterFaceIDPlusImageProjection(
        WIDTH, WIDTH, 10, id_embeddings_dim=IMAGE_WIDTH, depth=1, dim_head=8, heads=2, num_tokens=IMAGE_TOKENS
    )
    projection.clip_embeds = noise(2, 1, 5, 10, seed=12)
    projection.shortcut = True
    return projection


def with_ip_adapters(unet: Any, adapters: int = 2, projection: Callable[[], Any] = plain_projection) -> Any:
    """The same UNet, whose cross-attentions read images too, as after ``load_ip_adapter``."""
    processors = {
        name: processor
        if "attn1" in name or "motion_modules" in name
        else IPAdapterAttnProcessor2_0(16, WIDTH, num_tokens=(IMAGE_TOKENS,) * adapters)
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    projections = [projection() for _ in range(adapters)]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    return unet


def sd_with_ip_adapters(adapters: int = 2, projection: Callable[[], Any] = plain_projection) -> Any:
    unet = seeded(lambda: with_ip_adapters(tiny.unet(**tiny.ONE_BLOCK), adapters, projection))
    return sd("StableDiffusionPipeline", unet=unet)


def image_embeds(adapters: int = 2) -> list[torch.Tensor]:
    """One embedding for each adapter and guidance branch, the unconditional one first."""
    return [noise(2, 1, IMAGE_WIDTH, seed=10 + index) for index in range(adapters)]


def xl_with_ip_adapters() -> Any:
    return pipeline(
        "StableDiffusionXLPipeline",
        unet=seeded(lambda: with_ip_adapters(tiny.unet(**tiny.ONE_BLOCK, **SDXL))),
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


ENTRIES = [
    Entry("StableDiffusionAdapterPipeline", with_adapter, lambda: inputs(image=image()), **UNET),
    Entry("StableDiffusionXLAdapterPipeline", xl_with_adapter, lambda: inputs(image=image(), **pooled()), **UNET),
    Entry(
        "StableDiffusionXLAdapterPipeline to the gate",
        xl_with_adapter,
        lambda: inputs(image=image(), adapter_conditioning_factor=0.5, **pooled()),
        **{**UNET, "graphs_of_full": 1},
    ),
    Entry(
        "StableDiffusionPipeline IP-Adapters",
        sd_with_ip_adapters,
        lambda: inputs(ip_adapter_image_embeds=image_embeds(), height=16, width=16),
        **{**UNET, "text": ("encoder_hidden_states", "added_cond_kwargs")},
    ),
    *[
        Entry(
            f"StableDiffusionPipeline IP-Adapters {name}",
            functools.partial(sd_with_ip_adapters, 1, projection),
            lambda shape=shape: inputs(ip_adapter_image_embeds=[noise(*shape, seed=10)], height=16, width=16),
            **UNET,
        )
        for name, projection, shape in (
            ("Plus", plus_projection, (2, 1, 5, IMAGE_WIDTH)),
            ("FaceID", face_projection, (2, 1, IMAGE_WIDTH)),
            ("FaceID Plus", face_plus_projection, (2, 1, IMAGE_WIDTH)),
        )
    ],
    Entry(
        "StableDiffusionPipeline IP-Adapters masked",
        sd_with_ip_adapters,
        lambda: inputs(
            ip_adapter_image_embeds=image_embeds(),
            cross_attention_kwargs={"ip_adapter_masks": [image(20)[:, :1], image(21)[:, :1]]},
            height=16,
            width=16,
        ),
        **UNET,
    ),
    Entry(
        "StableDiffusionXLPipeline IP-Adapters",
        xl_with_ip_adapters,
        lambda: inputs(ip_adapter_image_embeds=image_embeds(), height=16, width=16, **pooled()),
        **UNET,
    ),
]
