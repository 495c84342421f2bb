"""Denoisers of videos, but for Wan's."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import PROMPT, Architecture


def _ltx_inputs(rows: int) -> dict[str, Any]:
    return {
        "encoder_attention_mask": torch.ones(rows, 128),
        "num_frames": 21,
        "height": 16,
        "width": 22,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _ltx2_inputs(rows: int) -> dict[str, Any]:
    return {
        "audio_hidden_states": torch.randn(rows, 126, 128),
        "audio_encoder_hidden_states": torch.randn(rows, 1024, 3840),
        "encoder_attention_mask": torch.ones(rows, 1024),
        "audio_encoder_attention_mask": torch.ones(rows, 1024),
        "num_frames": 16,
        "height": 16,
        "width": 24,
        "audio_num_frames": 126,
    }


def _sana_video_inputs(rows: int) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(rows, 300)}


def _sana_wm_inputs(rows: int) -> dict[str, Any]:
    return {
        "timestep": torch.full((rows, 1, 21), 500.0),
        "encoder_hidden_states": torch.randn(rows, 1, 300, 2304),
        "mask": torch.ones(rows, 300),
        "camera_conditions": torch.randn(rows, 21, 20),
        "chunk_plucker": torch.randn(rows, 48, 21, 22, 40),
        "data_info": {"img_hw": torch.full((1, 2), 704.0)},
    }


def _cosmos2_inputs(rows: int) -> dict[str, Any]:
    return {"timestep": torch.full((rows, 1, 24, 1, 1), 0.5), "fps": 16}  # one for each frame


def _kandinsky5_inputs(rows: int) -> dict[str, Any]:
    return {
        "pooled_projections": torch.randn(rows, 768),
        "visual_rope_pos": [torch.arange(31), torch.arange(32), torch.arange(48)],
        "text_rope_pos": torch.arange(PROMPT),
    }


def _kandinsky6_inputs(rows: int) -> dict[str, Any]:
    return {
        "pooled_projections": torch.randn(rows, 768),
        "audio_hidden_states": torch.randn(rows, 218, 40),
        "encoder_attention_mask": torch.ones(rows, 1024, dtype=torch.bool),
    }


def _allegro_inputs(rows: int) -> dict[str, Any]:
    frames, height, width = 22, 45, 80
    turns = tuple((torch.ones(length, 32), torch.ones(length, 32)) for length in (frames, height, width))
    places = tuple(torch.zeros(1, frames * height * width, dtype=torch.long) for _ in range(3))
    return {"encoder_attention_mask": torch.ones(rows, 512), "image_rotary_emb": (turns, places)}


def _animatediff_inputs(rows: int) -> dict[str, Any]:
    return {"encoder_hidden_states": torch.randn(16 * rows, 77, 768)}  # for each frame


def _i2vgen_inputs(rows: int) -> dict[str, Any]:
    return {
        "fps": torch.full((rows,), 16.0),
        "image_latents": torch.randn(rows, 4, 16, 88, 160),
        "image_embeddings": torch.randn(rows, 1, 1024),
    }


def _svd_inputs(rows: int) -> dict[str, Any]:
    return {"added_time_ids": torch.ones(rows, 3)}


# Cosmos adds a mask of padding to the latents' channels, by a function of torchvision's. Here the mask is among them,
# so that the model is the same one without torchvision.
_COSMOS: dict[str, Any] = {"in_channels": 17, "concat_padding_mask": False}
# diffusers' scripts/convert_cosmos_to_diffusers.py.
_COSMOS2: dict[str, Any] = {
    "in_channels": 18,
    "concat_padding_mask": False,
    "num_attention_heads": 16,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}
# diffusers' scripts/convert_sana_video_to_diffusers.py.
_SANA_VIDEO: dict[str, Any] = {"mlp_ratio": 3.0}
# kandinskylab/kandinsky-5, get_default_conf of its T2V pipeline.
_KANDINSKY5: dict[str, Any] = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_cond": True,
}
# The transformer's config.json of kandinskylab/Kandinsky-6.0-Pro-sft-5s-Diffusers, as public ports of it have it.
_KANDINSKY6: dict[str, Any] = {
    "in_audio_dim": 40,
    "out_audio_dim": 40,
    "model_dim_a": 2048,
    "time_dim_a": 1024,
    "ff_dim_a": 7168,
    "axes_dims_a": (32, 48, 48),
    "audio_freqs_scaling": 0.144,
    "text_token_padding": True,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
    "visual_token_type_num_embeddings": 2,
}
# What diffusers makes of SD-1.5 and the adapter guoyww/animatediff-motion-adapter-v1-5-3.
_ANIMATEDIFF: dict[str, Any] = {"cross_attention_dim": 768, "use_motion_mid_block": False}
# The transformer's config.json of Latte-1, as the test of hpcaitech/VideoSys has it.
_LATTE: dict[str, Any] = {
    "num_layers": 28,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}

VIDEOS = {
    "ltx-2b": Architecture(
        "LTX-Video 2B, 512p, 161 frames",
        "LTXVideoTransformer3DModel",
        {},
        128,
        4096,
        _ltx_inputs,
        latents=(21 * 16 * 22, 128),
    ),
    # Without the calls that its pipeline adds to those of guidance: of spatio-temporal and of modality guidance.
    "ltx-2": Architecture(
        "LTX-2 19B, 512p, 121 frames",
        "LTX2VideoTransformer3DModel",
        {},
        1024,
        3840,
        _ltx2_inputs,
        latents=(16 * 16 * 24, 128),
    ),
    "sana-video": Architecture(
        "Sana-Video 2B, 480p",
        "SanaVideoTransformer3DModel",
        _SANA_VIDEO,
        300,
        2304,
        _sana_video_inputs,
        latents=(16, 21, 60, 104),
    ),
    "sana-wm": Architecture(
        "Sana-WM, 704p, 161 frames",
        "SanaWMTransformer3DModel",
        {},
        300,
        2304,
        _sana_wm_inputs,
        latents=(128, 21, 22, 40),
    ),
    "cosmos1-7b": Architecture(
        "Cosmos 1 7B, 704p, 121 frames",
        "CosmosTransformer3DModel",
        _COSMOS,
        512,
        1024,
        lambda rows: {"fps": 30},
        latents=(17, 16, 88, 160),
    ),
    "cosmos2-2b": Architecture(
        "Cosmos 2 2B, 704p, 93 frames",
        "CosmosTransformer3DModel",
        _COSMOS2,
        512,
        1024,
        _cosmos2_inputs,
        latents=(18, 24, 88, 160),
    ),
    "kandinsky5-lite": Architecture(
        "Kandinsky 5 Lite, 512p, 5 s",
        "Kandinsky5Transformer3DModel",
        _KANDINSKY5,
        PROMPT,
        3584,
        _kandinsky5_inputs,
        latents=(31, 64, 96, 33),
    ),
    "kandinsky6-pro": Architecture(
        "Kandinsky 6 Pro, 512p, 5 s",
        "Kandinsky6Transformer3DModel",
        _KANDINSKY6,
        1024,
        3584,
        _kandinsky6_inputs,
        latents=(31, 64, 96, 33),
    ),
    "latte": Architecture(
        "Latte-1, 512p, 16 frames", "LatteTransformer3DModel", _LATTE, 120, 4096, latents=(4, 16, 64, 64)
    ),
    "allegro": Architecture(
        "Allegro, 720p, 88 frames",
        "AllegroTransformer3DModel",
        {},
        512,
        4096,
        _allegro_inputs,
        latents=(4, 22, 90, 160),
    ),
    "animatediff": Architecture(
        "AnimateDiff, 512p, 16 frames",
        "UNetMotionModel",
        _ANIMATEDIFF,
        77,
        768,
        _animatediff_inputs,
        latents=(4, 16, 64, 64),
    ),
    "modelscope": Architecture(
        "ModelScope, 256p, 16 frames", "UNet3DConditionModel", {}, 77, 1024, latents=(4, 16, 32, 32)
    ),
    "i2vgen-xl": Architecture(
        "I2VGen-XL, 704p, 16 frames", "I2VGenXLUNet", {}, 77, 1024, _i2vgen_inputs, latents=(4, 16, 88, 160)
    ),
    "svd": Architecture(
        "SVD, 576p, 25 frames",
        "UNetSpatioTemporalConditionModel",
        {},
        1,
        1024,
        _svd_inputs,
        latents=(25, 8, 72, 128),
    ),
}
