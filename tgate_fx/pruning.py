"""A torch.compile backend around another: what a phase does not use is taken out of its graph first."""

from __future__ import annotations

import inspect
import itertools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch


class PrunedBackend:
    """A torch.compile backend, handed graphs without dead code and without the inputs that only dead code used.

    So the post-gate graph has neither the text nor any parameter that only the text went through (PixArt's caption
    projection), which Dynamo leaves in.
    """

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile ``graph``; ``kwargs`` are the mode and options that torch.compile was given."""
        graph.graph.eliminate_dead_code(is_impure_node=_has_effect)
        placeholders = graph.graph.find_nodes(op="placeholder")
        used = [bool(node.users) for node in placeholders]
        for node, keep in zip(placeholders, used, strict=True):
            if not keep:
                graph.graph.erase_node(node)
        graph.recompile()
        compiled = self._compile(graph, list(itertools.compress(inputs, used)), kwargs)
        count = sum(used)

        def run(*args: Any) -> Any:
            # Dynamo passes what the graph has left when this returns; should it pass all that it began with, choose.
            return compiled(*args) if len(args) == count else compiled(*itertools.compress(args, used))

        return run

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if self._backend == "inductor":
            # Inductor itself takes no mode: torch.compile turns it into options, but not for a backend like this one.
            mode = torch._inductor.list_mode_options(kwargs["mode"]) if "mode" in kwargs else {}
            kwargs = {"config_patches": {**mode, **kwargs.get("options", {})}}
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(graph, inputs, **kwargs)
        return compiled


# iadd, imul, ... as methods (__iadd__) and as functions of the operator module, and item assignment.
_IN_PLACE = {name.strip("_") for name in dir(operator) if name.startswith("__i")} | {"setitem"}


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether a node does more than compute its value: Dynamo's graphs may still write in place."""
    if node.op in ("call_method", "call_function"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        writes = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if writes or "out" in node.kwargs or _argument(node, "inplace"):
            return True
    return bool(node.is_impure())


def _argument(node: torch.fx.Node, name: str) -> Any:
    """What a node gives to this parameter of its function, by keyword or by position."""
    if name in node.kwargs or not isinstance(node.target, types.FunctionType):
        return node.kwargs.get(name)
    parameters = list(inspect.signature(node.target).parameters)
    return dict(zip(parameters, node.args, strict=False)).get(name)
