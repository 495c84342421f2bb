"""Regional compilation: of each phase, the blocks that repeat are compiled, once for all that are alike.

What is between the blocks runs eagerly. Compiling takes a fraction of the time that the whole phase does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .compiler import Compiled, Variant
from .errors import UnsupportedError
from .families import first_input
from .schedule import Step
from .settings import CompileSettings
from .sites import Part, Role, Roles, Site, Sites
from .split import Cache, PhaseFunction, PhaseResult, run_in_roles


class Region(Part):
    """A block that holds sites; callable in place of its ``forward``.

    Attributes:
        block: the block.
        indices: which of the denoiser's sites are in it.
    """

    def __init__(self, sites: Sites, block: nn.Module, indices: Sequence[int]) -> None:
        super().__init__(sites, block)
        self.block = block
        self.indices = tuple(indices)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, in place of its ``forward``."""
        run = self._sites.run_region
        if run is None or torch.compiler.is_dynamo_compiling():
            return self.inner(*args, **kwargs)
        return run(self, args, kwargs)


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


class RegionalPhases(Compiled):
    """Runs each phase eagerly, and the repeated blocks in it through torch.compile, checking guards at every step."""

    def __init__(self, function_of: Callable[[Roles], PhaseFunction], sites: Sites, settings: CompileSettings) -> None:
        super().__init__(settings)
        self._function_of = function_of
        self._sites = sites

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `tgate_fx.dispatch.Phases`."""
        self._device = first_input(inputs)[1].device
        if self._settings.replays(self._device):
            raise UnsupportedError(
                f"regional=True was given with {self.describe()}, under which a step would replay many CUDA graphs: "
                "expected whole phases for that, or no CUDA graphs. Leave regional out, or use "
                'mode="max-autotune-no-cudagraphs".'
            )
        self._sites.run_region = functools.partial(self._run, step)
        try:
            output, captured = self._function_of(step.roles)(cache, (), inputs)
        finally:
            self._sites.run_region = None
        return output, captured

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

        def new_variant() -> Variant:
            name = f"{step.phase} {type(region.block).__name__}"
            # Sites are known by their place in the block, which is the same in all blocks that are alike.
            run = run_in_roles(sites.block, roles, [range(len(roles))])
            return Variant(run, name, self._settings, self._device, guard_filter=_other_sites if alike else None)

        _, (output, (captured,)) = self._run_guarded(key, step, new_variant, (region.inner, (cached,), args, kwargs))
        places = [index for index, role in zip(region.indices, roles, strict=True) if role is Role.CAPTURE]
        for index, value in zip(places, captured, strict=True):
            sites.values[index] = value
        return output


def _other_sites(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but those that a graph is only for the very sites it was traced with.

    torch.compile ties a graph to each instance-level forward by its identity, and so would compile every block.
    """
    return [not isinstance(guard.value, Site) for guard in guards]


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value
