"""The phases of a gated pipeline as graphs to read, run and compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .compiled import private
from .compiled.dead_code import remove_dead_code
from .errors import CompileError, StateError
from .gated import Gated
from .inputs import zeros_like
from .network import Network
from .phases import Example
from .roles import Kind, Role
from .sites import SiteInfo
from .split import Cache, PhaseFunction

# Names of parameters begin with this in graphs and packages.
DENOISER = "denoiser"


@dataclass(frozen=True)
class PhaseGraph:
    """One phase of a denoiser.

    Attributes:
        name: the phase's name in the report, such as "pre-gate".
        module: the graph. ``module(cache, inputs) -> (output, captured)`` runs it: ``inputs`` are the denoiser's by
            name, ``cache`` and ``captured`` hold for each kind of site one tensor for each that is reused or
            captured. Parameters are the denoiser's own. ``print(module.code)`` shows it as Python.
        reused: the sites whose output is an input of the graph.
        skipped: the modules of a deep branch that are not computed.
        captured: the sites whose output is an output of the graph.
    """

    name: str
    module: torch.fx.GraphModule
    reused: tuple[SiteInfo, ...]
    skipped: tuple[SiteInfo, ...]
    captured: tuple[SiteInfo, ...]
    _zeros: Callable[[], tuple[Cache, dict[str, Any]]] = field(repr=False, compare=False)
    _text: tuple[str, ...] = field(repr=False, compare=False)

    def arguments(self) -> tuple[Cache, dict[str, Any]]:
        """Return new arguments for ``module``, of the shapes and dtypes that it was traced for, all zeros."""
        return self._zeros()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the graph reads; those of the denoiser's that it does not read are left out."""
        return tuple(node.name for node in self.module.graph.find_nodes(op="placeholder") if node.users)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names, within the denoiser, of the parameters and buffers that the graph reads."""
        nodes = self.module.graph.find_nodes(op="get_attr")
        return tuple(dict.fromkeys(str(node.target).removeprefix(f"{DENOISER}.") for node in nodes))

    def operations(self, depth: int | None = 2) -> dict[str, int]:
        """Return the number of operations in each module, by the first ``depth`` parts of its name (None: all of it).

        What the denoiser does itself, outside of its modules, is under its own name: the empty one.
        """
        counts: Counter[str] = Counter()
        for node in self._calls():
            counts[".".join(_module_of(node).split(".")[:depth])] += 1
        return dict(counts)

    def _calls(self) -> list[torch.fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "call_function"]

    def check(self) -> None:
        """Check that the graph computes nothing that is reused or skipped, and reads no needless text.

        Raises:
            StateError: it computes within such a site, reads a parameter of one, or reads the text although every
                cross-attention is reused.
        """
        names = [site.name for site in (*self.reused, *self.skipped)]
        # A site of the deep branch hands out a copy of its cached tensor; that is all that may be left of it.
        computed = [node for node in self._calls() if node.target is not torch.ops.aten.clone.default]
        within = [node.name for node in computed if _is_within(_module_of(node), names)]
        within += [name for name in self.parameters if _is_within(name, names)]
        if any(site.kind == Kind.CROSS_ATTENTION.title for site in self.reused):
            within += [name for name in self.inputs if name.removeprefix("inputs_") in self._text]
        if within:
            raise StateError(
                f"The {self.name} graph reads or computes {', '.join(within[:5])}: expected nothing of the sites that "
                "it takes from the cache. Something reads them in another way than by their forward; leave this model "
                "ungated."
            )

    def difference(self, other: PhaseGraph, depth: int | None = None) -> dict[str, tuple[int, int]]:
        """Return the modules in which this phase and another differ in the number of operations, with both numbers."""
        counts = self.operations(depth), other.operations(depth)
        names = dict.fromkeys([*counts[0], *counts[1]])
        pairs = {name: (counts[0].get(name, 0), counts[1].get(name, 0)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.name}: {len(self._calls())} operations, {len(self.parameters)} parameters and buffers",
                f"  reads {', '.join(name for name in self.inputs if not name.startswith('cache_'))}",
                f"  {len(self.reused)} sites reused, {len(self.captured)} captured",
                *[f"  {count:>6}  {name or '(the denoiser itself)'}" for name, count in self.operations().items()],
            ]
        )


class _Phase(nn.Module):
    """A phase as a module, so that its parameters keep their names."""

    def __init__(self, denoiser: nn.Module, function: PhaseFunction) -> None:
        super().__init__()
        self.add_module(DENOISER, denoiser)
        self._function = function

    def forward(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        return self._function(cache, (), inputs)


def graphs_of(gated: Gated) -> dict[str, PhaseGraph]:
    """Return the graphs of the last generation's phases, by name, which of two denoisers begins with that network's."""
    if not any(run.examples for run in gated.runs):
        raise StateError(
            "No generation has run since this pipeline was gated: expected one, since graphs are traced for inputs "
            "like its own. Generate an image first; the fewest steps that reach every phase will do."
        )
    several = len(gated.runs) > 1
    return {
        f"{run.network.attribute} {example.name}" if several else example.name: trace(run.network, example)
        for run in gated.runs
        for example in run.examples.values()
    }


def trace(network: Network, example: Example) -> PhaseGraph:
    """Return the graph of one phase, traced by torch.export on zeros of the example's shapes and dtypes.

    Raises:
        CompileError: torch.export cannot trace it.
    """
    with network.dispatch.lock:
        return _trace(network, example)


def _trace(network: Network, example: Example) -> PhaseGraph:
    device = next(network.module.parameters()).device

    def zeros() -> tuple[Cache, dict[str, Any]]:
        made: tuple[Cache, dict[str, Any]] = zeros_like((example.cache, example.inputs), device)
        return made

    phase = _Phase(network.module, network.function(example.roles))
    # Tracers keep what they are at in one place for the whole process; torch.compile takes turns by this lock.
    with private.compile_lock(), torch.inference_mode(False), torch.no_grad():
        try:
            program = torch.export.export(phase, zeros(), strict=False)
        except Exception as error:
            raise CompileError(
                f"The {example.name} phase could not be traced as one graph: {error}\nExpected a denoiser that "
                "torch.export takes whole, whose weights were not made under torch.inference_mode. Change what the "
                "message above names, or do without the graph."
            ) from error
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and private.is_metadata_assertion(node.target):
            module.graph.erase_node(node)  # it would keep alive what nothing else reads
    remove_dead_code(module.graph, _has_effect)
    module.delete_all_unused_submodules()
    module.recompile()
    sites, roles, branch = network.dispatch.sites, example.roles, network.branch
    reused, skipped, captured = (
        sites.with_role(wanted, roles, branch) for wanted in (Role.REUSE, Role.SKIP, Role.CAPTURE)
    )
    return PhaseGraph(example.name, module, reused, skipped, captured, zeros, network.family.text)


def _has_effect(node: torch.fx.Node) -> bool:
    """Return whether a node does more than compute its value. (For FX a dropout does, even one that is off.)"""
    if private.is_operator(node.target):
        return private.writes(node.target)
    return bool(node.is_impure())


def _module_of(node: torch.fx.Node) -> str:
    """Return the name, within the denoiser, of the module that a node belongs to; empty for the denoiser itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return path.removeprefix(DENOISER).removeprefix(".")


def _is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
