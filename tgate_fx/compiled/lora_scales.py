"""The scales of LoRA layers as tensors, so that another scale needs no other graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import private
from ..gated import Gated
from .private import copy_each, multiply_each

_SCALE = "scale"  # within cross_attention_kwargs, or attention_kwargs

# What the scale of a call is for in a UNet of an older diffusers, which runs its first layers before it looks at that.
_SCALED = ("down_blocks.", "mid_block.", "up_blocks.", "conv_out")


class LoraScales:
    """Keeps the scales of a denoiser's LoRA layers (peft's) in tensors that stay where they are.

    ``set_adapters`` puts plain numbers there, which torch.compile takes for constants; peft's own
    ``prepare_model_for_compiled_hotswap`` turns them into tensors once, until the next ``set_adapters``. The scale that
    a call gives for all layers is applied here too, and not within the graph: for a step at a time, since other
    pipelines may run the denoiser between two steps.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._is_partial = type(denoiser).__name__ == "UNet2DConditionModel" and private.scales_lora_late()
        self._tensors: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._numbers: dict[tuple[nn.Module, str], float] = {}  # what was there before
        self._scaled: list[torch.Tensor] = []  # what the scale that a call gives is for
        self._own: list[torch.Tensor] = []  # what these are without it, once one is given
        self._factor: Any = 1.0
        self._is_due = False
        self._may_change = False

    def begin(self, *, may_change: bool) -> None:
        """Begin a generation; ``may_change`` if scales may between its steps."""
        self._is_due = True
        self._may_change = may_change

    def put(self, inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """See that every layer's scale is right for this step; return the inputs without the scale for all of them.

        The step runs on ``device``.
        """
        if self._is_due or self._may_change:
            self._is_due = False
            self._keep(device)
        if not private.takes_loras(self._denoiser):
            return inputs
        self._factor, inputs = _without_scale(inputs)
        if self._factor != 1.0 and self._scaled:
            if not self._own:
                self._own = [tensor.clone() for tensor in self._scaled]
            multiply_each(self._scaled, self._factor)
        return inputs

    def take_out(self) -> None:
        """End the step: every layer has its own scale again."""
        if self._factor != 1.0 and self._scaled:
            copy_each(self._scaled, self._own)
        self._factor = 1.0

    def give_back(self) -> None:
        """Put back the numbers that were there before."""
        for (layer, adapter), number in self._numbers.items():
            tensor = self._tensors.get((layer, adapter))
            if tensor is not None and layer.scaling.get(adapter) is tensor:  # type: ignore[operator, union-attr]
                same = bool(tensor == number)
                layer.scaling[adapter] = number if same else float(tensor)  # type: ignore[index, operator]
        self._tensors, self._numbers, self._scaled, self._own = {}, {}, [], []

    def _keep(self, runs_on: torch.device) -> None:
        kept: dict[tuple[nn.Module, str], torch.Tensor] = {}
        scaled = []
        for name, layer, adapter, scale in _scales(self._denoiser):
            device = device_of(layer, runs_on)
            key = (layer, adapter)
            tensor = scale
            if not isinstance(scale, torch.Tensor):
                number = float(scale)
                tensor = self._tensors.get(key)
                if tensor is None or tensor.device != device:
                    with torch.inference_mode(False):
                        tensor = torch.tensor(number, device=device)
                tensor.fill_(number)
                self._numbers[key] = number
                layer.scaling[adapter] = tensor  # type: ignore[index, operator]
            kept[key] = tensor
            if not self._is_partial or name.startswith(_SCALED):
                scaled.append(tensor)
        self._tensors = kept
        self._numbers = {key: number for key, number in self._numbers.items() if key in kept}
        self._scaled, self._own = scaled, []


def _scales(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, str, Any]]:
    """Yield each LoRA layer, after its name, with each of its adapters and that one's scale."""
    if not hasattr(denoiser, "peft_config"):  # which peft gives to every model that has some
        return
    for name, module in denoiser.named_modules():
        scaling = vars(module).get("scaling")
        if isinstance(scaling, dict) and hasattr(module, "lora_A"):
            for adapter, scale in scaling.items():
                yield name, module, adapter, scale


@contextmanager
def own_scales(gated: Gated) -> Iterator[None]:
    """Context manager: LoRA layers have their own scales, and keep them, whatever a call's scale is traced or run.

    Enter it where no generation of the pipeline runs.
    """
    gated.take_back()
    kept = [
        (layer, adapter, scale, scale.clone() if isinstance(scale, torch.Tensor) else None)
        for each in gated.all
        for _, layer, adapter, scale in _scales(each.network.module)
    ]
    try:
        yield
    finally:
        for layer, adapter, scale, value in kept:
            layer.scaling[adapter] = scale if value is None else scale.copy_(value)  # type: ignore[index, operator]


def device_of(layer: nn.Module, runs_on: torch.device) -> torch.device:
    """Return the device that a layer computes on, if the step runs on that one: offloaded weights are elsewhere yet."""
    device = next(layer.parameters()).device
    return runs_on if device.type in ("cpu", "meta") else device


def _without_scale(inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the scale for all layers, 1 if none is given, and the inputs without it."""
    result = dict(inputs)
    factor: Any = 1.0
    for name, value in inputs.items():
        if name.endswith("attention_kwargs") and isinstance(value, dict) and _SCALE in value:
            # None, its default, if nothing is left, so that both are one graph.
            result[name] = {key: item for key, item in value.items() if key != _SCALE} or None
            factor = value[_SCALE]
    return factor, result
