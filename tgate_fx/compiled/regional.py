"""Regional compilation: of each phase, the blocks that repeat are compiled, once for all that are alike.

What is between the blocks runs eagerly. Compiling takes a fraction of the time that the whole phase does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..inputs import latents_of
from ..network import Network
from ..private import repeated_blocks
from ..roles import Kind, Role
from ..schedule import Step
from ..sites import Part, Site, Sites
from ..split import Cache, PhaseResult, run_in_roles
from . import private
from .settings import CompileSettings
from .untraceable import check_traceable
from .variant import CompiledPhases, Variant


class Region(Part):
    """A block that holds sites; callable in place of its ``forward``.

    Attributes:
        block: the block.
        indices: which of the denoiser's sites are in it.
        hook: what runs it now; shared by all regions of a denoiser.
    """

    def __init__(self, sites: Sites, block: nn.Module, indices: Sequence[int], hook: _RegionHook) -> None:
        super().__init__(sites, block)
        self.block = block
        self.indices = tuple(indices)
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, in place of its ``forward``."""
        run = self.hook.run
        if run is None or torch.compiler.is_dynamo_compiling():
            return self.original_forward(*args, **kwargs)
        return run(self, args, kwargs)


class _RegionHook:
    """What runs the regions of a denoiser, in place of their own forward, while a phase runs by regions."""

    run: Callable[[Region, tuple[Any, ...], dict[str, Any]], Any] | None = None


def _hook_of(network: Network) -> _RegionHook:
    """Return what runs the blocks that a denoiser repeats, after making regions of them if nobody has yet.

    These are the modules that the model class names (diffusers' ``_repeated_blocks``) and that hold cross-attention;
    where it names none, the modules whose direct children the cross-attentions are. diffusers' own
    ``compile_repeated_blocks`` does not serve: it compiles them past any instance-level forward.
    """
    sites = network.dispatch.sites
    regions = [part for part in sites.parts if isinstance(part, Region)]
    if regions:
        return regions[0].hook
    hook = _RegionHook()
    named = repeated_blocks(network.module)
    for name, block in list(network.module.named_modules()):
        within = [(index, site) for index, site in enumerate(sites.sites) if site.name.startswith(f"{name}.")]
        holds = any(site.kind is Kind.CROSS_ATTENTION and _parent(site.name) == name for _, site in within)
        if holds and (not named or type(block).__name__ in named):
            for index_in_block, (_, site) in enumerate(within):
                site.join_block(index_in_block)
            sites.attach(Region(sites, block, [index for index, _ in within], hook))
    return hook


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class RegionalPhases(CompiledPhases):
    """Runs each phase eagerly, and the repeated blocks in it through torch.compile, checking guards at every step."""

    def __init__(self, network: Network, settings: CompileSettings) -> None:
        super().__init__(network.module, settings)
        self._network = network

    def attach(self) -> None:
        """Put a `Region` on every repeated block."""
        with self._network.dispatch.lock:
            self._hook = _hook_of(self._network)

    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Begin a generation; see `Phases`."""
        super().begin(pipe, pipeline_class, calls_back=calls_back)
        for part in self._network.dispatch.sites.parts:
            if isinstance(part, Region):
                check_traceable(f"A {type(part.block).__name__} of pipe.{self._network.attribute}", part.block, part)

    def _run(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        self._device = latents_of(inputs)[1].device
        if self.uses_cuda_graphs(self._device):
            raise UnsupportedError(
                f"regional=True was given with {self.describe()}, under which a step would replay many CUDA graphs: "
                "expected whole phases for that, or no CUDA graphs. Leave regional out, or use "
                'mode="max-autotune-no-cudagraphs".'
            )
        self._hook.run = functools.partial(self._run_region, step)
        try:
            output, captured = self._network.function(step.roles)(cache, (), inputs)
        finally:
            self._hook.run = None
        return output, captured

    def _run_region(self, step: Step, region: Region, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one block with the roles that its sites have now."""
        sites = self._network.dispatch.sites
        roles = tuple([sites.role(index) for index in region.indices])
        cached = [sites.values[i] for i, role in zip(region.indices, roles, strict=True) if role is Role.REUSE]
        # Blocks whose inputs have one signature are mostly alike, and share a graph; a layout is no reason for another.
        args = tuple([_contiguous(value) for value in args])
        kwargs = {name: _contiguous(value) for name, value in kwargs.items()}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        shapes = None if self._settings.dynamic else tuple([(value.shape, value.dtype) for value in tensors])
        alike = all(sites.sites[index].is_outermost for index in region.indices)
        key = (type(region.block), roles, shapes, None if alike else id(region.block))

        def new_variant() -> Variant:
            name = f"{step.phase} {type(region.block).__name__}"
            # Sites are known by their index in the block, which is the same in all blocks that are alike.
            run = run_in_roles(sites.block, roles, [range(len(roles))])
            return Variant(run, name, self._settings, self._device, guard_filter=_other_sites if alike else None)

        arguments = (region.original_forward, (cached,), args, kwargs)
        _, (output, (captured,)) = self._call_variant(key, step, new_variant, arguments)
        capturing = [index for index, role in zip(region.indices, roles, strict=True) if role is Role.CAPTURE]
        for index, value in zip(capturing, captured, strict=True):
            sites.values[index] = value
        return output


def _other_sites(guards: Sequence[Any]) -> list[bool]:
    """Return which guards to keep: all but those by which a graph serves only the very sites it was traced with.

    torch.compile ties a graph to each instance-level forward by its identity, and so would compile every block.
    """
    return [not isinstance(private.guarded_value(guard), Site) for guard in guards]


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, torch.Tensor) else value
