"""Denoisers of Wan and of the models made from it, whose default configuration is that of Wan 2.1 14B."""

from __future__ import annotations

from typing import Any

import torch

from .architecture import Architecture

# diffusers' scripts/convert_wan_to_diffusers.py, as for all of Wan's own.
_SMALL: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_FROM_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
# diffusers' scripts/convert_skyreelsv2_to_diffusers.py.
_SKYREELS: dict[str, Any] = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}


def _5b_inputs(rows: int) -> dict[str, Any]:
    return {"timestep": torch.full((rows, 31 * 22 * 40), 500.0)}  # one for each token


def _image_inputs(rows: int) -> dict[str, Any]:
    return {"encoder_hidden_states_image": torch.randn(rows, 257, 1280)}


def _vace_inputs(rows: int) -> dict[str, Any]:
    return {"control_hidden_states": torch.randn(rows, 96, 21, 90, 160)}


def _animate_inputs(rows: int) -> dict[str, Any]:
    return {
        **_image_inputs(rows),
        "pose_hidden_states": torch.randn(rows, 16, 20, 90, 160),
        "face_pixel_values": torch.randn(rows, 3, 77, 512, 512),
    }


def _anyflow_inputs(rows: int) -> dict[str, Any]:
    return {"timestep": torch.full((rows, 21), 500.0), "r_timestep": torch.full((rows, 21), 250.0)}


def _helios_inputs(rows: int) -> dict[str, Any]:
    history = {"long": 16, "mid": 2, "short": 2}  # of these two the first is the first of all
    return {
        "indices_hidden_states": torch.arange(9)[None],
        **{f"indices_latents_history_{name}": torch.arange(frames)[None] for name, frames in history.items()},
        **{f"latents_history_{name}": torch.randn(rows, 16, frames, 48, 80) for name, frames in history.items()},
    }


_WAN = "WanTransformer3DModel"
_480P, _720P = (21, 60, 104), (21, 90, 160)  # latents of 81 frames

WAN = {
    "wan-1.3b": Architecture("Wan 2.1 1.3B, 480p", _WAN, _SMALL, 512, 4096, latents=(16, *_480P)),
    # Each of the two denoisers of Wan 2.2 14B is like it.
    "wan-14b": Architecture("Wan 2.1 14B, 720p", _WAN, {}, 512, 4096, latents=(16, *_720P)),
    "wan-i2v-14b": Architecture(
        "Wan 2.1 14B I2V, 720p", _WAN, _FROM_IMAGE, 512, 4096, _image_inputs, latents=(36, *_720P)
    ),
    "wan-5b": Architecture("Wan 2.2 5B, 704p, 121 frames", _WAN, _5B, 512, 4096, _5b_inputs, latents=(48, 31, 44, 80)),
    "wan-vace-14b": Architecture(
        "Wan VACE 14B, 720p", "WanVACETransformer3DModel", {}, 512, 4096, _vace_inputs, latents=(16, *_720P)
    ),
    "wan-animate-14b": Architecture(
        "Wan Animate 14B, 720p",
        "WanAnimateTransformer3DModel",
        {"added_kv_proj_dim": 5120},
        512,
        4096,
        _animate_inputs,
        latents=(36, *_720P),
        guided=False,
    ),
    "skyreels-14b": Architecture(
        "SkyReels-V2 14B, 540p",
        "SkyReelsV2Transformer3DModel",
        _SKYREELS,
        512,
        4096,
        latents=(16, 25, 68, 120),
    ),
    # nvidia/ChronoEdit-14B-Diffusers declares its denoiser as one of Wan 2.1 14B from an image.
    "chronoedit-14b": Architecture(
        "ChronoEdit 14B, 720p, 5 frames",
        "ChronoEditTransformer3DModel",
        _FROM_IMAGE,
        512,
        4096,
        _image_inputs,
        latents=(36, 2, 90, 160),
    ),
    "helios-14b": Architecture(
        "Helios 14B, a chunk of 384p",
        "HeliosTransformer3DModel",
        {},
        512,
        4096,
        _helios_inputs,
        latents=(16, 9, 48, 80),
    ),
    # diffusers' scripts/convert_anyflow_to_diffusers.py: that of Wan 2.1 1.3B.
    "anyflow-1.3b": Architecture(
        "AnyFlow 1.3B, 480p",
        "AnyFlowTransformer3DModel",
        _SMALL,
        512,
        4096,
        _anyflow_inputs,
        latents=(21, 16, 60, 104),
        guided=False,
    ),
}
