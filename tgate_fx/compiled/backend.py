"""A torch.compile backend around another: first it takes what a phase does not use out of the graph."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..errors import CompileError
from . import openvino, private, shared_weights
from .dead_code import may_have_an_effect, remove_dead_code
from .freed_graphs import made_modules, release_with
from .frozen_weights import FrozenWeights
from .onednn import onednn_on_amd
from .settings import options_with_mode


class PrunedBackend:
    """A torch.compile backend, handed graphs without dead code and without the inputs that only dead code used.

    So the post-gate graph has neither the text nor any parameter that only the text went through (PixArt's caption
    projection), which Dynamo leaves in.

    Args:
        backend: the backend itself.
        mode: torch.compile's, for the backend.
        weights: is told, before a graph is compiled, of the tensors that are part of it; None to leave it.
        cuda_graphs: whether inductor must make CUDA graphs; a graph of which it cannot is a `CompileError`, in place of
            the line that torch would log.

    Attributes:
        graphs: how many graphs it has compiled.
    """

    def __init__(
        self,
        backend: str | Callable[..., Any],
        weights: FrozenWeights | None = None,
        *,
        mode: str | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self._backend = backend
        self._mode = mode
        self._cuda_graphs = cuda_graphs
        # Dynamo keeps backends for good, and must not keep the denoiser with them.
        self._weights = weakref.ref(weights) if weights is not None else None
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile ``graph``; ``kwargs`` are the options that torch.compile was given."""
        remove_dead_code(graph.graph, may_have_an_effect)
        placeholders = graph.graph.find_nodes(op="placeholder")
        used = [bool(node.users) for node in placeholders]
        for node, keep in zip(placeholders, used, strict=True):
            if not keep:
                graph.graph.erase_node(node)
        graph.recompile()
        weights = self._weights() if self._weights is not None else None
        if weights is not None:
            read = {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}
            tensors = itertools.chain(graph.named_parameters(), graph.named_buffers())
            weights.add([tensor for name, tensor in tensors if name in read])
        with made_modules() as modules:
            compiled = self._compile(graph, list(itertools.compress(inputs, used)), kwargs)
        shared_weights.share(modules)
        count = sum(used)

        def run(*args: Any) -> Any:
            # Dynamo passes what the graph has left when this returns; should it pass all that it began with, choose.
            return compiled(*args) if len(args) == count else compiled(*itertools.compress(args, used))

        release_with(run, modules)
        self.graphs += 1
        return run

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if self._backend == "openvino":
            return openvino.compile_graph(graph, inputs, kwargs.get("options") or {})
        if self._backend == "inductor":
            # torch.compile turns a mode into options, but not for a backend like this one.
            kwargs = {"config_patches": options_with_mode(self._mode, kwargs.get("options"))}
        elif self._mode is not None:
            kwargs = {**kwargs, "mode": self._mode}
        skipped = private.cuda_graph_skips()
        with onednn_on_amd():
            compiled: Callable[..., Any] = private.backend_of(self._backend)(graph, inputs, **kwargs)
        if self._cuda_graphs and private.cuda_graph_skips() > skipped:
            raise CompileError(
                "The settings ask for CUDA graphs, and torch would run a phase without one: expected a phase that can "
                "be recorded (with TORCH_LOGS=cudagraphs torch says what is in the way). Remove that, or compile "
                'without CUDA graphs: mode=None or "max-autotune-no-cudagraphs".'
            )
        return compiled
