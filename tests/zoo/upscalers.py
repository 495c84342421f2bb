"""Stable Diffusion's upscalers and the refiner of Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from diffusers import DDPMScheduler

from tests import tiny

from . import Entry, noise, seeded
from .controlnet import SDXL, UNET, WIDTH, inputs, pipeline, pooled
from .sd_variants import one_image, unet


def upscale() -> Any:
    """The first attention of its outer blocks reads the text too; class_labels is the level of noise in the image."""
    return pipeline(
        "StableDiffusionUpscalePipeline",
        unet=unet(in_channels=7, num_class_embeds=100, only_cross_attention=True),
        low_res_scheduler=DDPMScheduler(),
        max_noise_level=99,
        vae=seeded(lambda: tiny.vae(scaling_factor=0.08333)),
    )


def latent_upscale() -> Any:
    return pipeline(
        "StableDiffusionLatentUpscalePipeline",
        unet=unet(
            in_channels=8,
            out_channels=5,
            down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
            up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
            mid_block_type=None,
            block_out_channels=(32, 64, 64),  # the first way up must be as wide as the embedding of the time
            norm_num_groups=None,
            resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier",
            timestep_post_act="gelu",
            time_cond_proj_dim=128 + WIDTH,
            conv_in_kernel=1,
            conv_out_kernel=1,
            act_fn="gelu",
        ),
        scheduler=tiny.scheduler("EulerDiscrete"),
    )


def refiner() -> Any:
    """Without the first text encoder, and with a score for aesthetics in place of the size."""
    return pipeline(
        "StableDiffusionXLImg2ImgPipeline",
        unet=unet(**{**SDXL, "projection_class_embeddings_input_dim": WIDTH + 5 * 8}),
        text_encoder_2=None,
        tokenizer_2=None,
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def upscaled() -> dict[str, Any]:
    return inputs(image=noise(1, 3, 8, 8, seed=5).sigmoid(), noise_level=20)


def latent_upscaled() -> dict[str, Any]:
    return inputs(image=noise(1, 4, 4, 4, seed=5), **pooled())


ENTRIES = [
    Entry("StableDiffusionUpscalePipeline", upscale, upscaled, **UNET),
    Entry("StableDiffusionLatentUpscalePipeline", latent_upscale, latent_upscaled, **UNET),
    Entry("StableDiffusionXLImg2ImgPipeline refiner", refiner, lambda: one_image(**pooled()), **UNET),
]
