"""The denoisers of well-known models, by their public configurations, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Architecture:
    """A denoiser's class and configuration, and what it is given.

    Attributes:
        title: what people call the model.
        cls: name of the class in diffusers.
        config: what differs from the class's defaults.
        tokens: how many tokens of text its pipeline hands over, each as wide as `text_width`.
        text_width: channels of a token.
        added: the inputs besides latents, timestep and text, for a number of rows.
    """

    title: str
    cls: str
    config: dict[str, Any]
    tokens: int
    text_width: int
    added: Callable[[int], dict[str, Any]] = field(default=lambda rows: {})

    def build(self, device: str = "meta") -> nn.Module:
        """Return the denoiser, with weights that are random or, on the meta device, none."""
        import diffusers

        with torch.device(device):
            denoiser: nn.Module = getattr(diffusers, self.cls)(**self.config)
        return denoiser.eval().requires_grad_(False)

    def inputs(self, rows: int, size: int | None = None, device: str = "meta") -> dict[str, Any]:
        """Return the denoiser's inputs, by name: random on a real device, latents of [rows, 4, size, size].

        ``size`` defaults to that of the model's own resolution.
        """
        side = self.config["sample_size"] if size is None else size
        latents = "hidden_states" if self.cls.endswith("Transformer2DModel") else "sample"
        with torch.device(device):
            return {
                latents: torch.randn(rows, 4, side, side),
                "timestep": torch.full((rows,), 500.0),
                "encoder_hidden_states": torch.randn(rows, self.tokens, self.text_width),
                **self.added(rows),
            }


def _sdxl_inputs(rows: int) -> dict[str, Any]:
    return {"added_cond_kwargs": {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.full((rows, 6), 1024.0)}}


def _sdxl_lcm_inputs(rows: int) -> dict[str, Any]:
    return {**_sdxl_inputs(rows), "timestep_cond": torch.randn(rows, 256)}


def _pixart_alpha_inputs(rows: int) -> dict[str, Any]:
    sizes = {"resolution": torch.full((rows, 2), 1024.0), "aspect_ratio": torch.ones(rows, 1)}
    return {"added_cond_kwargs": sizes, "encoder_attention_mask": torch.ones(rows, 120)}


def _pixart_sigma_inputs(rows: int) -> dict[str, Any]:
    sizes = {"resolution": None, "aspect_ratio": None}
    return {"added_cond_kwargs": sizes, "encoder_attention_mask": torch.ones(rows, 300)}


_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_PIXART: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "patch_size": 2,
    "norm_eps": 1e-6,
}
_DEMO: dict[str, Any] = {
    "sample_size": 16,
    "cross_attention_dim": 192,
    "block_out_channels": (64, 128, 160),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
_UNET, _PIXART_CLASS = "UNet2DConditionModel", "PixArtTransformer2DModel"

ARCHITECTURES = {
    "demo": Architecture("the embedded pipeline", _UNET, _DEMO, 32, 192),
    "sd15": Architecture("SD-1.5", _UNET, {"sample_size": 64, "cross_attention_dim": 768}, 77, 768),
    "sd21": Architecture(
        "SD-2.1",
        _UNET,
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        77,
        1024,
    ),
    "sdxl": Architecture("SDXL", _UNET, _SDXL, 77, 2048, _sdxl_inputs),
    "sdxl-lcm": Architecture("LCM SDXL", _UNET, {**_SDXL, "time_cond_proj_dim": 256}, 77, 2048, _sdxl_lcm_inputs),
    "pixart-alpha": Architecture(
        "PixArt-alpha", _PIXART_CLASS, {**_PIXART, "use_additional_conditions": True}, 120, 4096, _pixart_alpha_inputs
    ),
    "pixart-sigma": Architecture(
        "PixArt-Sigma", _PIXART_CLASS, {**_PIXART, "use_additional_conditions": False}, 300, 4096, _pixart_sigma_inputs
    ),
}
