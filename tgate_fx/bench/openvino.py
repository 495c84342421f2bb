"""OpenVINO's CPU plugin: for a denoiser as it is, and as a backend of torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten


def _config(dtype: str) -> dict[str, str]:
    # Left to itself the plugin computes in bfloat16 wherever the processor can.
    return {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype], "PERFORMANCE_HINT": "LATENCY"}


def settings(dtype: str) -> dict[str, Any]:
    """Keywords of torch.compile for OpenVINO's backend; from now on it raises where it would fall back silently."""
    importlib.import_module("openvino.torch")  # registers the backend
    dynamo = "openvino.frontend.pytorch.torchdynamo"
    backend: Any = importlib.import_module(f"{dynamo}.backend")
    backend.compile_fx = _refuse  # what it compiles with instead of OpenVINO
    execute: Any = importlib.import_module(f"{dynamo}.execute")
    execute.openvino_execute = _loud(execute.openvino_execute)
    # Without aot_autograd it fails on these models, with torch 2.13 and by itself too.
    return {"backend": "openvino", "options": {"config": _config(dtype), "aot_autograd": True}}


class NotByOpenVINO(BaseException):
    """A graph that OpenVINO would have left to torch; the backend catches every `Exception`."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise NotByOpenVINO("OpenVINO cannot compile this graph")


def _loud(execute: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return execute(*args, **kwargs)
        except Exception as error:
            raise NotByOpenVINO(f"OpenVINO cannot run this graph: {error}") from error

    return checked


def convert(denoiser: nn.Module, dtype: str) -> None:
    """Replace a denoiser's ``forward`` by one that OpenVINO compiles from the inputs of the first call."""
    openvino: Any = importlib.import_module("openvino")
    compiled: Any = None
    plain = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if compiled is None:
            model = openvino.convert_model(_OfTensors(plain, leaves, spec), example_input=tuple(tensors))
            for model_input, tensor in zip(model.inputs, tensors, strict=True):
                model_input.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
            model.validate_nodes_and_infer_types()
            compiled = openvino.Core().compile_model(model, "CPU", _config(dtype))
        (output,) = compiled([tensor.numpy() for tensor in tensors]).values()
        return (torch.from_numpy(output.copy()),)

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
