"""Pipelines that diffusers keeps but no longer develops, with the UNet of Stable Diffusion."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler
from diffusers.pipelines.controlnet import BlipDiffusionControlNetPipeline
from diffusers.pipelines.deprecated.alt_diffusion import AltDiffusionImg2ImgPipeline, AltDiffusionPipeline
from diffusers.pipelines.deprecated.audio_diffusion import AudioDiffusionPipeline
from diffusers.pipelines.deprecated.blip_diffusion import BlipDiffusionPipeline
from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
from diffusers.pipelines.deprecated.stable_diffusion_diffedit import StableDiffusionDiffEditPipeline
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_inpaint_legacy import (
    StableDiffusionInpaintPipelineLegacy,
)
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_model_editing import (
    StableDiffusionModelEditingPipeline,
)
from PIL import Image
from torch import nn

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded
from .controlnet import CONTROL, UNET, WIDTH, controlnet, image, inputs
from .sd_variants import unet


def pipeline(cls: type[Any], **changes: Any) -> Any:
    parts = {
        "vae": seeded(tiny.vae),
        "text_encoder": None,
        "tokenizer": None,
        "unet": unet(),
        "scheduler": tiny.scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the class is deprecated
        return quiet(cls(**{**parts, **changes}))


class Subject(nn.Module):
    """In place of the model that sees a subject in an image and its name: embeddings of no image in particular."""

    config = SimpleNamespace(num_query_tokens=2)
    device = torch.device("cpu")

    def forward(self, **_: Any) -> torch.Tensor:
        return noise(1, 2, WIDTH, seed=6)


class WithContext(nn.Module):
    """In place of CLIP with embeddings of a context between those of the tokens."""

    device = torch.device("cpu")
    text_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=tiny.TOKENS))

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, WIDTH)

    def forward(
        self, input_ids: torch.Tensor, ctx_embeddings: torch.Tensor | None, ctx_begin_pos: Any = None
    ) -> tuple[torch.Tensor]:
        tokens = self.tokens(input_ids)
        return (tokens if ctx_embeddings is None else torch.cat([tokens[:, :1], ctx_embeddings, tokens[:, 1:]], dim=1),)


def blip(cls: type[Any], **parts: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return quiet(
            cls(
                tokenizer=tiny.tokenizer(),
                text_encoder=seeded(WithContext),
                vae=seeded(tiny.vae),
                unet=unet(),
                scheduler=tiny.scheduler(),
                qformer=Subject(),
                image_processor=BlipImageProcessor(size={"height": 16, "width": 16}),
                mean=[0.5] * 3,
                std=[0.5] * 3,
                **parts,
            )
        )


def picture() -> Image.Image:
    pixels = torch.randint(256, (16, 16, 3), generator=generator(), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def subject(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": ["red"],
        "reference_image": picture(),
        "source_subject_category": ["dog"],
        "target_subject_category": ["cat"],
        "height": 8,
        "width": 8,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "np",
        "generator": generator(),
        **changes,
    }


class Picture:
    """Gives the picture of the sound itself, where `Mel` makes sound of it by librosa."""

    def get_sample_rate(self) -> int:
        return 22_050

    def image_to_audio(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image, np.float32)


def audio() -> Any:
    small = unet(in_channels=1, out_channels=1, sample_size=8)
    return quiet(AudioDiffusionPipeline(vqvae=None, unet=small, mel=Picture(), scheduler=tiny.scheduler()))


def sound() -> dict[str, Any]:
    return {"steps": STEPS, "generator": generator(), "encoding": noise(1, 3, WIDTH, seed=1)}


def mask() -> torch.Tensor:
    return (noise(1, 1, 16, 16, seed=7) > 0).float()


def edited() -> dict[str, Any]:
    """The image as it was at each step, which its inversion gives."""
    at_each_step = torch.stack([noise(4, 8, 8, seed=20 + step) for step in range(STEPS)])[None]
    where = (noise(1, 8, 8, seed=7) > 0).float()
    return inputs(mask_image=where, image_latents=at_each_step, inpaint_strength=1.0)


ENTRIES = [
    Entry(
        "StableDiffusionInpaintPipelineLegacy",
        lambda: pipeline(StableDiffusionInpaintPipelineLegacy),
        lambda: inputs(image=image(6) * 2 - 1, mask_image=mask(), strength=1.0),
        **UNET,
    ),
    Entry(
        "StableDiffusionModelEditingPipeline",
        lambda: pipeline(StableDiffusionModelEditingPipeline),
        lambda: inputs(height=16, width=16),
        **UNET,
    ),
    Entry("AltDiffusionPipeline", lambda: pipeline(AltDiffusionPipeline), lambda: inputs(height=16, width=16), **UNET),
    Entry(
        "AltDiffusionImg2ImgPipeline",
        lambda: pipeline(AltDiffusionImg2ImgPipeline),
        lambda: inputs(image=image(6), strength=1.0),
        **UNET,
    ),
    Entry("BlipDiffusionPipeline", lambda: blip(BlipDiffusionPipeline), subject, **UNET),
    Entry(
        "BlipDiffusionControlNetPipeline",
        lambda: blip(BlipDiffusionControlNetPipeline, controlnet=controlnet(conditioning_embedding_out_channels=(8,))),
        lambda: subject(condtioning_image=picture()),
        **CONTROL,
    ),
    Entry("AudioDiffusionPipeline", audio, sound, form="none", **{**UNET, "output": "audios"}),
    Entry(
        "StableDiffusionDiffEditPipeline",
        lambda: pipeline(StableDiffusionDiffEditPipeline, inverse_scheduler=DDIMInverseScheduler()),
        edited,
        **UNET,
    ),
]
