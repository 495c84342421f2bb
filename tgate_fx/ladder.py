"""Where a generation's gain comes from: the same steps timed eagerly, with one thing more left out on every rung."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .dispatch import Run
from .errors import StateError
from .families import first_input
from .report import Rung, StepClock
from .sites import KINDS, Role, Roles
from .split import Cache, PhaseFunction

_ROUNDS = 3  # after one that is not counted


def climb(run: Run | None, function_of: Callable[[Roles], PhaseFunction], device: torch.device) -> tuple[Rung, ...]:
    """Time the rungs for one generation; the last is that generation itself, if it was compiled.

    Args:
        run: the generation.
        function_of: the eager function of a phase.
        device: where the denoiser is.

    Raises:
        StateError: there are no steps that can be timed.
    """
    if run is None or run.steps == 0:
        raise StateError(
            "No step has run since this pipeline was gated: expected a generation, whose steps the ladder times. "
            "Generate an image first."
        )
    if run.device != device:
        raise StateError(
            f"The denoiser is on {device}, and the last generation ran on {run.device}: expected it where it ran, to "
            "be timed there. Move the pipeline back, or take offloading off for this."
        )
    by_rows = {first_input(example.inputs)[1].shape[0]: example.inputs for example in run.examples.values()}
    schedule, steps, whole = run.schedule, run.clock.steps(), max(by_rows)
    for step in steps:
        if step.compiled or step.batch not in by_rows:
            what = "a graph was compiled, which its seconds include" if step.compiled else "the batch changed"
            raise StateError(
                f"At step {step.index} of the last generation {what}: expected one whose steps can be timed. Generate "
                "once more with the same arguments, or without what changes the batch, then ask for the ladder."
            )

    @functools.cache
    def seconds(roles: Roles, rows: int) -> float:
        return _seconds(function_of, roles, by_rows[rows], device)

    def total(kinds: int, *, cut: bool = True) -> float:
        """With only so many kinds of site taken from the cache; ``cut`` if guidance is dropped as it was."""
        each = [(schedule.at(step.index).roles, step.batch if cut else whole) for step in steps]
        return sum(seconds(_reusing(roles, kinds), rows) for roles, rows in each)

    rungs = [("ungated, eager", total(0, cut=False))]
    if any(step.batch < whole for step in steps):
        rungs.append(("guidance dropped", total(0)))
    for kind, name in enumerate(KINDS):
        if any(schedule.at(step.index).roles[kind] is Role.REUSE for step in steps):
            rungs.append((f"{name} cached", total(kind + 1)))
    if not run.eager:
        rungs.append(("compiled", sum(step.seconds for step in steps)))
    before = [rungs[0][1], *[seconds for _, seconds in rungs]]
    return tuple(Rung(name, seconds, below / seconds) for (name, seconds), below in zip(rungs, before, strict=False))


def _reusing(roles: Roles, kinds: int) -> Roles:
    """These roles with only the first ``kinds`` of them taken from the cache, and all others LIVE."""
    return Roles(*[Role.REUSE if role is Role.REUSE and kind < kinds else Role.LIVE for kind, role in enumerate(roles)])


def _seconds(
    function_of: Callable[[Roles], PhaseFunction], roles: Roles, form: dict[str, Any], device: torch.device
) -> float:
    """What one eager step takes: the median of a few, on zeros of this form."""
    inputs: dict[str, Any] = tree_map_only(torch.Tensor, lambda meta: torch.zeros_like(meta, device=device), form)
    cache: Cache = ((), (), ())
    if Role.REUSE in roles:
        capture = Roles(*[Role.CAPTURE if role is Role.REUSE else Role.LIVE for role in roles])
        cache = function_of(capture)(cache, (), inputs)[1]
    function, clock = function_of(roles), StepClock()
    for _ in range(1 + _ROUNDS):
        started = clock.start(device)
        function(cache, (), inputs)
        clock.stop(started, 0, "", 0, 0)
    return statistics.median(step.seconds for step in clock.steps()[1:])
