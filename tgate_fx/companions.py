"""Companions: networks that a pipeline runs beside its denoiser, on the same batch and before it in each step.

A ControlNet is one: what it gives is an input of the denoiser. After the gate it runs on the branch that goes on, with
cross-attentions of its own that are cached by the same rule.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from .families import FAMILIES, Family
from .network import Network
from .rows import Rows

_CONTROL = (
    "sample",
    "timestep_cond",
    "attention_mask",
    "encoder_hidden_states",
    "class_labels",
    "controlnet_cond",
    "text_embeds",
    "time_ids",
)


def _beside(denoiser: str, *batched: str) -> Family:
    """One that is given what its denoiser's class is given, and more."""
    family = FAMILIES[denoiser]
    return replace(family, rows=replace(family.rows, batched=family.rows.batched | set(batched)))


# As in `families`, one row for each class. One of a class that is not here runs as it is, on the whole batch.
COMPANIONS = {
    "ControlNetModel": Family(Rows(frozenset(_CONTROL))),
    # One image of control for each of its kinds.
    "ControlNetUnionModel": Family(Rows(frozenset((*_CONTROL, "control_type")))),
    "SparseControlNetModel": Family(Rows(frozenset((*_CONTROL, "conditioning_mask")))),
    "HunyuanDiT2DControlNetModel": _beside("HunyuanDiT2DModel", "controlnet_cond"),
    "SanaControlNetModel": _beside("SanaTransformer2DModel", "controlnet_cond"),
}


def companions_of(pipe: Any) -> list[Network]:
    """Return the networks that run beside the pipeline's denoiser and can be gated with it.

    Raises:
        UnsupportedError: one has no cross-attention, or cannot be gated as it is.
    """
    found = _controlnets(pipe)
    runs_once = Counter(map(id, found.values()))
    return [
        Network(name, module, COMPANIONS[type(module).__name__], None)
        for name, module in found.items()
        if type(module).__name__ in COMPANIONS and runs_once[id(module)] == 1
    ]


def only_conditional(pipe: Any, guess_mode: Any) -> bool:
    """Return whether the pipeline's ControlNets are given the conditional branch alone, and the other one gets zeros.

    Args:
        pipe: the pipeline.
        guess_mode: what the call binds to this keyword.
    """
    # As diffusers' pipelines have it, the first one says it for all.
    first = next(iter(_controlnets(pipe).values()), None)
    return bool(guess_mode or getattr(getattr(first, "config", None), "global_pool_conditions", False))


def _controlnets(pipe: Any) -> dict[str, nn.Module]:
    """Return a pipeline's ControlNets by attribute, of several each one."""
    module = getattr(pipe, "controlnet", None)
    if not isinstance(module, nn.Module):
        return {}
    several = getattr(module, "nets", None)
    if several is None:
        return {"controlnet": module}
    return {f"controlnet.nets.{index}": each for index, each in enumerate(several)}
