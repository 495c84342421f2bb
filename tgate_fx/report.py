"""What the last generation did, step by step."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class StepReport:
    """One step of a generation.

    Attributes:
        index: which evaluation of the denoiser this was, from 0.
        phase: "pre-gate" where all is computed, which single steps may be after the gate too, or "post-gate"; with
            ", self-attention reused" or ", shallow" where more is cached; "forecast" where the denoiser did not run.
        batch: the rows that the denoiser computed, in all calls of the step; 0 if it did not run.
        seconds: how long the denoiser took. On CUDA the time between two events on the stream; elsewhere wall-clock.
        compiled: graphs compiled within this step; its seconds include compiling them.
        network: the pipeline's attribute that has the denoiser.
        calls: how many calls of the denoiser were computed: two where guidance branches come in separate calls,
            none where the output was forecast.
        companion_seconds: how long its companions took, such as ControlNets. Their graphs count as compiled too.
    """

    index: int
    phase: str
    batch: int
    seconds: float
    compiled: int
    network: str
    calls: int
    companion_seconds: float = 0.0


class Rung(NamedTuple):
    """One more thing that made a generation faster.

    Attributes:
        name: what came in: "guidance dropped", "cross-attention cached", "self-attention cached", "deep branch cached",
            "steps forecast", "compiled"; "ungated, eager" for the first.
        seconds: what the denoiser takes for all steps with this and what came in before it.
        speedup: how many times as fast that is as the rung before; 1 for the first.
    """

    name: str
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Report:
    """What the last generation did. `print` it for a table.

    Attributes:
        steps: a row for each step.
        compiled_graphs: graphs compiled for this pipeline so far, over all generations.
        recompiles: graphs that the last generation compiled for a phase that had one before it began.
        gate: index of the first gated step, None if no step was gated.
        sites: how many modules are cached after the gate.
        compiler: how the phases run: "eager", or the torch.compile settings in force.
        cache_bytes: the size of all static caches of this pipeline.
        ladder: where the speed-up comes from, if that was asked for.
        similarity: of the guidance branches, at the step that opened the gate; None where it opened by number.
    """

    steps: tuple[StepReport, ...] = ()
    compiled_graphs: int = 0
    recompiles: int = 0
    gate: int | None = None
    sites: int = 0
    compiler: str = "eager"
    cache_bytes: int = 0
    ladder: tuple[Rung, ...] = ()
    similarity: float | None = None

    def __str__(self) -> str:
        opened = "" if self.similarity is None else f", opened by branches that were alike to {self.similarity:.4f}"
        lines = [
            f"gate at step {self.gate}{opened}" if self.gate is not None else "not gated",
            f"{self.sites} site{'' if self.sites == 1 else 's'}, {self.cache_bytes / 2**20:.2f} MiB cached, "
            f"{self.compiler}, "
            f"{self.compiled_graphs} graphs compiled, {self.recompiles} recompiles in this generation",
        ]
        several = len({step.network for step in self.steps}) > 1
        phases = [f"{step.network} {step.phase}" if several else step.phase for step in self.steps]
        width = max(map(len, ("phase", *phases)))
        beside = any(step.companion_seconds for step in self.steps)
        lines.append(
            f"{'step':>5}  {'phase':<{width}}  {'batch':>5}  {'seconds':>10}" + f"  {'companions':>10}" * beside
        )
        for step, phase in zip(self.steps, phases, strict=True):
            note = f"  {step.companion_seconds:>10.4f}" if beside else ""
            note += f"  compiled {step.compiled}" if step.compiled else ""
            lines.append(f"{step.index:>5}  {phase:<{width}}  {step.batch:>5}  {step.seconds:>10.4f}{note}")
        if self.ladder:
            lines.append(f"{'where the speed-up comes from':<29}  {'seconds':>10}  {'speed-up':>8}  {'in all':>6}")
        for rung in self.ladder:
            in_all = self.ladder[0].seconds / rung.seconds
            lines.append(f"{rung.name:<29}  {rung.seconds:>10.4f}  {rung.speedup:>7.2f}x  {in_all:>5.2f}x")
        return "\n".join(lines)


class _Row(NamedTuple):
    """One call of a network."""

    step: int
    network: str
    phase: str
    rows: int
    compiled: int
    seconds: Callable[[], float]


class _CompanionRow(NamedTuple):
    """One call of a companion."""

    step: int
    compiled: int
    seconds: Callable[[], float]


@dataclass
class StepClock:
    """Collects a row for each call at a few microseconds a call; the steps are made of them when the report is read."""

    _rows: list[_Row] = field(default_factory=list)
    _companions: list[_CompanionRow] = field(default_factory=list)

    def start(self, device: torch.device) -> Any:
        """Begin timing a call on this device."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            return event
        return time.perf_counter()

    def stop(self, started: Any, step: int, network: str, phase: str, rows: int, compiled: int) -> None:
        """End the call that `start` began, and note what it was."""
        self._rows.append(_Row(step, network, phase, rows, compiled, _since(started)))

    def stop_companion(self, started: Any, step: int, compiled: int) -> None:
        """End the call of a companion that `start` began."""
        self._companions.append(_CompanionRow(step, compiled, _since(started)))

    def steps(self) -> tuple[StepReport, ...]:
        """Return a row for each step so far. On CUDA this waits for the last one to finish."""
        calls = [list(group) for _, group in itertools.groupby(self._rows, lambda row: row.step)]
        beside: defaultdict[int, list[_CompanionRow]] = defaultdict(list)
        for row in self._companions:
            beside[row.step].append(row)
        return tuple(
            StepReport(
                index=group[0].step,
                phase=group[0].phase,
                batch=sum(row.rows for row in group),
                seconds=sum(row.seconds() for row in group),
                compiled=sum(row.compiled for row in group) + sum(row.compiled for row in beside[group[0].step]),
                network=group[0].network,
                calls=sum(row.rows > 0 for row in group),
                companion_seconds=sum(row.seconds() for row in beside[group[0].step]),
            )
            for group in calls
        )


def _since(started: Any) -> Callable[[], float]:
    """Return what gives the seconds from what `StepClock.start` returned to now."""
    if isinstance(started, float):
        seconds = time.perf_counter() - started
        return lambda: seconds
    ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    ended.record(torch.cuda.current_stream(started.device))
    return lambda: _elapsed(started, ended)


def _elapsed(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    ended.synchronize()
    return float(started.elapsed_time(ended)) / 1000
