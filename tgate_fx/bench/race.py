"""The contenders take turns: each in a process of its own, as many at once as there is memory for."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from .contenders import CONTENDERS, reference_of
from .machine import gemm_gflops, memory_gib
from .worker import Failed, Finished, Ready, Timing, work
from .workload import Workload

_BASELINE = "diffusers"
_PROCESS_GIB = {"cpu": 1.0, "cuda": 4.0}  # what a process takes besides weights
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}  # of the largest latent
_PAUSE = 0.3  # seconds until the threads of whoever ran before have gone to sleep


@dataclass
class Outcome:
    """What became of one contender.

    Attributes:
        name: in `CONTENDERS`.
        group: which contenders it took turns with.
        ready: what getting ready gave.
        error: how far its latents are from its reference's, of the largest of these; None if it has no reference.
        timings: for each gate step (None for a contender that has none), an image of each round.
        finished: what was known at the end.
        failure: why it was not timed to the end.
    """

    name: str
    group: int
    ready: Ready | None = None
    error: float | None = None
    timings: dict[int | None, list[Timing]] = field(default_factory=dict)
    finished: Finished | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Race:
    """All outcomes, and the GFLOP/s of a matrix product in every round, by group."""

    outcomes: list[Outcome]
    gemm_gflops: dict[int, list[float]]


def race(names: Sequence[str], workload: Workload, rounds: int, keep: Callable[[Race], None]) -> None:
    """Run every contender's images, taking turns, ``rounds`` times; hand what there is to ``keep`` after each group.

    Each is first checked against its reference, which runs too if it was not asked for.
    """
    gemm: dict[int, list[float]] = {}
    outcomes: list[Outcome] = []
    references: dict[str, np.ndarray[Any, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        denoiser = Path(folder) / "denoiser.pt"
        gib = workload.save_denoiser(denoiser)
        for name in sorted({str(reference_of(name, workload.arch)) for name in names} - {"None"}):
            progress.console.print(f"{CONTENDERS[name].title}: the reference's image")
            with _process(Outcome(name, -1), workload, denoiser) as runner:
                runner.get_ready()
                if runner.outcome.ready is not None:
                    references[name] = runner.outcome.ready.latents
        budget = 0.9 * memory_gib(workload.device)
        for number, group in enumerate(groups(names, gib, budget, workload.device)):
            outcomes += _run_group(number, group, workload, denoiser, rounds, references, gemm, progress)
            keep(Race(outcomes, gemm))


def groups(names: Sequence[str], weights_gib: float, budget_gib: float, device: str = "cpu") -> list[list[str]]:
    """Contenders that are in memory together: the baseline, and as many others as fit.

    Those that are compared with each other come together where they can: a machine's speed drifts from group to group.
    """

    # On a CPU all processes map the same file of weights; on a GPU each has its own.
    shared = 0.0 if device == "cuda" else weights_gib

    def takes(name: str) -> float:
        copies = 1.0 if device == "cuda" else CONTENDERS[name].copies
        return _PROCESS_GIB[device] + copies * weights_gib

    def fits(name: str, group: Sequence[str]) -> bool:
        return shared + sum(map(takes, [*group, name])) <= budget_gib

    made: list[list[str]] = []
    left = sorted((name for name in names if name != _BASELINE), key=takes, reverse=True)
    while left:
        name = left.pop(0)
        group = next((group for group in made if fits(name, group)), None)
        if group is None:
            group = [_BASELINE]
            made.append(group)
        group.append(name)
        for other in [other for other in left if _are_compared(name, other)]:
            if fits(other, group):
                left.remove(other)
                group.append(other)
    return made or [[_BASELINE]]


def _are_compared(name: str, other: str) -> bool:
    """Return whether one is the ungated run or the reference of the other."""
    pairs = ((name, other), (other, name))
    return any(one in (CONTENDERS[two].ungated, CONTENDERS[two].reference) for one, two in pairs)


class _Runner:
    """A contender's process, seen from here."""

    def __init__(self, outcome: Outcome, workload: Workload, connection: Connection) -> None:
        self.outcome = outcome
        self._reference = reference_of(outcome.name, workload.arch)
        self._connection = connection
        takes_gate = CONTENDERS[outcome.name].takes_gate
        self.gates: tuple[int | None, ...] = workload.gates if takes_gate else (None,)

    def get_ready(self) -> None:
        self.outcome.ready = self._receive()

    def check(self, references: dict[str, np.ndarray[Any, Any]], tolerance: float) -> None:
        """Compare what it generated with its reference; one that disagrees is out."""
        if self._reference is None or self.outcome.ready is None:
            return
        if self._reference not in references:
            self.outcome.failure = f"its reference, {self._reference}, failed"
            return
        expected = references[self._reference]
        error = float(np.abs(self.outcome.ready.latents - expected).max() / np.abs(expected).max())
        self.outcome.error = error
        if not error <= (0 if CONTENDERS[self.outcome.name].exact else tolerance):
            self.outcome.failure = f"its latents are {error:.1e} away from those of {self._reference}"

    def run(self, gate: int | None) -> None:
        time.sleep(_PAUSE)
        timing = self._ask(1 if gate is None else gate)  # who takes no gate does not look at it
        if timing is not None:
            self.outcome.timings.setdefault(gate, []).append(timing)

    def finish(self) -> None:
        self.outcome.finished = self._ask(None)

    def _ask(self, gate: int | None) -> Any:
        with suppress(OSError):  # whose process has ended, which receiving finds too
            self._connection.send(gate)
        return self._receive()

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            message = Failed("its process ended (out of memory?)")
        if isinstance(message, Failed):
            self.outcome.failure = message.message
            return None
        return message


