"""One generation of a companion: as that of a network, but before the denoiser in each step, and not in every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .run import Run
from .schedule import Schedule, Step


class CompanionRun(Run):
    """One generation, seen from one companion.

    Only cross-attention is cached. A companion that was left out at the last full step computes all of its next one,
    and is gated from the one after that.
    """

    _last: int | None = None  # the index of the step that it ran last

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one call; see `Run.step`."""
        output = super().step(args, kwargs)
        self._last = self.steps.index
        return output

    @property
    def guided(self) -> bool:
        """Whether this step has two branches here; see `Run.guided`."""
        return self.steps.guided and not self.steps.only_conditional

    def own_schedule(self, schedule: Schedule) -> Schedule:
        """Return the schedule without what is cached besides cross-attention."""
        return dataclasses.replace(
            schedule, sp_interval=1, fi_interval=1, warm_up=0, deep_interval=None, after_gate=schedule.branch
        )

    def compare(self, conditional: Any, unconditional: Any) -> None:
        """Do nothing: the gate opens by what the denoiser predicts."""

    def computes(self, step: Step) -> bool:
        """Return whether the denoiser runs at this step, whose steps may be counted from another gate than these."""
        return not step.gated or self._forecast.is_empty or self.steps.schedule.at(self.steps.index).computed

    def forecast_at(self, index: int) -> Any:
        """Return what it gave last: nobody reads that at a step at which the denoiser does not run."""
        return self._forecast.last

    def begin_step(self, timestep: Any) -> None:
        """Begin the step that the denoiser will run next."""
        self.steps.announce(timestep)
        if self.loop != self.steps.loop:
            return
        if self._follows is not self.steps.schedule:
            self._follow()
        index = self.steps.index
        if self._last is not None and self._last < self.schedule.at(index).full_at < index:
            self.schedule = self.schedule.begun_at(index)

    def note(self, started: Any, phase: str, rows: int, compiled: int) -> None:
        """Note the call that has ended, beside the step that it is for."""
        self.steps.clock.stop_companion(started, self.steps.begun - 1, compiled)
