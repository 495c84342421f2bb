"""Where a generation's speed-up comes from: its steps timed eagerly, skipping one more kind of work on each rung."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch

from .errors import StateError
from .gated import Gated
from .inputs import latents_of, zeros_like
from .network import Network
from .report import Rung, StepClock
from .roles import Kind, Role, Roles
from .run import Run
from .split import EMPTY_CACHE, Cache

_ROUNDS = 3  # after one that is not counted


def measure_ladder(gated: Gated) -> tuple[Rung, ...]:
    """Time the rungs for the last generation; the last rung is that generation itself, if it was compiled.

    Raises:
        StateError: there are no steps that can be timed.
    """
    with gated.one_at_a_time(), gated.network.dispatch.lock, torch.no_grad():
        return _rungs(gated.run, gated.network)


def _rungs(run: Run | None, network: Network) -> tuple[Rung, ...]:
    device = next(network.module.parameters()).device
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
    by_rows = {latents_of(example.inputs)[1].shape[0]: example.inputs for example in run.examples.values()}
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
        return _seconds(network, roles, by_rows[rows], device)

    def total(kinds: int, *, sliced: bool = True) -> float:
        """Return the sum with only so many kinds of site cached; ``sliced`` if guidance is dropped as it was."""
        each = [(schedule.at(step.index).roles, step.batch if sliced else whole) for step in steps]
        return sum(seconds(_reusing(roles, kinds), rows) for roles, rows in each)

    rungs = [("ungated, eager", total(0, sliced=False))]
    if any(step.batch < whole for step in steps):
        rungs.append(("guidance dropped", total(0)))
    for kind in Kind:
        if any(schedule.at(step.index).roles[kind] is Role.REUSE for step in steps):
            rungs.append((f"{kind.title} cached", total(kind + 1)))
    if run.phases.is_compiled:
        rungs.append(("compiled", sum(step.seconds for step in steps)))
    before = [rungs[0][1], *[seconds for _, seconds in rungs]]
    return tuple(Rung(name, seconds, below / seconds) for (name, seconds), below in zip(rungs, before, strict=False))


def _reusing(roles: Roles, kinds: int) -> Roles:
    """Return these roles with only the first ``kinds`` of them taken from the cache, and all others LIVE."""
    return Roles(*[Role.REUSE if role is Role.REUSE and kind < kinds else Role.LIVE for kind, role in enumerate(roles)])


def _seconds(network: Network, roles: Roles, inputs: dict[str, Any], device: torch.device) -> float:
    """Return what one eager step takes: the median of a few, on zeros of these shapes and dtypes."""
    zeros = zeros_like(inputs, device)
    cache: Cache = EMPTY_CACHE
    if Role.REUSE in roles:
        cache = network.function(roles.capturing())(cache, (), zeros)[1]
    function, clock = network.function(roles), StepClock()
    for _ in range(1 + _ROUNDS):
        started = clock.start(device)
        function(cache, (), zeros)
        clock.stop(started, 0, "", 0, 0)
    return statistics.median(step.seconds for step in clock.steps()[1:])
