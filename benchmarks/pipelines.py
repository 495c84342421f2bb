"""Every pipeline of diffusers with a denoiser, and what becomes of it under `tgate_fx.gate`: docs/pipelines.md.

    python -m benchmarks.pipelines docs/pipelines.md

A pipeline is *tested* if it is among the tiny pipelines of the tests (`tests.zoo`), which are compared with an oracle.
Of every other one `tgate_fx.gate` is asked itself, with a denoiser of its class's default size, without weights.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import tgate_fx
from tests import zoo
from tgate_fx.families import FAMILIES

LIMITS = Path(__file__).parent / "results" / "macs-limits.json"

_ATTRIBUTES = ("unet", "transformer", "transformer_2", "image_unet", "decoder", "prior")

# UNets whose attention has text and image in one softmax, by the beginning of their pipelines' names.
_JOINT_UNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (64, 64),
}
_JOINT_UNETS = ("IF", "Kandinsky", "UnCLIP")

# What a class needs besides its defaults to be made at all.
_CONFIGS: dict[str, dict[str, Any]] = {
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4},
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "sample_size": 64,
        "patch_size": 2,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "UniDiffuserModel": {"in_channels": 4, "out_channels": 4, "sample_size": 16, "patch_size": 2},
    "Transformer2DModel": {"num_vector_embeds": 8, "sample_size": 4, "cross_attention_dim": 64},
}

# Without defaults to be made with, and read instead: text and image are one sequence.
_JOINT = ("EasyAnimateTransformer3DModel", "HiDreamImageTransformer2DModel", "OmniGenTransformer2DModel")


@dataclass(frozen=True)
class Row:
    """One pipeline.

    Attributes:
        pipeline: its class.
        denoiser: its denoiser's class.
        status: "tested", "gated" or "refused".
        reason: why it is refused.
        calls: how often it calls its denoiser in a guided step.
    """

    pipeline: str
    denoiser: str
    status: str
    reason: str = ""
    calls: int | None = None


def pipelines() -> dict[str, type[Any]]:
    """Return every pipeline class of diffusers by its name."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        try:
            members = vars(importlib.import_module(module.name))
        except (ImportError, RuntimeError):  # helpers that need packages of their own
            continue
        for name, cls in members.items():
            own = inspect.isclass(cls) and cls.__module__ == module.name
            if own and issubclass(cls, diffusers.DiffusionPipeline) and cls is not diffusers.DiffusionPipeline:
                found[name] = cls
    return dict(sorted(found.items()))


def denoisers(pipeline: type[Any]) -> dict[str, type[nn.Module]]:
    """Return the classes of a pipeline's denoisers, by attribute."""
    found = {}
    hints = typing.get_type_hints(pipeline.__init__)
    for name in _ATTRIBUTES:
        for cls in typing.get_args(hints.get(name)) or (hints.get(name),):
            if inspect.isclass(cls) and issubclass(cls, nn.Module):
                found[name] = cls  # of several, the last: UNetMotionModel, which is made of a UNet2DConditionModel
    return found


def rows() -> list[Row]:
    """Return a row for every pipeline that has a denoiser with attention to text of some kind."""
    tested = {entry.pipeline.split()[0]: entry for entry in reversed(zoo.entries())}
    result = []
    for name, pipeline in pipelines().items():
        classes = denoisers(pipeline)
        if name in tested:
            entry = tested[name]
            cls = classes[entry.denoisers[0]].__name__
            result.append(Row(name, cls, "tested", calls=2 if entry.form == "calls" else 1))
        elif classes:
            result.append(_asked(name, pipeline, classes))
    return result


def _asked(name: str, pipeline: type[Any], classes: dict[str, type[nn.Module]]) -> Row:
    """Return what `tgate_fx.gate` says of a pipeline that is not tested."""
    cls = next(iter(classes.values())).__name__
    if cls in _JOINT:
        return Row(name, cls, "refused", f"{cls} has joint attention")
    pipe = pipeline.__new__(pipeline)
    for attribute, denoiser in classes.items():
        config = _CONFIGS.get(denoiser.__name__, {})
        if denoiser is diffusers.UNet2DConditionModel and name.startswith(_JOINT_UNETS):
            config = _JOINT_UNET
        with torch.device("meta"):
            vars(pipe)[attribute] = denoiser(**config)
    try:
        tgate_fx.gate(pipe)
    except tgate_fx.TGateError as error:
        return Row(name, cls, "refused", str(error).partition(": expected")[0])
    calls = FAMILIES[cls].guidance.calls
    tgate_fx.restore(pipe)
    return Row(name, cls, "gated", calls=calls)


if __name__ == "__main__":
    for row in rows():
        print(row)
