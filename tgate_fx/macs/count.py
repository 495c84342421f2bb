"""Multiply-adds of a denoiser, step by step, counted where its phases run without weights: on the meta device."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..deepcache import find_deep_branch
from ..roles import Kind, Role, Roles
from ..schedule import Schedule
from ..sites import Sites
from ..split import EMPTY_CACHE, Cache, phase_function
from .architectures import ARCHITECTURES


class Cost(NamedTuple):
    """Multiply-adds.

    Attributes:
        layers: of convolutions and linear layers.
        attention: of the two matrix products within each attention. Counters that look at modules (calflops), and
            with them T-GATE's published figures, do not see these.
    """

    layers: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.attention

    def plus(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(self.layers + other.layers, self.attention + other.attention)


@dataclass(frozen=True)
class Generation:
    """How one image is generated.

    Attributes:
        arch: a name in `ARCHITECTURES`.
        steps: evaluations of the denoiser.
        schedule: which phase each is in.
        guided: whether the batch is [uncond, cond] before the gate.
        branch: the deep branch that the schedule's ``deep_interval`` speaks of.
        size: latents per side; the model's own if None.
    """

    arch: str
    steps: int
    schedule: Schedule
    guided: bool = True
    branch: int | None = None
    size: int | None = None

    @property
    def plain(self) -> Generation:
        """The same with nothing cached."""
        return replace(self, schedule=Schedule(None), branch=None)


def step_costs(generation: Generation) -> list[Cost]:
    """Return the cost of every step of one image."""
    schedule = generation.schedule.resolve(generation.steps)
    costs = []
    for index in range(generation.steps):
        step = schedule.at(index)
        rows = 2 if generation.guided and not (step.gated and schedule.one_branch) else 1
        costs.append(phase_cost(generation.arch, step.roles, generation.branch, rows, generation.size))
    return costs


def image_cost(generation: Generation) -> Cost:
    """Return the cost of all steps of one image."""
    return functools.reduce(Cost.plus, step_costs(generation))


@functools.cache
def phase_cost(arch: str, roles: Roles, branch: int | None, rows: int, size: int | None = None) -> Cost:
    """Return the cost of one step of a phase."""
    sites, denoiser = _counted(arch, branch)
    inputs = ARCHITECTURES[arch].inputs(rows, size)
    with torch.no_grad():
        cache: Cache = EMPTY_CACHE
        if Role.REUSE in roles:
            cache = phase_function(sites, denoiser.forward, roles.capturing(), branch)(cache, (), inputs)[1]
        with FlopCounterMode(display=False) as counter, _AttentionProducts() as products:
            phase_function(sites, denoiser.forward, roles, branch)(cache, (), inputs)
    return Cost(counter.get_total_flops() // 2, products.macs)


class _AttentionProducts(TorchFunctionMode):
    """Counts the matrix products of attention, and keeps them from being counted among all others."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, _, value = (*args, *[kwargs[name] for name in ("query", "key", "value")[len(args) :]])[:3]
        self.macs += query.numel() * value.shape[-2] + query.shape[:-1].numel() * value.shape[-2:].numel()
        return query.new_empty(*query.shape[:-1], value.shape[-1])


@functools.cache
def _counted(arch: str, branch: int | None) -> tuple[Sites, torch.nn.Module]:
    denoiser = ARCHITECTURES[arch].build()
    sites = Sites(denoiser)
    if branch is not None:
        sites.attach_deep_branch(branch, find_deep_branch(denoiser, branch))
    return sites, denoiser


def parameters(arch: str) -> tuple[int, int]:
    """Return how many parameters the denoiser has, and how many a gated step reads: all but the cross-attentions'."""
    sites, denoiser = _counted(arch, None)
    total = sum(parameter.numel() for parameter in denoiser.parameters())
    cached = sum(
        parameter.numel()
        for site in sites.of_kind(Kind.CROSS_ATTENTION)
        for parameter in denoiser.get_submodule(site.name).parameters()
    )
    return total, total - cached
