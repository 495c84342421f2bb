"""Regional compilation: of each phase, the blocks that repeat are compiled, once for all that are alike.

What is between the blocks runs eagerly. Compiling takes a fraction of the time that the whole phase does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .compiler import GraphCount, Variant
from .families import first_input
from .schedule import Step
from .settings import CompileSettings
from .sites import Role, Roles, Site, Sites
from .slots import ForwardSlot, Replacement
from .split import Cache, PhaseFunction, PhaseResult


class Region(Replacement):
    """A block that holds sites; callable in place of its ``forward``.

    Attributes:
        block: the block.
        indices: which of the denoiser's sites are in it.
        inner: its own forward.
    """

    def __init__(self, sites: Sites, block: nn.Module, indices: Sequence[int]) -> None:
        self._sites = sites
        self.block = block
        self.indices = tuple(indices)
        self._slot = ForwardSlot(block, self)
        self.inner = self._slot.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, in place of its ``forward``."""
        run = self._sites.run_region
        if run is None or torch.compiler.is_dynamo_compiling():
            return self.inner(*args, **kwargs)
        return run(self, args, kwargs)

    def remove(self) -> None:
        """Give the block its own ``forward`` back."""
        self._slot.remove()


def add_regions(denoiser: nn.Module, sites: Sites) -> None:
    """Make regions of the blocks that a denoiser repeats, unless they are there already.

    These are the modules that the model class names (diffusers' ``_repeated_blocks``) and that hold cross-attention;
    where it names none, the modules whose direct children the cross-attentions are.
    """
    if sites.regions:
        return
    named = getattr(denoiser, "_repeated_blocks", None) or ()
    for name, block in list(denoiser.named_modules()):
        within = [(index, site) for index, site in enumerate(sites.sites) if site.name.startswith(f"{name}.")]
        holds = any(site.kind == 0 and site.name.rpartition(".")[0] == name for _, site in within)
        if holds and (not named or type(block).__name__ in named):
            for place, (_, site) in enumerate(within):
                site.place = place
            sites.regions.append(Region(sites, block, [index for index, _ in within]))


class RegionalPhases(GraphCount):
    """Runs each phase eagerly, and the repeated blocks in it through torch.compile."""

    def __init__(self, function_of: Callable[[Roles], PhaseFunction], sites: Sites, settings: CompileSettings) -> None:
        super().__init__()
        self._function_of = function_of
        self._sites = sites
        self._settings = settings
        self._variants: dict[object, Variant] = {}
        self._device = torch.device("cpu")

    def describe(self) -> str:
        """The torch.compile settings in force."""
        return self._settings.describe(self._device)

    def begin(self, *, trusted: bool) -> None:
        """Begin a generation; guards are checked at every step, whether it is trusted or not."""
        self.begin_counting()

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `tgate_fx.dispatch.Phases`."""
        self._device = first_input(inputs)[1].device
        replays = self._settings.replays(self._device)
        if replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self._sites.run_region = functools.partial(self._run, step)
        try:
            output, captured = self._function_of(step.roles)(cache, (), inputs)
        finally:
            self._sites.run_region = None
        return (tree_map_only(torch.Tensor, torch.clone, output) if replays else output), captured

    def _run(self, step: Step, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block with the roles that its sites have now."""
        sites = self._sites
        roles = tuple([sites.role(index) for index in region.indices])
        cached = [sites.values[i] for i, role in zip(region.indices, roles, strict=True) if role is Role.REUSE]
        # Blocks whose inputs have one form most often are alike, and share a graph; a layout is no reason for another.
        args = tuple([_contiguous(value) for value in args])
        kwargs = {name: _contiguous(value) for name, value in kwargs.items()}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        shapes = None if self._settings.dynamic else tuple([(value.shape, value.dtype) for value in tensors])
        alike = all(sites.sites[index].is_outermost for index in region.indices)
        key = (type(region.block), roles, shapes, alike)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._new_variant(step, region, roles, alike=alike)
        before = variant.graphs
        try:
            output, captured = variant(region.inner, cached, args, kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # more kinds of blocks than one function may follow
            variant, before = self._new_variant(step, region, roles, alike=alike), 0
            self._variants[key] = variant
            output, captured = variant(region.inner, cached, args, kwargs)
        if variant.graphs > before:
            self.note_compilation(step.roles, variant.graphs - before)
        places = [index for index, role in zip(region.indices, roles, strict=True) if role is Role.CAPTURE]
        for index, value in zip(places, captured, strict=True):
            sites.values[index] = value
        return output

    def _new_variant(self, step: Step, region: Region, roles: tuple[Role, ...], *, alike: bool) -> Variant:
        name = f"{step.phase} {type(region.block).__name__}"
        function = _block_function(self._sites, roles)
        return Variant(function, name, self._settings, self._device, guard_filter=_other_sites if alike else None)


def _other_sites(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but those that a graph is only for the very sites it was traced with.

    torch.compile ties a graph to each instance-level forward by its identity, and so would compile every block.
    """
    return [not isinstance(guard.value, Site) for guard in guards]


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value


def _block_function(sites: Sites, roles: tuple[Role, ...]) -> Callable[..., Any]:
    """The function ``(forward, cached, args, kwargs) -> (output, captured)`` of a block whose sites have these roles.

    Like a phase, it sets the roles inside itself, so that torch.compile sees them as constants; and it knows sites by
    their place in the block, so that it is the same for all blocks that are alike.
    """
    table = sites.block
    reused, kept = (
        [place for place, role in enumerate(roles) if role is wanted] for wanted in (Role.REUSE, Role.CAPTURE)
    )

    def run(forward: Callable[..., Any], cached: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values: list[Any] = [None] * len(roles)
        for value, place in zip(cached, reused, strict=True):
            values[place] = value
        table.roles, table.values = roles, values
        try:
            output = forward(*args, **kwargs)
        finally:
            table.roles, table.values = None, []
        return output, [values[place] for place in kept]

    return run
