"""The scales of IP-Adapters as tensors while a step runs, so that another scale needs no other graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .lora_scales import device_of

# diffusers' classes, by name: diffusers takes seconds to import.
_PROCESSORS = ("IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0", "IPAdapterXFormersAttnProcessor")


class _Scale:
    """A number in a tensor, with what the processors do to a number: they multiply by it, and skip what is 0.

    It is never 0, so that 0 is multiplied by like another number and takes no graph of its own.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, number: float, device: torch.device) -> None:
        self.number = number
        with torch.inference_mode(False):
            self.tensor = torch.tensor(number, dtype=torch.float32, device=device)

    def set(self, number: float) -> None:
        if number != self.number:
            self.number = number
            self.tensor.fill_(number)

    def __eq__(self, other: object) -> bool:
        return False

    def __mul__(self, other: torch.Tensor) -> torch.Tensor:
        return self._times(other)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> torch.Tensor:
        """Multiply within a trace, which looks here for what a tensor does with another object."""
        one, other = args  # in either order
        result: torch.Tensor = one._times(other) if isinstance(one, _Scale) else other._times(one)
        return result

    def _times(self, other: torch.Tensor) -> torch.Tensor:
        return (other.float() * self.tensor).to(other.dtype)  # a number is not rounded to half precision either


class ImageScales:
    """Puts tensors in place of the scales of a denoiser's IP-Adapters while a step runs, and numbers back after it.

    Callbacks and ``set_ip_adapter_scale`` see and set numbers, before and between the steps.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._processors: list[nn.Module] = []
        self._kept: dict[nn.Module, list[Any]] = {}
        self._numbers: list[tuple[nn.Module, list[Any]]] = []  # what is out of its place now

    def begin(self) -> None:
        """Begin a generation: see which IP-Adapters there are."""
        self._processors = [module for module in self._denoiser.modules() if type(module).__name__ in _PROCESSORS]
        self._kept = {each: self._kept[each] for each in self._processors if each in self._kept}

    def put(self, device: torch.device) -> None:
        """Put tensors there; the step runs on ``device``."""
        for processor in self._processors:
            numbers: list[Any] = processor.scale  # type: ignore[assignment]
            scales = _in_place_of(numbers, self._kept.get(processor), device_of(processor, device))
            self._kept[processor] = scales
            self._numbers.append((processor, numbers))
            processor.scale = scales

    def give_back(self) -> None:
        """Put the numbers back."""
        for processor, numbers in self._numbers:
            processor.scale = numbers  # type: ignore[assignment]
        self._numbers = []


def _in_place_of(value: Any, kept: Any, device: torch.device) -> Any:
    """Return what stands for a number, or for a list of such, in what was kept of it if that is of its form."""
    if isinstance(value, list):
        if not isinstance(kept, list) or len(kept) != len(value):
            kept = [None] * len(value)
        return [_in_place_of(item, was, device) for item, was in zip(value, kept, strict=True)]
    if not isinstance(value, int | float):
        return value
    if not isinstance(kept, _Scale) or kept.tensor.device != device:
        return _Scale(value, device)
    kept.set(value)
    return kept
