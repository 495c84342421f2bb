"""Every pipeline of diffusers with a denoiser, and what becomes of it under `tgate_fx.gate`: docs/pipelines.md.

    python -m benchmarks.pipelines docs/pipelines.md

A pipeline is gated if it is among the tiny pipelines of the tests (`tests.zoo`), which are compared with an oracle.
Every other one is given to `tgate_fx.gate`, with a denoiser of its class's default size, without weights: it has to be
refused, or else the tests lack it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import tgate_fx
from tests import zoo

LIMITS = Path(__file__).parent / "results" / "macs-limits.json"

_ATTRIBUTES = ("unet", "transformer", "transformer_2", "image_unet", "decoder", "prior")

# UNets that are not like Stable Diffusion's, by the beginning of their pipelines' names: text and image in one softmax,
# or text that enters with the time.
_JOINT_UNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (64, 64),
}
_CLASS_UNET = {
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 512,
    "class_embeddings_concat": True,
}
_UNETS = {
    **dict.fromkeys(("IF", "Kandinsky", "UnCLIP"), _JOINT_UNET),
    **dict.fromkeys(("AudioLDM", "MusicLDM"), _CLASS_UNET),
}

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
        refusal: why it is refused, if it is.
        calls: how often it calls its denoiser in a guided step.
        guided: whether it guides, with two branches.
        whole: whether all of its branches, of which it has more than two, go on after the gate.
    """

    pipeline: str
    denoiser: str
    refusal: str | None = None
    calls: int = 1
    guided: bool = True
    whole: bool = False


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
            result.append(_of_entry(name, classes[entry.denoisers[0]].__name__, entry))
        elif classes:
            result.append(_refused(name, pipeline, classes))
    return result


def _of_entry(name: str, denoiser: str, entry: zoo.Entry) -> Row:
    whole = entry.form == "whole"
    guided = not whole and entry.form != "none"
    return Row(name, denoiser, calls=2 if entry.form == "calls" else 1, guided=guided, whole=whole)


def _refused(name: str, pipeline: type[Any], classes: dict[str, type[Any]]) -> Row:
    """Return why `tgate_fx.gate` refuses a pipeline that is not tested."""
    cls = next(iter(classes.values())).__name__
    if cls in _JOINT:
        return Row(name, cls, f"{cls} has joint attention")
    pipe = pipeline.__new__(pipeline)
    for attribute, denoiser in classes.items():
        config = _CONFIGS.get(denoiser.__name__, {})
        if denoiser is diffusers.UNet2DConditionModel:
            config = next((unet for prefix, unet in _UNETS.items() if name.startswith(prefix)), config)
        with torch.device("meta"):
            vars(pipe)[attribute] = denoiser(**config)
    try:
        tgate_fx.gate(pipe)
    except tgate_fx.TGateError as error:
        return Row(name, cls, str(error).partition(": expected")[0])
    raise AssertionError(f"{name} is gated, but no entry of tests/zoo tests it.")


def models() -> dict[tuple[str, bool], dict[str, Any]]:
    """Return what was counted of the first model of each denoiser class, guided and not; of SDXL under that name."""
    counted = [model for model in json.loads(LIMITS.read_text())["models"] if model["arch"] != "demo"]
    found = {(model["denoiser"], model["guided"]): model for model in reversed(counted)}
    return found | {("SDXL", model["guided"]): model for model in counted if model["arch"] in ("sdxl", "sdxl-lcm")}


def limit(row: Row, counted: dict[tuple[str, bool], dict[str, Any]]) -> str:
    """Return the most that a gate at 40% of the steps gains, and with which model; "-" if none was counted."""
    xl = row.denoiser == "UNet2DConditionModel" and ("XL" in row.pipeline or "Kolors" in row.pipeline)
    model = None if row.whole else counted.get(("SDXL" if xl else row.denoiser, row.guided))
    return "-" if model is None else f"{model['limit']:.2f}x ({model['model']})"


# What calls of the pipelines of these denoisers have to give, if they guide.
_WITH = {"LTX2VideoTransformer3DModel": "`stg_scale=0, modality_scale=1`"}


_HEAD = """\
# Pipelines

Of the {every} pipelines of diffusers {version} that denoise, {tested} are gated and tested against an oracle that is
not of this package. The others are refused, mostly for joint attention.

*With*: what has to be given besides. *Calls*: how often a guided step calls the denoiser. *Most*: what a gate at 40% of
the steps can gain at most, in multiply-adds, with a well-known model of that denoiser class (`tgate-fx macs --limits`).
It is left out where all branches of guidance go on, with `after_gate="both"`, and where no such model was counted with
the pipeline's kind of guidance. Without guidance (SDXL under LCM) a gate saves cross-attention alone.

`python -m benchmarks.pipelines docs/pipelines.md` writes this page.

## Gated

| pipeline | denoiser | with | calls | most |
| --- | --- | --- | --- | --- |"""


def page() -> str:
    """Return docs/pipelines.md."""
    every = rows()
    counted = models()
    gated = [row for row in every if row.refusal is None]
    lines = [_HEAD.format(every=len(every), version=diffusers.__version__, tested=len(gated))]
    for row in gated:
        given = '`after_gate="both"`' if row.whole else _WITH.get(row.denoiser, "") if row.guided else ""
        lines.append(f"| {row.pipeline} | {row.denoiser} | {given} | {row.calls} | {limit(row, counted)} |")
    lines += ["", "## Refused", "", "| pipeline | why |", "| --- | --- |"]
    lines += [f"| {row.pipeline} | {row.refusal} |" for row in every if row.refusal is not None]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
