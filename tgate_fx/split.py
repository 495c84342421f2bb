"""The functional transform: a denoiser becomes one pure function for each phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from .errors import ArgumentError, StateError
from .roles import Kind, Role, Roles
from .sites import RoleTable, Sites

Cache = tuple[Sequence[torch.Tensor], ...]  # for each kind of site, a tensor for each site; () for a kind not reused
EMPTY_CACHE: Cache = ((),) * len(Kind)
PhaseResult = tuple[Any, Cache]
PhaseFunction = Callable[[Cache, Sequence[Any], dict[str, Any]], PhaseResult]


def phase_function(sites: Sites, forward: Callable[..., Any], roles: Roles, branch: int | None = None) -> PhaseFunction:
    """Return the pure function ``(cache, args, kwargs) -> (output, captured)`` of one phase.

    Args:
        sites: the sites of the denoiser.
        forward: the denoiser's own forward.
        roles: what the sites do.
        branch: the number of the deep branch that ``roles`` speak of, if any.

    Returns:
        A function whose ``cache`` holds, for each kind of site that is REUSE, one tensor for each site, and whose
        ``captured`` holds the same for each kind that is CAPTURE, in site order. It sets the roles inside itself, so
        that torch.compile sees them as constants: no guard, one graph for each phase.
    """
    kinds = [[index for index, site in enumerate(sites.sites) if site.kind is kind] for kind in Kind]
    in_roles = run_in_roles(sites, sites.assign(roles, branch), kinds)

    def run(cache: Cache, args: Sequence[Any], kwargs: dict[str, Any]) -> PhaseResult:
        if sites.detached:
            raise StateError(
                "This phase was called after its sites were taken off the denoiser by tgate_fx.restore: expected them "
                "on it. Call tgate_fx.split again."
            )
        return in_roles(forward, cache, args, kwargs)

    return run


def run_in_roles(
    table: RoleTable, roles: tuple[Role, ...], groups: Sequence[Sequence[int]]
) -> Callable[[Callable[..., Any], Cache, Sequence[Any], dict[str, Any]], PhaseResult]:
    """Return ``(forward, cache, args, kwargs) -> (output, captured)``: it runs a forward with these roles.

    Args:
        table: where its sites look for their roles.
        roles: one for each site.
        groups: the sites in the order in which ``cache`` and ``captured`` hold their tensors, group by group.

    Returns:
        It sets the roles while it runs, so that torch.compile sees them as constants.
    """
    reused, captured = (
        [[index for index in group if roles[index] is wanted] for group in groups]
        for wanted in (Role.REUSE, Role.CAPTURE)
    )

    def run(forward: Callable[..., Any], cache: Cache, args: Sequence[Any], kwargs: dict[str, Any]) -> PhaseResult:
        values: list[Any] = [None] * len(roles)
        for tensors, indices in zip(cache, reused, strict=True):
            for value, index in zip(tensors, indices, strict=True):
                values[index] = value
        table.roles, table.values = roles, values
        try:
            output = forward(*args, **kwargs)
        finally:
            table.roles, table.values = None, []
        return output, tuple([tuple([values[index] for index in indices]) for indices in captured])

    return run


def split(
    sites: Sites, forward: Callable[..., Any], lock: AbstractContextManager[Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the pre-gate and post-gate functions of `tgate_fx.split`; ``lock`` is held while one runs eagerly."""

    def locked(function: PhaseFunction) -> PhaseFunction:
        def run(cache: Cache, args: Sequence[Any], kwargs: dict[str, Any]) -> PhaseResult:
            if torch.compiler.is_dynamo_compiling():
                return function(cache, args, kwargs)
            with lock:
                return function(cache, args, kwargs)

        return run

    run_pre = locked(phase_function(sites, forward, Roles(Role.CAPTURE)))
    run_post = locked(phase_function(sites, forward, Roles(Role.REUSE)))
    count = len(sites.of_kind(Kind.CROSS_ATTENTION))

    def pre(*args: Any, **kwargs: Any) -> tuple[Any, Sequence[torch.Tensor]]:
        output, captured = run_pre(EMPTY_CACHE, args, kwargs)
        return output, captured[0]

    def post(cache: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if len(cache) != count:
            raise ArgumentError(
                f"The cache holds {len(cache)} tensors: expected the {count} that pre(...) returned. Hand over all of "
                "it."
            )
        return run_post((cache, *EMPTY_CACHE[1:]), args, kwargs)[0]

    return pre, post
