"""Phases computed by OpenVINO's CPU plugin: what ``backend="openvino"`` stands for.

torch's own backend of that name takes attention and normalization apart before OpenVINO sees them, which costs a third
of the speed, and falls back to inductor without a word. Here OpenVINO converts the traced phase itself, and what it
cannot convert is an error.
"""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import UnsupportedError

# What OpenVINO is told to compute in; left to itself it takes bfloat16 wherever the processor can.
_PRECISIONS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def compile_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Any], properties: Mapping[str, Any]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile a graph that holds its weights, for inputs of these shapes.

    Args:
        graph: takes and returns tensors.
        inputs: examples of what it takes.
        properties: further ones for OpenVINO's ``compile_model``.

    Raises:
        UnsupportedError: a tensor is not on the CPU.
    """
    elsewhere = [value for value in inputs if not isinstance(value, torch.Tensor) or value.device.type != "cpu"]
    if elsewhere:
        where = getattr(elsewhere[0], "device", type(elsewhere[0]).__name__)
        raise UnsupportedError(
            f'backend="openvino" was given an input on {where}: expected tensors on the CPU. Use inductor there.'
        )
    with torch.no_grad():
        return compile_function(graph, inputs, _precision(graph), properties)


def compile_function(
    function: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    precision: torch.dtype,
    properties: Mapping[str, Any],
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Compile a module that takes such inputs and returns a tuple of tensors."""
    openvino: Any = importlib.import_module("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tracing takes as constant, which it is here
        model = openvino.convert_model(function, example_input=tuple(inputs))
    for placeholder, value in zip(model.inputs, inputs, strict=True):
        placeholder.get_node().set_partial_shape(openvino.PartialShape(list(value.shape)))
    model.validate_nodes_and_infer_types()
    defaults = {"INFERENCE_PRECISION_HINT": _PRECISIONS.get(precision, "f32"), "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", {**defaults, **properties}).create_infer_request()

    def run(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        request.infer([_shared(openvino, tensor) for tensor in args], share_inputs=True, share_outputs=True)
        return tuple([_copied(openvino, output) for output in request.output_tensors])

    return run


def _precision(graph: torch.fx.GraphModule) -> torch.dtype:
    """That of most weights."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in graph.parameters():
        sizes[weight.dtype] += weight.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _shared(openvino: Any, tensor: torch.Tensor) -> Any:
    """Return a tensor as OpenVINO takes it, in the same memory if that is dense."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:  # which numpy does not have
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return tensor.numpy()


def _copied(openvino: Any, output: Any) -> torch.Tensor:
    """Return an output in memory of its own: the next run writes to OpenVINO's."""
    values = torch.from_numpy(output.data)
    if output.element_type == openvino.Type.bf16:
        values = values.view(torch.bfloat16)
    return values.clone()
