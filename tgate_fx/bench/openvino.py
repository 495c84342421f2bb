"""Diffusers' own denoiser, computed by OpenVINO's CPU plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compiled.openvino import compile_function
from ..inputs import map_tensors, tensors_in


def convert(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Replace a denoiser's ``forward`` by one that OpenVINO compiles from the inputs of the first call."""
    compiled: Callable[..., tuple[torch.Tensor, ...]] | None = None
    plain = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        tensors = tensors_in((args, kwargs))
        if compiled is None:
            compiled = compile_function(_OfTensors(plain, args, kwargs), tensors, dtype, {})
        return compiled(*tensors)

    denoiser.forward = forward


class _OfTensors(nn.Module):
    """A denoiser as a function of the tensors among its arguments; all else stays as it was."""

    def __init__(self, forward: Any, args: Any, kwargs: Any) -> None:
        super().__init__()
        self._denoiser_forward = forward
        self._arguments = args, kwargs

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        args, kwargs = map_tensors(lambda _: next(given), self._arguments)
        output: torch.Tensor = self._denoiser_forward(*args, **kwargs)[0]
        return output
