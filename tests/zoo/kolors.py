"""Kolors: the UNet of Stable Diffusion XL behind a projection of the text."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import BatchEncoding

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTH = 24


def imported(module: str, name: str, package: str = "kolors") -> Any:
    """A class of Kolors; the modules need sentencepiece only for the tokenizer, which is left out here."""
    importlib.import_module("diffusers.pipelines.kolors")
    stand_in = {} if find_spec("sentencepiece") else {"sentencepiece": SimpleNamespace(SentencePieceProcessor=None)}
    with mock.patch.dict(sys.modules, stand_in), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, about torch.jit.script
        return getattr(importlib.import_module(f"diffusers.pipelines.{package}.{module}"), name)


class Letters:
    """A tokenizer of single letters."""

    def __call__(self, prompts: str | list[str], **_: Any) -> BatchEncoding:
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = torch.tensor([[ord(letter) % 64 for letter in text.ljust(8)[:8]] for text in texts])
        positions = torch.arange(8).expand(len(texts), 8)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions})


def text_encoder() -> Any:
    config = imported("text_encoder", "ChatGLMConfig")(
        num_layers=2,
        padded_vocab_size=64,
        hidden_size=WIDTH,
        ffn_hidden_size=WIDTH,
        kv_channels=12,
        num_attention_heads=2,
        seq_length=8,
        original_rope=True,
    )

    def make() -> Any:
        model = imported("text_encoder", "ChatGLMModel")(config)
        for parameter in model.parameters():  # it leaves them uninitialised
            nn.init.normal_(parameter, std=0.2)
        return model

    return seeded(make)


def pipeline(module: str, name: str, package: str = "kolors", **changes: Any) -> Any:
    unet = seeded(
        lambda: tiny.unet(
            **tiny.ONE_BLOCK,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="text_proj",
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
    )
    parts = {"vae": seeded(tiny.vae), "unet": unet, "scheduler": tiny.scheduler("EulerDiscrete")}
    return quiet(imported(module, name, package)(**{"text_encoder": None, "tokenizer": None, **parts, **changes}))


def from_image() -> Any:
    return pipeline(
        "pipeline_kolors_img2img", "KolorsImg2ImgPipeline", text_encoder=text_encoder(), tokenizer=Letters()
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "height": 16,
        "width": 16,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def embedded() -> dict[str, Any]:
    return inputs(
        prompt_embeds=noise(1, 12, WIDTH, seed=1),
        negative_prompt_embeds=noise(1, 12, WIDTH, seed=2),
        pooled_prompt_embeds=noise(1, WIDTH, seed=3),
        negative_pooled_prompt_embeds=noise(1, WIDTH, seed=4),
    )


def with_image() -> dict[str, Any]:
    """A prompt, since this pipeline loses the pooled embeddings that it is given."""
    return inputs(prompt="a red cat", negative_prompt="dogs", image=noise(1, 3, 16, 16, seed=5).sigmoid(), strength=1.0)


UNET: dict[str, Any] = {"latents": "sample", "output": "images", "denoisers": ("unet",)}

ENTRIES = [
    Entry("KolorsPipeline", lambda: pipeline("pipeline_kolors", "KolorsPipeline"), embedded, **UNET),
    Entry("KolorsImg2ImgPipeline", from_image, with_image, **UNET),
]
