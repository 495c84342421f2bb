"""The functional transform: a denoiser becomes one pure function for each phase."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import ArgumentError
from .schedule import POST_GATE, PRE_GATE, Roles
from .sites import Role, Sites

PhaseResult = tuple[Any, tuple[torch.Tensor, ...]]
PhaseFunction = Callable[[Sequence[torch.Tensor], Sequence[Any], dict[str, Any]], PhaseResult]


def phase_function(sites: Sites, forward: Callable[..., Any], roles: Roles) -> PhaseFunction:
    """The pure function ``(cache, args, kwargs) -> (output, captured)`` of one phase.

    Args:
        sites: the sites of the denoiser.
        forward: the denoiser's own forward.
        roles: what the sites do.

    Returns:
        A function whose ``cache`` holds one tensor for each site that is REUSE, and whose ``captured`` holds one for
        each site that is CAPTURE, both in site order. It sets the roles inside itself, so that torch.compile sees them
        as constants: no guard, one graph for each phase.
    """
    site_roles = (roles.cross_attention,) * len(sites)
    reused = tuple(index for index, role in enumerate(site_roles) if role is Role.REUSE)
    captured = tuple(index for index, role in enumerate(site_roles) if role is Role.CAPTURE)

    def run(cache: Sequence[torch.Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> PhaseResult:
        values: list[Any] = [None] * len(site_roles)
        for position, index in enumerate(reused):
            values[index] = cache[position]
        sites.roles, sites.values = site_roles, values
        try:
            output = forward(*args, **kwargs)
        finally:
            sites.roles, sites.values = None, []
        return output, tuple([values[index] for index in captured])

    return run


def split(sites: Sites, forward: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pre-gate and post-gate functions of `tgate_fx.split`."""
    run_pre = phase_function(sites, forward, PRE_GATE.roles)
    run_post = phase_function(sites, forward, POST_GATE.roles)

    def pre(*args: Any, **kwargs: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
        return run_pre((), args, kwargs)

    def post(cache: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if len(cache) != len(sites):
            raise ArgumentError(
                f"The cache holds {len(cache)} tensors: expected the {len(sites)} that pre(...) returned."
            )
        return run_post(cache, args, kwargs)[0]

    return pre, post
