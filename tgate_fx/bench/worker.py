"""One contender in a process of its own: it gets ready, and then runs an image whenever it is its turn."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..compiled import private
from .contenders import CONTENDERS
from .machine import forget_peak, peak_gib, synchronize
from .prepare import Generate
from .workload import Workload

# The image that results are compared by, and that compiles every phase: short, with a gate.
CHECK_STEPS, CHECK_GATE = 8, 5


@dataclass(frozen=True)
class Ready:
    """Getting ready is done.

    Attributes:
        latents: of the short image.
        first_seconds, second_seconds: it was run twice; the first run includes compiling.
        peak_gib: the most memory at once until then.
        graphs: compiled by torch.compile until then.
    """

    latents: np.ndarray[Any, Any]
    first_seconds: float
    second_seconds: float
    peak_gib: float
    graphs: int


@dataclass(frozen=True)
class Timing:
    """One image: its seconds, and those of each step."""

    seconds: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class Finished:
    """What is known at the end: the most memory at once since it was ready, and what torch.compile did."""

    peak_gib: float
    graphs: int
    graph_breaks: int


@dataclass(frozen=True)
class Failed:
    """It could not go on; the message says why."""

    message: str


@dataclass
class _Stamps:
    """When an image began and each of its steps ended: when its scheduler was called. On CUDA, on the stream."""

    device: str
    _marks: list[Any] = field(default_factory=list)

    def begin(self) -> None:
        """Begin an image."""
        self._marks.clear()
        self._mark()

    def _mark(self) -> None:
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Of each step, once all are done."""
        pairs = itertools.pairwise(self._marks)
        if self.device == "cuda":
            return tuple(before.elapsed_time(after) / 1000 for before, after in pairs)
        return tuple(after - before for before, after in pairs)

    def put_on(self, scheduler: type[Any]) -> None:
        plain = scheduler.step

        @functools.wraps(plain)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._mark()
            return plain(*args, **kwargs)

        scheduler.step = step


def work(connection: Connection, name: str, workload: Workload, denoiser: Path, threads: int) -> None:
    """Send `Ready`; then a `Timing` for every gate step received, and `Finished` for None.

    `Failed` ends it early, and so does a connection that is closed.
    """
    torch.set_num_threads(threads)
    # Else it would find what others have compiled, and its compile time would be theirs in part.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(denoiser.parent / f"compiled-{name}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        with torch.no_grad():
            pipe, stamps = workload.pipeline(denoiser), _Stamps(workload.device)
            stamps.put_on(type(pipe.scheduler))
            generate = CONTENDERS[name].prepare(pipe, workload)
            first, _ = _timed(generate, CHECK_STEPS, CHECK_GATE, stamps)
            second, latents = _timed(generate, CHECK_STEPS, CHECK_GATE, stamps)
            values = latents.float().numpy(force=True)
            peak = peak_gib(workload.device)
            connection.send(Ready(values, first.seconds, second.seconds, peak, private.graphs_and_breaks()[0]))
            forget_peak(workload.device)
            while (gate := connection.recv()) is not None:
                connection.send(_timed(generate, workload.steps, gate, stamps)[0])
            connection.send(Finished(peak_gib(workload.device), *private.graphs_and_breaks()))
    except EOFError:
        return
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        connection.send(Failed(f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"))


def _timed(generate: Generate, steps: int, gate: int, stamps: _Stamps) -> tuple[Timing, torch.Tensor]:
    synchronize(stamps.device)
    stamps.begin()
    started = time.perf_counter()
    latents = generate(steps, gate)
    synchronize(stamps.device)
    return Timing(time.perf_counter() - started, stamps.seconds()), latents
