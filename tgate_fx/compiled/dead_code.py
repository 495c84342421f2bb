"""What may be taken out of a graph: nodes that nothing uses and that do nothing but compute their value.

FX's own rule calls a dropout impure even when it is off, and says nothing of most functions in Dynamo's graphs, which
are not yet functional. Graphs of ATen operators need no more than their schemas, see `tgate_fx.phase_graph`.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from . import private


def remove_dead_code(graph: torch.fx.Graph, may_have_an_effect: Callable[[torch.fx.Node], bool]) -> None:
    """Remove the nodes that nothing uses, save inputs and those that may have an effect.

    FX's own method (``eliminate_dead_code``) does so in the bodies of control flow too, and there by a rule of its own.
    """
    for node in reversed(graph.nodes):
        if not node.users and not may_have_an_effect(node):
            graph.erase_node(node)


def may_have_an_effect(node: torch.fx.Node) -> bool:
    """Return whether a node may do more than compute its value: some do, such as writing in place. In doubt it may."""
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
    if private.is_api_statistic(node.target):
        return False
    name = getattr(node.target, "__name__", "")
    is_operator = any(getattr(within, name, None) is node.target for within in private.operator_namespaces())
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
    """Return whether the ATen operator of this name, in each overload, neither writes nor draws random numbers."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "batch_norm" in name or "instance_norm" in name:  # these update statistics, undeclared
        return name in _CONVERSIONS
    overloads = [getattr(packet, name) for name in packet.overloads() if "out" not in name]
    return not any(
        private.writes(each) or torch.Tag.nondeterministic_seeded in each.tags or not private.returns(each)
        for each in overloads
    )


def _argument(node: torch.fx.Node, name: str) -> Any:
    """Return the value bound to this parameter of the node's function."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)
