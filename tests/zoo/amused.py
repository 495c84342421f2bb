"""aMUSEd: the latents are tokens of a codebook, masked at first."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import AmusedScheduler, UVit2DModel, VQModel
from diffusers.pipelines.deprecated.amused import AmusedImg2ImgPipeline, AmusedInpaintPipeline, AmusedPipeline

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = tiny.TEXT_WIDTH
CODES = 32
SIZE = 8


def pipeline(cls: type[Any]) -> Any:
    transformer = seeded(
        lambda: UVit2DModel(
            hidden_size=16,
            cond_embed_dim=WIDTH,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=WIDTH,
            vocab_size=CODES + 1,
            codebook_size=CODES,
            in_channels=16,
            block_out_channels=16,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            sample_size=SIZE,
        )
    )
    codebook = seeded(
        lambda: VQModel(
            block_out_channels=(8,),
            latent_channels=8,
            num_vq_embeddings=CODES,
            norm_num_groups=8,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the class is deprecated
        return quiet(
            cls(
                vqvae=codebook,
                tokenizer=None,
                text_encoder=None,
                transformer=transformer,
                scheduler=AmusedScheduler(mask_token_id=CODES),
            )
        )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, WIDTH, seed=3),
        "encoder_hidden_states": noise(1, 12, WIDTH, seed=1),
        "negative_prompt_embeds": noise(1, WIDTH, seed=4),
        "negative_encoder_hidden_states": noise(1, 12, WIDTH, seed=2),
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "np",
        "generator": generator(),
        **changes,
    }


def from_image(**changes: Any) -> dict[str, Any]:
    return inputs(image=noise(1, 3, SIZE, SIZE, seed=5).sigmoid(), strength=1.0, **changes)


def half_masked() -> torch.Tensor:
    tokens = torch.randint(CODES, (1, SIZE, SIZE), generator=generator(7))
    return torch.where(noise(1, SIZE, SIZE, seed=8) > 0, tokens, CODES)


UVIT: dict[str, Any] = {"latents": "input_ids", "output": "images"}

ENTRIES = [
    Entry("AmusedPipeline", lambda: pipeline(AmusedPipeline), lambda: inputs(latents=half_masked()), **UVIT),
    Entry("AmusedImg2ImgPipeline", lambda: pipeline(AmusedImg2ImgPipeline), from_image, **UVIT),
    Entry(
        "AmusedInpaintPipeline",
        lambda: pipeline(AmusedInpaintPipeline),
        lambda: from_image(mask_image=(noise(1, 1, SIZE, SIZE, seed=7) > 0).float()),
        **UVIT,
    ),
]
