"""Where a generation's speed-up comes from: its steps timed eagerly, skipping one more kind of work on each rung."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .compiled.lora_scales import own_scales
from .errors import StateError
from .gated import Gated
from .inputs import latents_of, zeros_like
from .network import Network
from .report import Rung, StepClock, StepReport
from .roles import Kind, Role, Roles
from .split import EMPTY_CACHE, Cache

_ROUNDS = 3  # after one that is not counted


def measure_ladder(gated: Gated) -> tuple[Rung, ...]:
    """Time the rungs for the last generation; the last rung is that generation itself, if it was compiled.

    Raises:
        StateError: there are no steps that can be timed.
    """
    with gated.one_at_a_time(), own_scales(gated), ExitStack() as stack, torch.no_grad():
        for each in gated.networks:
            stack.enter_context(each.network.dispatch.lock)
        return _rungs(gated)


def _rungs(gated: Gated) -> tuple[Rung, ...]:
    steps = gated.steps.clock.steps() if gated.steps is not None else ()
    if not steps:
        raise StateError(
            "No step has run since this pipeline was gated: expected a generation, whose steps the ladder times. "
            "Generate an image first."
        )
    runs = {run.network.attribute: run for run in gated.runs if run.device is not None}
    devices = {each.network.attribute: device for each, device in zip(gated.networks, gated.devices, strict=True)}
    for name, run in runs.items():
        if run.device != devices[name]:
            raise StateError(
                f"The denoiser is on {devices[name]}, and the last generation ran on {run.device}: expected it where "
                "it ran, to be timed there. Move the pipeline back, or take offloading off for this."
            )
    given = {
        (name, latents_of(example.inputs)[1].shape[0]): example.inputs
        for name, run in runs.items()
        for example in run.examples.values()
    }
    for step in steps:
        if not step.calls:
            continue
        if step.compiled or (step.network, step.batch // step.calls) not in given:
            what = "a graph was compiled, which its seconds include" if step.compiled else "the batch changed"
            raise StateError(
                f"At step {step.index} of the last generation {what}: expected one whose steps can be timed. Generate "
                "once more with the same arguments, or without what changes the batch, then ask for the ladder."
            )

    @functools.cache
    def seconds(name: str, roles: Roles, rows: int) -> float:
        return _seconds(runs[name].network, roles, given[name, rows], devices[name])

    # A step that was forecast is, on the rungs before that, another like the last one that was computed.
    computed = [step for step in steps if step.calls]
    steps = tuple(itertools.accumulate(steps, lambda last, step: step if step.calls else last))
    by_phase = {(name, each.name): each.roles for name, run in runs.items() for each in run.examples.values()}
    wholes = {name: max((step for step in steps if step.network == name), key=lambda step: step.batch) for name in runs}

    def total(kinds: int, *, sliced: bool = True, like: Sequence[StepReport] = steps) -> float:
        """Return the sum with only so many kinds of site cached; ``sliced`` if guidance is dropped as it was."""
        return sum(
            rows.calls
            * seconds(step.network, _reusing(by_phase[step.network, step.phase], kinds), rows.batch // rows.calls)
            for step in like
            for rows in [step if sliced else wholes[step.network]]
        )

    rungs = [("ungated, eager", total(0, sliced=False))]
    if any(step.batch < wholes[step.network].batch for step in steps):
        rungs.append(("guidance dropped", total(0)))
    for kind in Kind:
        if any(by_phase[step.network, step.phase][kind] is Role.REUSE for step in steps):
            rungs.append((f"{kind.title} cached", total(kind + 1)))
    if len(computed) < len(steps):
        rungs.append(("steps forecast", total(len(Kind), like=computed)))
    if gated.networks[0].phases.is_compiled:
        rungs.append(("compiled", sum(step.seconds for step in computed)))
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
    for index in range(1 + _ROUNDS):
        started = clock.start(device)
        function(cache, (), zeros)
        clock.stop(started, index, "", "", 0, 0)
    return statistics.median(step.seconds for step in clock.steps()[1:])
