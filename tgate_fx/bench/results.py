"""What a race's timings say: rows for JSON, the table and the plots."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from ..macs.architectures import ARCHITECTURES
from ..macs.count import Generation, image_cost, step_costs
from .contenders import CONTENDERS, Contender, reference_of
from .machine import machine
from .prepare import DEEPCACHE
from .race import Outcome, Race
from .worker import Timing
from .workload import Workload


def results(race: Race, workload: Workload, rounds: int) -> dict[str, Any]:
    """Return all of a race, as JSON has it.

    Returns:
        ``machine``; ``workload``; ``gemm_gflops``, the median of what a 2048-square matrix product reached in every
        round of every group; and ``rows``: one for each contender and gate step, as `_row` makes them, ``failed`` for
        those that have none, with the reason.
    """
    rows = [
        _row(outcome, gate, timings, workload, race)
        for outcome in race.outcomes
        for gate, timings in outcome.timings.items()
        if outcome.failure is None
    ]
    for row in rows:
        _compare_with_ungated(row, rows, workload)
    rows.sort(key=lambda row: row["median"], reverse=True)
    return {
        "machine": machine(workload.device),
        "workload": {
            "model": ARCHITECTURES[workload.arch].title,
            "arch": workload.arch,
            "latents": list(workload.latent_shape),
            "steps": workload.steps,
            "dtype": workload.dtype,
            "device": workload.device,
            "batch": workload.batch,
            "rounds": rounds,
            "weights": "random",
        },
        "gemm_gflops": statistics.median(itertools.chain.from_iterable(race.gemm_gflops.values())),
        "rows": rows,
        "failed": {outcome.name: outcome.failure for outcome in race.outcomes if outcome.failure is not None},
    }


def _row(
    outcome: Outcome, gate: int | None, timings: Sequence[Timing], workload: Workload, race: Race
) -> dict[str, Any]:
    """One contender at one gate step.

    Returns:
        ``seconds`` of every call, which makes a batch of images, their ``median`` and ``spread`` (least, most),
        ``speed_up`` over the eager pipeline that took turns with it, ``step_seconds``, ``gflops`` and ``share_of_gemm``
        by phase (see `_by_phase`), ``compile_seconds`` (what its first image took longer than its second), ``peak_gib``
        (the most memory at once, with compiling) and ``running_gib`` (while images were timed, where the system can
        tell), ``error`` and what it was measured against, ``graphs`` and ``graph_breaks`` of torch.compile, and
        ``recompiles``: the graphs compiled after both phases had run.
    """
    contender = CONTENDERS[outcome.name]
    assert outcome.ready is not None
    assert outcome.finished is not None
    seconds = [timing.seconds for timing in timings]
    baseline = next(other for other in race.outcomes if other.group == outcome.group and other.name == "diffusers")
    eager = statistics.median(timing.seconds for timing in baseline.timings[None])
    return {
        "contender": outcome.name,
        "title": contender.title,
        "gate": gate,
        "group": outcome.group,
        "seconds": seconds,
        "median": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "speed_up": eager / statistics.median(seconds),
        **_by_phase(contender, gate, timings, workload, statistics.median(race.gemm_gflops[outcome.group])),
        "compile_seconds": outcome.ready.first_seconds - outcome.ready.second_seconds,
        "peak_gib": max(outcome.ready.peak_gib, outcome.finished.peak_gib),
        "running_gib": outcome.finished.peak_gib,
        "error": outcome.error,
        "reference": reference_of(outcome.name, workload.arch),
        "graphs": outcome.finished.graphs,
        "graph_breaks": outcome.finished.graph_breaks,
        "recompiles": outcome.finished.graphs - outcome.ready.graphs,
    }


def _by_phase(
    contender: Contender, gate: int | None, timings: Sequence[Timing], workload: Workload, gemm: float
) -> dict[str, dict[str, float]]:
    """Return the seconds and rates of steps, by phase.

    Returns:
        ``step_seconds``, the mean of a phase's steps, the median over images, without the first step of an image, which
        includes what a pipeline does before it; where it is known what is computed, ``gflops``, the rate at which that
        is (a multiply-add is two), and ``share_of_gemm``, that over the rate ``gemm`` of a matrix product.
    """
    phases = {"pre-gate": slice(1, gate)} | ({} if gate is None else {"post-gate": slice(max(gate, 1), None)})
    phases = {phase: steps for phase, steps in phases.items() if timings[0].steps[steps]}
    mean = {
        phase: statistics.median(statistics.mean(timing.steps[steps]) for timing in timings)
        for phase, steps in phases.items()
    }
    generation = _generation(contender, gate, workload)
    rates = {}
    if generation is not None:
        costs = step_costs(generation)
        for phase, steps in phases.items():
            of_an_image = statistics.mean(cost.total for cost in costs[steps])
            rates[phase] = 2 * workload.batch * of_an_image / mean[phase] / 1e9
    shares = {phase: rate / gemm for phase, rate in rates.items()}
    return {"step_seconds": mean, "gflops": rates, "share_of_gemm": shares}


def _generation(contender: Contender, gate: int | None, workload: Workload) -> Generation | None:
    schedule = contender.schedule_at(gate)
    if schedule is None:
        return None
    branch = None if schedule.deep_interval is None else DEEPCACHE.branch
    return Generation(workload.arch, workload.steps, schedule, branch=branch, size=workload.size)


def _compare_with_ungated(row: dict[str, Any], rows: Sequence[dict[str, Any]], workload: Workload) -> None:
    """Add ``speed_up_over_ungated`` (the contender with the same compile settings and nothing cached) and its limit.

    ``same_group`` says whether the two took turns; if not, they are compared by what each is to the eager pipeline of
    its own group. ``limit`` is the multiply-adds of that one over this row's, and ``share_of_limit`` how much of it is
    reached. ``capture_cost`` is by what share a step before the gate takes longer than that one's, and
    ``memory_over_ungated`` by what share this one takes more memory while it runs.
    """
    contender = CONTENDERS[row["contender"]]
    candidates = [other for other in rows if other["contender"] == contender.ungated]
    if not candidates:
        return
    ungated = next((other for other in candidates if other["group"] == row["group"]), candidates[0])
    row["same_group"] = ungated["group"] == row["group"]
    row["speed_up_over_ungated"] = row["speed_up"] / ungated["speed_up"]
    row["memory_over_ungated"] = row["running_gib"] / ungated["running_gib"] - 1
    generation = _generation(contender, row["gate"], workload)
    if generation is not None:
        row["limit"] = image_cost(generation.plain).total / image_cost(generation).total
        row["share_of_limit"] = row["speed_up_over_ungated"] / row["limit"]
        caches_more = generation.schedule.deep_interval is not None or generation.schedule.caches_self_attention
        if not caches_more and "pre-gate" in row["step_seconds"]:
            eager = ungated["median"] * ungated["speed_up"] / (row["median"] * row["speed_up"])
            row["capture_cost"] = row["step_seconds"]["pre-gate"] / ungated["step_seconds"]["pre-gate"] * eager - 1
