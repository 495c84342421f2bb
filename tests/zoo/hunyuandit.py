"""HunyuanDiT, with and without a ControlNet."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, HunyuanDiT2DControlNetModel, HunyuanDiT2DModel

from tests.tiny import scheduler

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 16
WIDTH_T5 = 24
TOKENS = 8

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "hidden_size": 16,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 4,
    "mlp_ratio": 2.0,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH_T5,
    "pooled_projection_dim": 8,
    "text_len": TOKENS,
    "text_len_t5": TOKENS,
}


def vae() -> Any:
    """An eighth of the size, with which the pipeline counts on for its position embeddings."""
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
        )
    )


def pipeline(name: str, **parts: Any) -> Any:
    return quiet(
        getattr(diffusers, name)(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=seeded(lambda: HunyuanDiT2DModel(**CONFIG, num_layers=4)),
            scheduler=scheduler("DDIM"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    )


def with_controlnet() -> Any:
    return pipeline(
        "HunyuanDiTControlNetPipeline",
        controlnet=seeded(lambda: HunyuanDiT2DControlNetModel(**CONFIG, transformer_num_layers=4), seed=1),
    )


def inputs(**changes: Any) -> dict[str, Any]:
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    mask[:, 6:] = 0
    return {
        "prompt_embeds": noise(1, TOKENS, WIDTH, seed=1),
        "prompt_attention_mask": mask,
        "prompt_embeds_2": noise(1, TOKENS, WIDTH_T5, seed=2),
        "prompt_attention_mask_2": mask,
        "negative_prompt_embeds": noise(1, TOKENS, WIDTH, seed=3),
        "negative_prompt_attention_mask": mask,
        "negative_prompt_embeds_2": noise(1, TOKENS, WIDTH_T5, seed=4),
        "negative_prompt_attention_mask_2": mask,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def controlled_inputs() -> dict[str, Any]:
    """With an image, of whose encoding the pipeline samples without a generator."""
    torch.manual_seed(4)
    return inputs(control_image=torch.rand((1, 3, 64, 64), generator=generator()))


# One of the texts is pooled too, and joins the embedding of the time.
POOLED: dict[str, Any] = {
    "text": ("encoder_hidden_states", "encoder_hidden_states_t5"),
    "output": "images",
    "only_cross": False,
}

ENTRIES = [
    Entry("HunyuanDiTPipeline", lambda: pipeline("HunyuanDiTPipeline"), inputs, **POOLED),
    Entry(
        "HunyuanDiTControlNetPipeline",
        with_controlnet,
        controlled_inputs,
        companions=("controlnet",),
        graphs=4,
        **POOLED,
    ),
]
