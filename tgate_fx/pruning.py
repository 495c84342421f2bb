"""A torch.compile backend around another: what a phase does not use is taken out of its graph first."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from . import openvino
from .held import HeldWeights
from .linears import onednn_on_amd
from .release import made_modules, release_with
from .settings import inductor_options


class PrunedBackend:
    """A torch.compile backend, handed graphs without dead code and without the inputs that only dead code used.

    So the post-gate graph has neither the text nor any parameter that only the text went through (PixArt's caption
    projection), which Dynamo leaves in.

    Args:
        backend: the backend itself.
        held: is told, before a graph is compiled, of the tensors that are part of it; None to leave it.
    """

    def __init__(self, backend: str | Callable[..., Any], held: HeldWeights | None = None) -> None:
        self._backend = backend
        # Dynamo keeps backends for good, and must not keep the denoiser with them.
        self._held = weakref.ref(held) if held is not None else None

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile ``graph``; ``kwargs`` are the mode and options that torch.compile was given."""
        remove_dead_code(graph.graph, _may_have_an_effect)
        placeholders = graph.graph.find_nodes(op="placeholder")
        used = [bool(node.users) for node in placeholders]
        for node, keep in zip(placeholders, used, strict=True):
            if not keep:
                graph.graph.erase_node(node)
        graph.recompile()
        held = self._held() if self._held is not None else None
        if held is not None:
            read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
            tensors = itertools.chain(graph.named_parameters(), graph.named_buffers())
            held.hold([tensor for name, tensor in tensors if name in read])
        with made_modules() as modules:
            compiled = self._compile(graph, list(itertools.compress(inputs, used)), kwargs)
        count = sum(used)

        def run(*args: Any) -> Any:
            # Dynamo passes what the graph has left when this returns; should it pass all that it began with, choose.
            return compiled(*args) if len(args) == count else compiled(*itertools.compress(args, used))

        release_with(run, modules)
        return run

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if self._backend == "openvino":
            return openvino.compile_graph(graph, inputs, kwargs.get("options") or {})
        if self._backend == "inductor":
            # torch.compile turns a mode into options, but not for a backend like this one.
            kwargs = {"config_patches": inductor_options(kwargs.get("mode"), kwargs.get("options"))}
        with onednn_on_amd():
            compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(graph, inputs, **kwargs)
        return compiled


def remove_dead_code(graph: torch.fx.Graph, may_have_an_effect: Callable[[torch.fx.Node], bool]) -> None:
    """Take out what is not used, save inputs and what may have an effect.

    FX's own method would do so in the bodies of control flow as well, and there by a rule of its own.
    """
    for node in reversed(graph.nodes):
        if not node.users and not may_have_an_effect(node):
            graph.erase_node(node)


def _may_have_an_effect(node: torch.fx.Node) -> bool:
    """Whether a node may do more than compute its value: some do, such as writing in place. In doubt it may."""
    if node.op == "call_method":
        return not _only_computes(str(node.target))
    if node.op != "call_function":
        return bool(node.is_impure())
    if node.target in _LAYERS:
        return bool(_argument(node, "inplace"))
    if node.target is functional.dropout:
        return bool(_argument(node, "training") or _argument(node, "inplace"))
    if node.target is functional.scaled_dot_product_attention:
        return len(node.args) > 4 or bool(node.kwargs.get("dropout_p"))
    if node.target is torch._C._log_api_usage_once:  # torch's own statistics
        return False
    name = getattr(node.target, "__name__", "")
    is_operator = any(getattr(within, name, None) is node.target for within in (torch, torch._C._nn))
    return "out" in node.kwargs or not (node.target in _ARITHMETIC or (is_operator and _only_computes(name)))


_ARITHMETIC = frozenset(
    vars(operator)[name]
    for name in (
        *("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "pos"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "invert"),
    )
)

# What text and a deep branch go through in a denoiser, of the functions that are Python.
_LAYERS = frozenset(
    vars(functional)[name]
    for name in (
        *("silu", "relu", "relu6", "leaky_relu", "elu", "hardswish", "mish", "softmax"),
        *("layer_norm", "rms_norm", "group_norm", "normalize", "interpolate"),
    )
)

# Methods of tensors without an operator of the same name.
_CONVERSIONS = frozenset(("float", "half", "bfloat16", "double", "int", "long", "bool", "type"))


@functools.cache
def _only_computes(name: str) -> bool:
    """Whether the ATen operator of this name, in each of its forms, neither writes nor draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "batch_norm" in name or "instance_norm" in name:  # these update statistics, undeclared
        return name in _CONVERSIONS
    forms = [getattr(packet, form) for form in packet.overloads() if "out" not in form]
    return not any(
        form._schema.is_mutable or torch.Tag.nondeterministic_seeded in form.tags or not form._schema.returns
        for form in forms
    )


def _argument(node: torch.fx.Node, name: str) -> Any:
    """What a node gives to this parameter of its function, by keyword, by position or by default."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)
