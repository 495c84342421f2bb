"""A torch.compile backend that behaves on the CPU as CUDA-graph replay does on a GPU."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch


class ReplayError(AssertionError):
    """Something that a CUDA graph could not do, or would do wrongly."""


class ReplayBackend:
    """Runs each graph eagerly once, records it at the second call, and replays it from then on.

    A replay reads its inputs where the recording found them: inputs that are static must not have moved, all others are
    copied to fixed places first. Its outputs are in fixed memory too, which the next replay of any graph overwrites:
    here with NaN, before anything is computed.

    Attributes:
        graphs: the graphs, in the order in which they were compiled.
        copied: for every input that was copied at a replay, by name: how often.
        replays: how often any graph was replayed.
    """

    def __init__(self) -> None:
        self.graphs: list[_Graph] = []
        self.copied: Counter[str] = Counter()
        self.replays = 0

    def __call__(self, module: torch.fx.GraphModule, _: list[Any], **settings: Any) -> _Graph:
        self.graphs.append(_Graph(self, module))
        return self.graphs[-1]

    def poison(self) -> None:
        """Overwrite what every recorded graph has put out."""
        for graph in self.graphs:
            for output in graph.outputs:
                output.fill_(math.nan if output.is_floating_point() else -(2**15))


class _Graph:
    """One graph: run, recorded, replayed."""

    def __init__(self, backend: ReplayBackend, module: torch.fx.GraphModule) -> None:
        self._backend = backend
        self._module = module
        placeholders = module.graph.find_nodes(op="placeholder")
        self.names = [node.name for node in placeholders]
        self.static = [_is_static(node) for node in placeholders]
        self.outputs: list[torch.Tensor] = []
        self._inputs: list[Any] = []
        self._calls = 0

    def __call__(self, *args: Any) -> Any:
        self._calls += 1
        if self._calls == 1:
            return self._run(args)
        if self._calls == 2:
            self._inputs = [
                value if static or not isinstance(value, torch.Tensor) else value.clone()
                for value, static in zip(args, self.static, strict=True)
            ]
        else:
            self._copy_inputs(args)
        self._backend.replays += 1
        self._backend.poison()
        results = self._run(self._inputs)
        inputs = {id(value) for value in self._inputs}
        if not self.outputs:
            self.outputs = [result.clone() for result in results if id(result) not in inputs]
        written = iter(self.outputs)
        return tuple(result if id(result) in inputs else next(written).copy_(result) for result in results)

    def _run(self, args: Any) -> Any:
        before = _versions(args)
        results = self._module(*args)
        changed = [name for name, old, new in zip(self.names, before, _versions(args), strict=True) if old != new]
        if changed:
            raise ReplayError(f"the graph writes to its inputs {', '.join(changed)}")
        return results

    def _copy_inputs(self, args: Any) -> None:
        for name, static, fixed, value in zip(self.names, self.static, self._inputs, args, strict=True):
            if not isinstance(value, torch.Tensor):
                if value != fixed:
                    raise ReplayError(f"the input {name} was {fixed} when the graph was recorded and is now {value}")
            elif static:
                if value.data_ptr() != fixed.data_ptr():
                    raise ReplayError(f"the static input {name} has moved")
            else:
                self._backend.copied[name] += 1
                fixed.copy_(value)


def _is_static(node: torch.fx.Node) -> bool:
    """Whether torch.compile takes an input's address as fixed: it is a module's, or was marked so."""
    source: Any = node._dynamo_source  # type: ignore[attr-defined]
    kind = source.guard_source
    kind = kind() if callable(kind) else kind  # a method in torch 2.9
    of_module = kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module()
    return of_module or bool(node.meta["tensor_dict"].get("_dynamo_static_input_type"))


def _versions(args: Any) -> list[Any]:
    return [value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None for value in args]


def copies_of(backend: ReplayBackend, part: str) -> int:
    """How often inputs with this in their name were copied."""
    return sum(count for name, count in backend.copied.items() if part in name)
