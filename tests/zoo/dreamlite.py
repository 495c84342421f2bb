"""DreamLite: a UNet with grouped queries, of which some blocks have no self-attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderTiny, DreamLiteUNetModel, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import BatchEncoding

from . import STEPS, Entry, generator, quiet, seeded

WIDTH = 24


class Letters:
    """A tokenizer of single letters, padded at the end."""

    def __call__(self, text: list[str], **_: Any) -> BatchEncoding:
        length = max(map(len, text))
        ids = torch.tensor([[ord(letter) % 64 for letter in each.ljust(length)] for each in text])
        mask = torch.tensor([[1] * len(each) + [0] * (length - len(each)) for each in text])
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


class Embedding(nn.Module):
    """In place of the language model, whose last hidden states are all that is used."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, WIDTH)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(hidden_states=[self.tokens(input_ids)])


def pipeline(name: str) -> Any:
    unet = seeded(
        lambda: DreamLiteUNetModel(
            block_out_channels=(16, 16),
            layers_per_block=1,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            mid_block_type=None,
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            cross_attention_dim=16,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
            attention_head_dim=2,
            norm_num_groups=8,
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=2 * 8,
            ff_mult=2,
        )
    )
    vae = seeded(
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        )
    )
    return quiet(
        getattr(diffusers, name)(
            text_encoder=seeded(Embedding),
            tokenizer=Letters(),
            processor=None,
            vae=vae,
            unet=unet,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "a red cat",
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


UNET: dict[str, Any] = {"latents": "sample", "output": "images", "denoisers": ("unet",)}

ENTRIES = [
    Entry(
        "DreamLitePipeline",
        lambda: pipeline("DreamLitePipeline"),
        lambda: inputs(negative_prompt="dogs", guidance_scale=4.0),
        **UNET,
    ),
    Entry("DreamLiteMobilePipeline", lambda: pipeline("DreamLiteMobilePipeline"), inputs, form="none", **UNET),
]
