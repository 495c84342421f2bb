"""A denoiser's inputs: which are the latents, what a graph is compiled for, and tensors without contents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import StateError

# The denoiser's first input; where latents are tokens, these are their identifiers.
LATENTS = ("sample", "hidden_states", "input_ids")

_SCALE = "conditioning_scale"  # of a ControlNet


def latents_of(inputs: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """Return the name and value of the latents among the denoiser's inputs.

    Raises:
        StateError: there are none.
    """
    for name in LATENTS:
        if isinstance(inputs.get(name), torch.Tensor):
            return name, inputs[name]
    raise StateError(
        f"The denoiser was given {', '.join(inputs)}: expected its latents as {' or '.join(LATENTS)}. Call the "
        "pipeline as diffusers documents it."
    )


def floats_of(values: Any) -> list[float]:
    """Return the numbers of a scheduler's tensor, array or list."""
    return [float(each) for each in getattr(values, "tolist", lambda: values)()]


def canonical(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[object, ...]]:
    """Return a network's inputs as graphs are compiled for them, and their signature.

    Timesteps become float32 tensors (schedulers hand over int64 or float32), and so does a ControlNet's scale, so that
    no number costs a graph of its own. Every tensor but the latents becomes contiguous; the latents take the layout of
    the first call with this signature. Two calls with equal signatures fit the same graph: names, types, shapes,
    dtypes, devices, values that are not tensors, and which tensors are one.
    """
    tensors: list[torch.Tensor] = []
    if _SCALE in inputs:
        inputs = {**inputs, _SCALE: _scale_tensors(inputs)}
    result, signature = _canonical(inputs, tensors)
    addresses = [id(tensor) for tensor in tensors]
    if len(set(addresses)) < len(addresses):
        signature = (*signature, *[addresses.index(address) for address in addresses])
    return result, signature


def _scale_tensors(inputs: Mapping[str, Any]) -> Any:
    """Return a ControlNet's scale as a tensor, one for each image if there are several."""
    scale, image = inputs[_SCALE], inputs.get("controlnet_cond")
    device = latents_of(inputs)[1].device
    if isinstance(image, (list, tuple)):
        scales = scale if isinstance(scale, (list, tuple)) else [scale] * len(image)
        return [_number(float(each), device) for each in scales]
    return _number(float(scale), device)


@functools.lru_cache(maxsize=256)  # at every step the same few
def _number(value: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def _canonical(inputs: Mapping[str, Any], tensors: list[torch.Tensor]) -> tuple[dict[str, Any], tuple[object, ...]]:
    result: dict[str, Any] = {}
    signature: list[object] = []
    for name, value in inputs.items():
        if name == "timestep":
            device = value.device if isinstance(value, torch.Tensor) else "cpu"
            value = torch.as_tensor(value, dtype=torch.float32, device=device)
        if isinstance(value, torch.Tensor):
            if name not in LATENTS:
                value = value.contiguous()
            tensors.append(value)
            signature.append((name, type(value), value.shape, value.dtype, value.device))
        elif isinstance(value, dict):
            value, inner = _canonical(value, tensors)
            signature.append((name, inner))
        elif isinstance(value, (list, tuple)):
            items, inner = _canonical({str(index): item for index, item in enumerate(value)}, tensors)
            value = type(value)(items.values()) if type(value) in (list, tuple) else value
            signature.append((name, type(value), inner))
        elif value is None or isinstance(value, (bool, int, float, str)):
            signature.append((name, type(value), value))
        else:
            signature.append((name, id(value)))
        result[name] = value
    return result, tuple(signature)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Return the same dicts (diffusers' outputs are some), lists and tuples with ``function`` of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {name: map_tensors(function, item) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if type(value) in (list, tuple):
        return type(value)([map_tensors(function, item) for item in value])
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return every tensor in dicts, lists and tuples, in the order of `map_tensors`."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def map_both(function: Callable[[torch.Tensor, torch.Tensor], Any], value: Any, other: Any) -> Any:
    """Return the first of two values of one form with ``function`` of every tensor in it and the second's."""
    following = iter(tensors_in(other))
    return map_tensors(lambda tensor: function(tensor, next(following)), value)


def on_meta(value: Any) -> Any:
    """Return the same value with every tensor in it on the meta device: its shape and dtype without its contents."""
    return map_tensors(lambda tensor: torch.empty_like(tensor, device="meta"), value)


def zeros_like(value: Any, device: torch.device) -> Any:
    """Return the same value with zeros on this device for every tensor in it."""
    return map_tensors(lambda tensor: torch.zeros_like(tensor, device=device), value)


def memory_format(latents: torch.Tensor) -> torch.memory_format:
    """Return the layout of these latents: a VAE may encode an image into channels-last ones."""
    if latents.ndim == 4 and not latents.is_contiguous() and latents.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
