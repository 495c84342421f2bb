"""The scales of LoRA layers as tensors, so that another scale needs no other graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import private

_SCALE = "scale"  # within cross_attention_kwargs, or attention_kwargs

# What the scale of a call is for in a UNet of an older diffusers, which runs its first layers before it looks at that.
_SCALED = ("down_blocks.", "mid_block.", "up_blocks.", "conv_out")


class LoraScales:
    """Keeps the scales of a denoiser's LoRA layers (peft's) in tensors that stay where they are.

    ``set_adapters`` puts plain numbers there, which torch.compile takes for constants; peft's own
    ``prepare_model_for_compiled_hotswap`` turns them into tensors once, until the next ``set_adapters``. The scale that
    a call gives for all layers is applied here too, and not within the graph.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._is_partial = type(denoiser).__name__ == "UNet2DConditionModel" and private.scales_lora_late()
        self._fixed: set[tuple[nn.Module, str]] = set()  # what the scale that a call gives is not for
        self._tensors: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._numbers: dict[tuple[nn.Module, str], float] = {}  # what was there before
        self._unscaled: list[tuple[torch.Tensor, torch.Tensor]] = []  # tensors that are scaled now, and what they were
        self._factor: Any = 1.0
        self._is_due = False
        self._calls_back = False

    def begin(self, *, calls_back: bool) -> None:
        """Begin a generation; ``calls_back`` if scales may change between its steps."""
        self._is_due = True
        self._calls_back = calls_back

    def settle(self, inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """See that every layer's scale is right for this step; return the inputs without the scale for all of them.

        The step runs on ``device``.
        """
        if self._is_due or self._calls_back:
            self._is_due = False
            self._keep(device)
        if not self._tensors:
            return inputs
        factor, inputs = _without_scale(inputs)
        if factor != self._factor:
            self._apply(factor)
        return inputs

    def end(self) -> None:
        """End the generation: every layer has its own scale again."""
        self._apply(1.0)

    def give_back(self) -> None:
        """Put back the numbers that were there before."""
        for (layer, adapter), number in self._numbers.items():
            tensor = self._tensors.get((layer, adapter))
            if tensor is not None and layer.scaling.get(adapter) is tensor:  # type: ignore[operator, union-attr]
                same = bool(tensor == number)
                layer.scaling[adapter] = number if same else float(tensor)  # type: ignore[index, operator]
        self._tensors, self._numbers = {}, {}

    def _keep(self, runs_on: torch.device) -> None:
        kept: dict[tuple[nn.Module, str], torch.Tensor] = {}
        self._fixed = set()
        for name, layer, adapter, scale in self._scales():
            device = device_of(layer, runs_on)
            key = (layer, adapter)
            tensor = scale
            if self._is_partial and not name.startswith(_SCALED):
                self._fixed.add(key)
            if not isinstance(scale, torch.Tensor):
                factor = 1.0 if key in self._fixed else self._factor
                number = float(scale)
                tensor = self._tensors.get(key)
                if tensor is None or tensor.device != device:
                    with torch.inference_mode(False):
                        tensor = torch.tensor(number, device=device)
                tensor.fill_(number * factor)
                self._numbers[key] = number
                layer.scaling[adapter] = tensor  # type: ignore[index, operator]
                self._unscaled = [(each, was) for each, was in self._unscaled if each is not tensor]
                if factor != 1.0:
                    self._unscaled.append((tensor, torch.full_like(tensor, number)))
            kept[key] = tensor
        self._tensors = kept
        self._numbers = {key: number for key, number in self._numbers.items() if key in kept}

    def _apply(self, factor: Any) -> None:
        for tensor, was in self._unscaled:
            tensor.copy_(was)
        self._unscaled = []
        self._factor = factor
        if factor != 1.0:
            scaled = [tensor for key, tensor in self._tensors.items() if key not in self._fixed]
            self._unscaled = [(tensor, tensor.clone()) for tensor in scaled]
            for tensor in scaled:
                tensor.mul_(factor)

    def _scales(self) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """Yield each LoRA layer, after its name, with each of its adapters and that one's scale."""
        if not hasattr(self._denoiser, "peft_config"):  # which peft gives to every model that has some
            return
        for name, module in self._denoiser.named_modules():
            scaling = vars(module).get("scaling")
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                for adapter, scale in scaling.items():
                    yield name, module, adapter, scale


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