@contextmanager
def _process(outcome: Outcome, workload: Workload, denoiser: Path) -> Iterator[_Runner]:
    """A contender's process, for as long as this lasts."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(
        target=work, args=(there, outcome.name, workload, denoiser, torch.get_num_threads()), daemon=True
    )
    process.start()
    there.close()
    try:
        yield _Runner(outcome, workload, here)
    finally:
        here.close()  # which ends it
        process.join(timeout=20)
        process.kill()


def _run_group(
    number: int,
    group: Sequence[str],
    workload: Workload,
    denoiser: Path,
    rounds: int,
    references: dict[str, np.ndarray[Any, Any]],
    gemm: dict[int, list[float]],
    progress: Progress,
) -> list[Outcome]:
    outcomes = [Outcome(name, number) for name in group]
    with ExitStack() as stack:
        runners = []
        task = progress.add_task("getting ready", total=len(group))
        for outcome in outcomes:
            progress.update(task, description=f"getting ready: {CONTENDERS[outcome.name].title}")
            runner = stack.enter_context(_process(outcome, workload, denoiser))
            runner.get_ready()
            runner.check(references, _TOLERANCE[workload.dtype])
            runners.append(runner)
            progress.advance(task)
        turns = sum(len(runner.gates) for runner in runners)
        progress.reset(task, total=rounds * turns)
        for _ in range(rounds):
            time.sleep(_PAUSE)
            gemm.setdefault(number, []).append(gemm_gflops(workload.torch_dtype, workload.device))
            for runner in runners:
                for gate in runner.gates:
                    progress.update(task, description=f"taking turns: {CONTENDERS[runner.outcome.name].title}")
                    if runner.outcome.failure is None:
                        runner.run(gate)
                    progress.advance(task)
        for runner in runners:
            if runner.outcome.failure is None:
                runner.finish()
        if outcomes[0].failure is not None:
            for outcome in outcomes[1:]:
                outcome.failure = outcome.failure or f"{_BASELINE}, which it took turns with, failed"
        progress.remove_task(task)
    return outcomes
