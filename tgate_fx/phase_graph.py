"""The phases of a gated pipeline as graphs to read, run and compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import CompileError, StateError
from .families import TEXT
from .forms import canonical, on_meta
from .pruning import remove_dead_code
from .schedule import Step
from .sites import KINDS, Role, Roles, SiteInfo, Sites
from .split import Cache, PhaseFunction, phase_function

_DENOISER = "denoiser"


class Example(NamedTuple):
    """How a phase was run, with every tensor as one on the meta device: its form without its values.

    Attributes:
        name: what the report calls the phase.
        roles: what the sites did.
        cache: what was given for the sites that were REUSE.
        inputs: the denoiser's, in the form that is compiled for.
    """

    name: str
    roles: Roles
    cache: Cache
    inputs: dict[str, Any]


def example(step: Step, cache: Cache, inputs: Mapping[str, Any]) -> Example:
    """The example that one step makes."""
    return Example(step.phase, step.roles, *on_meta((cache, canonical(inputs)[0])))


@dataclass(frozen=True)
class PhaseGraph:
    """One phase of a denoiser.

    Attributes:
        name: what the report calls it, such as "pre-gate".
        module: the graph. ``module(cache, inputs) -> (output, captured)`` runs it: ``inputs`` are the denoiser's by
            name, ``cache`` and ``captured`` hold for each kind of site (`KINDS`) one tensor for each that is reused or
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

    def arguments(self) -> tuple[Cache, dict[str, Any]]:
        """New arguments for ``module``, of the form that it was traced for: every tensor of them all zeros."""
        return self._zeros()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that the graph reads; those of the denoiser's that it does not read are left out."""
        return tuple(node.name for node in self.module.graph.find_nodes(op="placeholder") if node.users)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names, within the denoiser, of the parameters and buffers that the graph reads."""
        nodes = self.module.graph.find_nodes(op="get_attr")
        return tuple(dict.fromkeys(str(node.target).removeprefix(f"{_DENOISER}.") for node in nodes))

    def operations(self, depth: int | None = 2) -> dict[str, int]:
        """How many operations there are in each module, by the first ``depth`` parts of its name (None: all of it).

        What the denoiser does itself, outside of its modules, is under its own name: the empty one.
        """
        counts: Counter[str] = Counter()
        for node in self._calls():
            counts[".".join(_module_of(node).split(".")[:depth])] += 1
        return dict(counts)

    def _calls(self) -> list[torch.fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "call_function"]

    def check(self) -> None:
        """See that the graph is what its phase claims: nothing of what is reused or skipped, and no needless text.

        Raises:
            StateError: it computes within such a site, reads a parameter of one, or reads the text although every
                cross-attention is reused.
        """
        names = [site.name for site in (*self.reused, *self.skipped)]
        # A site of the deep branch hands out a copy of its cached tensor; that is all that may be left of it.
        computed = [node for node in self._calls() if node.target is not torch.ops.aten.clone.default]
        within = [node.name for node in computed if _is_within(_module_of(node), names)]
        within += [name for name in self.parameters if _is_within(name, names)]
        if any(site.kind == KINDS[0] for site in self.reused):
            within += [name for name in self.inputs if name.removeprefix("inputs_") in TEXT]
        if within:
            raise StateError(
                f"The {self.name} graph reads or computes {', '.join(within[:5])}: expected nothing of the sites that "
                "it takes from the cache. Something reads them in another way than by their forward; leave this model "
                "ungated."
            )

    def difference(self, other: PhaseGraph, depth: int | None = None) -> dict[str, tuple[int, int]]:
        """The modules in which this phase and another have different numbers of operations, with both numbers."""
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
        self.add_module(_DENOISER, denoiser)
        self._function = function

    def forward(self, cache: Cache, inputs: dict[str, Any]) -> Any:
        return self._function(cache, (), inputs)


def trace(
    denoiser: nn.Module, sites: Sites, forward: Callable[..., Any], branch: int | None, of: Example
) -> PhaseGraph:
    """The graph of one phase, traced by torch.export on zeros of the example's form.

    Args:
        denoiser: the model.
        sites: its sites.
        forward: its own forward.
        branch: the number of the deep branch that the roles speak of, if any.
        of: how the phase was run.

    Raises:
        CompileError: torch.export cannot trace it.
    """
    function = phase_function(sites, forward, of.roles, branch)
    device = next(denoiser.parameters()).device

    def zeros() -> tuple[Cache, dict[str, Any]]:
        made: tuple[Cache, dict[str, Any]] = tree_map_only(
            torch.Tensor, lambda form: torch.zeros_like(form, device=device), (of.cache, of.inputs)
        )
        return made

    # Tracers keep what they are at in one place for the whole process; torch.compile takes turns by this lock.
    with torch._dynamo.convert_frame.compile_lock, torch.inference_mode(False), torch.no_grad():
        try:
            program = torch.export.export(_Phase(denoiser, function), zeros(), strict=False)
        except Exception as error:
            raise CompileError(
                f"The {of.name} phase could not be traced as one graph: {error}\nExpected a denoiser that torch.export "
                "takes whole, whose weights were not made under torch.inference_mode. Change what the message above "
                "names, or do without the graph."
            ) from error
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # it would keep alive what nothing else reads
    remove_dead_code(module.graph, _has_effect)
    module.delete_all_unused_submodules()
    module.recompile()
    with_roles = list(zip(sites.sites, sites.assign(of.roles, branch), strict=True))
    reused, skipped, captured = (
        tuple(SiteInfo(site.name, KINDS[site.kind]) for site, role in with_roles if role is wanted)
        for wanted in (Role.REUSE, Role.SKIP, Role.CAPTURE)
    )
    return PhaseGraph(of.name, module, reused, skipped, captured, zeros)


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether a node does more than compute its value. (For FX a dropout does, even one that is off.)"""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return bool(node.is_impure())


def _module_of(node: torch.fx.Node) -> str:
    """The name, within the denoiser, of the module that a node belongs to; empty for the denoiser itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(stack.values())), "")
    return path.removeprefix(_DENOISER).removeprefix(".")


def _is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
