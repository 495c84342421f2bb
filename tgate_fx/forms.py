"""The forms of values: the one of a denoiser's inputs that a graph is compiled for, and tensors without contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .families import LATENTS


def canonical(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[object, ...]]:
    """The denoiser's inputs in the one form that is compiled for, and a description of that form.

    Timesteps become float32 tensors (schedulers hand over int64 or float32), so that neither costs a graph of its own,
    and every tensor but the latents contiguous; the latents take the layout that the first call of the form had. Two
    calls whose forms are equal then fit the same graph: names, types, shapes, dtypes, devices, values that are not
    tensors, and which tensors are one.
    """
    tensors: list[torch.Tensor] = []
    result, form = _canonical(inputs, tensors)
    addresses = [id(tensor) for tensor in tensors]
    if len(set(addresses)) < len(addresses):
        form = (*form, *[addresses.index(address) for address in addresses])
    return result, form


def _canonical(inputs: Mapping[str, Any], tensors: list[torch.Tensor]) -> tuple[dict[str, Any], tuple[object, ...]]:
    result: dict[str, Any] = {}
    form: list[object] = []
    for name, value in inputs.items():
        if name == "timestep":
            value = torch.as_tensor(value, dtype=torch.float32)
        if isinstance(value, torch.Tensor):
            if name not in LATENTS:
                value = value.contiguous()
            tensors.append(value)
            form.append((name, type(value), value.shape, value.dtype, value.device))
        elif isinstance(value, dict):
            value, inner = _canonical(value, tensors)
            form.append((name, inner))
        elif isinstance(value, (list, tuple)):
            items, inner = _canonical({str(index): item for index, item in enumerate(value)}, tensors)
            value = type(value)(items.values()) if type(value) in (list, tuple) else value
            form.append((name, type(value), inner))
        elif value is None or isinstance(value, (bool, int, float, str)):
            form.append((name, type(value), value))
        else:
            form.append((name, id(value)))
        result[name] = value
    return result, tuple(form)


def on_meta(value: Any) -> Any:
    """The same value with every tensor in it as one on the meta device: its form without its contents."""
    return tree_map_only(torch.Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), value)


def memory_format(latents: torch.Tensor) -> torch.memory_format:
    """The layout of these latents: a VAE may encode an image into channels-last ones."""
    if latents.ndim == 4 and not latents.is_contiguous() and latents.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
