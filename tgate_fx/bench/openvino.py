"""Diffusers' own denoiser, computed by OpenVINO's CPU plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..openvino import compile_function


def convert(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Replace a denoiser's ``forward`` by one that OpenVINO compiles from the inputs of the first call."""
    compiled: Callable[..., tuple[torch.Tensor, ...]] | None = None
    plain = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if compiled is None:
            compiled = compile_function(_OfTensors(plain, leaves, spec), tensors, dtype, {})
        return compiled(*tensors)

    denoiser.forward = forward


class _OfTensors(nn.Module):
    """A denoiser as a function of the tensors among its arguments; all else stays as it was."""

    def __init__(self, forward: Any, leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self._denoiser_forward = forward
        self._leaves = leaves
        self._spec = spec

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        output: torch.Tensor = self._denoiser_forward(*args, **kwargs)[0]
        return output
