"""Denoisers of images."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import PROMPT, Architecture


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


def _sana_inputs(rows: int) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(rows, 300)}


def _sana_sprint_inputs(rows: int) -> dict[str, Any]:
    return {**_sana_inputs(rows), "guidance": torch.full((rows,), 4.5)}


def _hunyuandit_inputs(rows: int) -> dict[str, Any]:
    return {
        "text_embedding_mask": torch.ones(rows, 77),
        "encoder_hidden_states_t5": torch.randn(rows, 256, 2048),
        "text_embedding_mask_t5": torch.ones(rows, 256),
        "image_rotary_emb": (torch.ones(64 * 64, 88), torch.ones(64 * 64, 88)),
    }


def _kandinsky3_inputs(rows: int) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(rows, 128, dtype=torch.bool)}


def _lumina_inputs(rows: int) -> dict[str, Any]:
    rotary = torch.ones(384, 384, 36, dtype=torch.complex64)
    return {"encoder_mask": torch.ones(rows, PROMPT), "image_rotary_emb": rotary, "cross_attention_kwargs": {}}


def _dreamlite_inputs(rows: int) -> dict[str, Any]:
    sizes = {"time_ids": torch.full((rows, 2), 1024.0)}
    return {"added_cond_kwargs": sizes, "encoder_attention_mask": torch.ones(rows, PROMPT)}


def _upscaler_inputs(rows: int) -> dict[str, Any]:
    return {"class_labels": torch.ones(rows, dtype=torch.long)}


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
# The unet's config.json of stabilityai/stable-diffusion-x4-upscaler.
_UPSCALER: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    "cross_attention_dim": 1024,
    "attention_head_dim": 8,
    "only_cross_attention": (True, True, True, False),
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}
# The transformer's config.json of Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers.
_HUNYUANDIT: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 40,
    "hidden_size": 1408,
    "in_channels": 4,
    "patch_size": 2,
    "mlp_ratio": 4.3637,
    "use_style_cond_and_image_meta_size": False,
}
# diffusers' scripts/convert_lumina_to_diffusers.py.
_LUMINA: dict[str, Any] = {"num_layers": 24, "num_kv_heads": 8}
# The unet's config.json of carlofkl/DreamLite-base, revision "diffusers".
_DREAMLITE: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (256, 512, 896),
    "attention_head_dim": (4, 8, 14),
    "transformer_layers_per_block": (1, 2, 4),
    "cross_attention_dim": 2304,
    "use_linear_projection": True,
    "encoder_hid_dim": 2048,
    "encoder_hid_dim_type": "text_proj_rms",
    "addition_embed_type": "time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 512,
    "ff_mult": 3,
}
# diffusers' scripts/convert_sana_to_diffusers.py.
_SPRINT: dict[str, Any] = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
_UNET, _PIXART_CLASS = "UNet2DConditionModel", "PixArtTransformer2DModel"

IMAGES = {
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
    "sdxl-lcm": Architecture(
        "LCM SDXL", _UNET, {**_SDXL, "time_cond_proj_dim": 256}, 77, 2048, _sdxl_lcm_inputs, guided=False
    ),
    "pixart-alpha": Architecture(
        "PixArt-alpha", _PIXART_CLASS, {**_PIXART, "use_additional_conditions": True}, 120, 4096, _pixart_alpha_inputs
    ),
    "pixart-sigma": Architecture(
        "PixArt-Sigma", _PIXART_CLASS, {**_PIXART, "use_additional_conditions": False}, 300, 4096, _pixart_sigma_inputs
    ),
    "sana": Architecture("Sana 1.6B", "SanaTransformer2DModel", {}, 300, 2304, _sana_inputs, latents=(32, 32, 32)),
    "sana-sprint": Architecture(
        "Sana Sprint 1.6B",
        "SanaTransformer2DModel",
        _SPRINT,
        300,
        2304,
        _sana_sprint_inputs,
        latents=(32, 32, 32),
        guided=False,
    ),
    "hunyuandit": Architecture(
        "HunyuanDiT 1.2", "HunyuanDiT2DModel", _HUNYUANDIT, 77, 1024, _hunyuandit_inputs, latents=(4, 128, 128)
    ),
    "kandinsky3": Architecture(
        "Kandinsky 3", "Kandinsky3UNet", {}, 128, 4096, _kandinsky3_inputs, latents=(4, 128, 128)
    ),
    "lumina-next": Architecture(
        "Lumina-Next", "LuminaNextDiT2DModel", _LUMINA, PROMPT, 2048, _lumina_inputs, latents=(4, 128, 128)
    ),
    "dreamlite": Architecture(
        "DreamLite", "DreamLiteUNetModel", _DREAMLITE, PROMPT, 2048, _dreamlite_inputs, latents=(4, 128, 128)
    ),
    "sd-x4-upscaler": Architecture(
        "SD x4 upscaler", _UNET, _UPSCALER, 77, 1024, _upscaler_inputs, latents=(7, 128, 128)
    ),
}
