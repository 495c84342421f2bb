"""Multiply-adds of a denoiser, step by step, counted where its phases run without weights: on the meta device."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..deepcache import find_deep_branch
from ..families import family_of
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

    def times(self, count: int) -> Cost:
        """As many of it."""
        return Cost(count * self.layers, count * self.attention)


@dataclass(frozen=True)
class Generation:
    """How one image is generated.

    Attributes:
        arch: a name in `ARCHITECTURES`.
        steps: evaluations of the denoiser.
        schedule: which phase each is in.
        guided: whether there are two guidance branches before the gate.
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
        if not step.computed:
            costs.append(Cost(0, 0))
            continue
        branches = 2 if generation.guided and not step.one_branch else 1
        calls = min(branches, calls_of_a_step(generation.arch))
        cost = phase_cost(generation.arch, step.roles, generation.branch, branches // calls, generation.size)
        costs.append(cost.times(calls))
    return costs


def calls_of_a_step(arch: str) -> int:
    """Return how many calls a guided step has: one for each branch, or one for the batch of both."""
    _, denoiser = _counted(arch, None)
    family = family_of(type(denoiser))
    return 1 if family is None else family.guidance.calls


def image_cost(generation: Generation) -> Cost:
    """Return the cost of all steps of one image."""
    return functools.reduce(Cost.plus, step_costs(generation))


def phase_cost(arch: str, roles: Roles, branch: int | None, rows: int, size: int | None = None) -> Cost:
    """Return the cost of one step of a phase."""
    return _run(arch, roles, branch, rows, size)[0]


@functools.cache
def _run(arch: str, roles: Roles, branch: int | None, rows: int, size: int | None) -> tuple[Cost, Cache]:
    """Return the cost of one step of a phase, and what it captures."""
    sites, denoiser = _counted(arch, branch)
    inputs = ARCHITECTURES[arch].inputs(rows, size)
    cache = _run(arch, roles.capturing(), branch, rows, size)[1] if Role.REUSE in roles else EMPTY_CACHE
    phase = phase_function(sites, denoiser.forward, roles, branch)
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        _autocast_on_meta(),
        FlopCounterMode(display=False) as counter,
        _AttentionProducts() as products,
    ):
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' models warn of outputs that they make themselves
        captured = phase(cache, (), inputs)[1]
    return Cost(counter.get_total_flops() // 2, products.macs), captured


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


@contextlib.contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """Let models turn autocast off on the meta device, where it is never on, and where torch knows no such switch."""
    autocast = torch.autocast

    def allowed(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = allowed  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


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
