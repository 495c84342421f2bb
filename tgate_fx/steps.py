"""Which step a generation is at: one count for all of its networks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .auto_gate import AutoGate, Watch
from .errors import UnsupportedError
from .report import StepClock
from .schedule import Schedule
from .step_count import noisiest

# Where a generation ends: `Gated.generation`, its context manager, what is in that, the gated pipeline's call.
_OUTSIDE_OF_GENERATION = 6


class Steps:
    """The steps of one generation.

    Args:
        pipe: the pipeline, in the middle of its own ``__call__`` or of a loop of the user's.
        schedule: which phase each step is in.
        guided: tells whether there is guidance now.
        count: tells how many steps the loop that has just begun with this timestep will have, None if it is not known.
        calls_back: whether a callback of the user's runs between steps.
        only_conditional: whether companions are given the conditional branch alone.

    Attributes:
        schedule: the same, with a share of the steps made a step index once their number is known.
        begun: how many steps were begun, in all loops.
        loop: how many denoising loops were begun: each is gated anew.
        watch: decides when the gate opens, if it does so by itself and has not yet.
        similarity: of the branches, at the step that opened it.
        clock: what each step was, and how long it took.
        calls_back, only_conditional: see above.
    """

    def __init__(
        self,
        pipe: Any,
        schedule: Schedule,
        *,
        guided: Callable[[], bool],
        count: Callable[[Any], int | None],
        calls_back: bool,
        only_conditional: bool,
    ) -> None:
        self._pipe = pipe
        self._guided = guided
        self._count = count
        self._given = schedule
        self._expected: int | None = None
        self._timesteps: Any = None
        self._first_timestep: Any = None
        self._loop_from = 0
        self._announced = False
        self._opened = False
        self.schedule = schedule
        self.begun = 0
        self.loop = 0
        self.watch: Watch | None = None
        self.similarity: float | None = None
        self.clock = StepClock()
        self.calls_back = calls_back
        self.only_conditional = only_conditional

    @property
    def index(self) -> int:
        """The index of the step that was begun last, in its loop."""
        return self.begun - self._loop_from - 1

    @property
    def guided(self) -> bool:
        """Whether the pipeline guides now."""
        return self._guided()

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return getattr(self._pipe, "scheduler", None)

    @property
    def will_cut(self) -> bool:
        """Whether a guidance branch is left out at some step, as far as is known."""
        return self.will_gate or (self.schedule.guidance is not None and not self.schedule.off)

    @property
    def will_gate(self) -> bool:
        """Whether there is a gated step, as far as the number of steps is known."""
        gate = self.schedule.gate_step
        if self.schedule.off:
            return False
        if isinstance(gate, (int, float)):
            return self._expected is None or gate < self._expected
        return isinstance(gate, AutoGate)

    def begin(self, timestep: Any) -> None:
        """Begin a step; settle at the first of a loop where the gate is.

        Another begins if the scheduler's timesteps were set anew, or, once all steps of a loop have run, with the
        timestep of its first step.

        Raises:
            UnsupportedError: there are more steps than the pipeline said.
        """
        if self._announced:
            self._announced = False
            return
        if self.begun == 0 or self._scheduled() is not self._timesteps:
            self._begin_loop(timestep)
        elif self._expected is not None and self.begun - self._loop_from >= self._expected:
            if noisiest(timestep) == noisiest(self._first_timestep):
                self._begin_loop(timestep)
            elif self.schedule.acts:
                raise UnsupportedError(
                    f"{type(self._pipe).__name__} began step {self.begun - self._loop_from} of a loop of "
                    f"{self._expected}: expected as many steps as it said, each at a timestep of its own, or a new "
                    "loop, from its first timestep on or after scheduler.set_timesteps. Use it with gate_step=None."
                )
        self.begun += 1
        if self.watch is not None and self.watch.opens_at(self.index):
            self.schedule = replace(self.schedule, gate_step=self.index)
            self.similarity, self.watch = self.watch.similarity, None

    def announce(self, timestep: Any) -> None:
        """Begin a step for a companion, which runs before the denoiser does; that begins the same one."""
        if not self._announced:
            self.begin(timestep)
            self._announced = True

    def check_ran_all(self) -> None:
        """See, once a loop has ended, that it had as many steps as the pipeline said, if any depends on their number.

        Raises:
            UnsupportedError: it had fewer, so that the gate, a full step or the last one was not where it was to be.
        """
        ran, last, gate = self.begun - self._loop_from, self.schedule.last, self.schedule.gate_step
        self._opened = self._opened or (isinstance(gate, int) and ran > gate)
        if last is not None and ran <= last:
            raise UnsupportedError(
                f"{type(self._pipe).__name__} ended a loop of {last + 1} steps after {ran}: expected as many as it "
                "said, which a share of them and a forecast depend on. Give steps as ints, and leave forecast out."
            )

    def warn_if_never_gated(self) -> None:
        """Warn, after `check_ran_all`, if no loop came to its gate; one that opens by itself may rightly stay shut."""
        gate = self.schedule.gate_step
        if self.begun and isinstance(gate, int) and not self._opened and not self.schedule.off:
            warnings.warn(
                f"Nothing was gated: gate_step={gate} was given, counted from 0, and there were "
                f"{self.begun - self._loop_from} steps. Expected an earlier gate: give a smaller number, a share of "
                "the steps such as 0.4, or None for no gate.",
                stacklevel=_OUTSIDE_OF_GENERATION,
            )

    def _begin_loop(self, timestep: Any) -> None:
        self.check_ran_all()
        self._first_timestep = timestep
        self._timesteps = self._scheduled()
        self._expected = self._count(timestep)
        self._loop_from = self.begun
        self.schedule = self._given.resolve(self._expected)
        gate = self.schedule.gate_step
        self.watch = Watch(gate) if isinstance(gate, AutoGate) and not self.schedule.off else None
        self.similarity = None
        self.loop += 1

    def _scheduled(self) -> Any:
        return getattr(self.scheduler, "timesteps", None)

    def refuse_call(self) -> None:
        """Raise `UnsupportedError` for a call of the denoiser beyond those of its step."""
        raise UnsupportedError(
            f"{type(self._pipe).__name__} calls its denoiser several times a step: expected one call with the batch "
            "[uncond, cond], or one for each branch. Use it with gate_step=None."
        )
