"""One generation of one network: slice the branch, run the phase, keep what it captured, give the batch back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import StaticCache
from .errors import StateError, UnsupportedError
from .forecast import Forecast
from .held_difference import HeldDifference
from .inputs import latents_of, map_tensors
from .network import Network
from .phases import Example, Phases, example
from .roles import Kind, Role
from .schedule import Schedule, Step
from .split import Cache
from .steps import Steps
from .trend import Trend


@dataclass
class GatedNetwork:
    """A network of a gated pipeline, what runs its phases, and where captured values are kept."""

    network: Network
    phases: Phases
    cache: StaticCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = StaticCache(self.phases.needs_static_addresses)


# Where what is kept of a step's first call is, or of both branches, and of its second one.
_SLOTS = range(2)

# In the second one's place, where only one branch goes on: what the conditional branch captured, for a callback may
# turn guidance off before the gate's first step.
_OWN = 1


class Run:
    """One generation, seen from one network.

    Args:
        gated: the network.
        steps: of the generation, shared by all of its networks.

    Attributes:
        network, phases: of the network.
        steps: of the generation.
        loop: which of the pipeline's loops it is in; 0 before its first call.
        schedule: which phase each step is in, from the network's first call on.
        examples: for each phase, by its name, what it was given first, for `tgate_fx.graphs`.
        device: where the network ran; None before its first call.
        branch_sliced: whether the call that ran last saw one guidance branch only.
    """

    _held: HeldDifference | None = None
    _first_output: Any = None  # of the last full step
    _slot_since: int

    def __init__(self, gated: GatedNetwork, steps: Steps) -> None:
        self.network = gated.network
        self.phases = gated.phases
        self._cache = gated.cache
        self.steps = steps
        family = self.network.family
        own = steps.schedule
        self._guidance = family.guidance(self.network.module, family.rows, own.branch, own.cache_weight)
        self.loop = 0
        self._answers: tuple[Any, ...] = ()
        self.schedule = self.own_schedule(steps.schedule)
        self.examples: dict[str, Example] = {}
        self.device: torch.device | None = None
        self.branch_sliced = False

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one call of the network, with the arguments that the pipeline gave."""
        inputs = dict(zip(self.network.dispatch.parameters, args, strict=False))
        inputs.update(kwargs)
        _, latents = latents_of(inputs)
        guided = self.guided
        call = self._guidance.place(inputs, guided)
        if call == 0:
            self.begin_step(inputs.get("timestep"))
        if self.loop != self.steps.loop:
            self._begin(latents)
        elif self._follows is not self.steps.schedule:
            self._follow()
        if call >= self._guidance.calls and self.schedule.acts:
            self.steps.refuse_call()
        index = self.steps.index
        step = self.schedule.at(index)
        if guided and self.steps.will_cut:
            self._verify(index, call, inputs, latents)
            if not step.gated:
                self._check_rows(latents.shape[0])
        if step.one_branch and call:
            return self._answers[-1]
        if guided and self._held is None and self.schedule.after_gate == "guided" and self.steps.will_gate:
            self._held = HeldDifference(self.steps.scheduler)
        sliced = step.one_branch and guided
        difference = self._held.at(inputs.get("timestep"), index) if self._held and sliced else None
        self.branch_sliced = sliced and difference is None
        started = self.steps.clock.start(latents.device)
        graphs, rows = self.phases.graphs, 0
        if self.computes(step):
            output, rows = self._compute(step, call, inputs, guided)
            if step.is_base and (step.one_branch or not guided):
                self._forecast.add(index, output)
        else:
            output = self.forecast_at(index)
        if step.one_branch:
            self._answers = self._guidance.give_back(output, difference) if guided else (output,)
            output = self._answers[0]
        self.note(started, step.phase, rows, self.phases.graphs - graphs)
        return output

    def _compute(self, step: Step, call: int, inputs: dict[str, Any], guided: bool) -> tuple[Any, int]:
        """Run the phase of a step on the rows that it has; return its output, and how many these are."""
        latents = latents_of(inputs)[1]
        rows = latents.shape[0]
        sliced = step.one_branch and guided
        if sliced:
            inputs = self._guidance.one_branch(inputs, rows, gated=step.gated)
            rows = self._guidance.rows_kept(rows)
        slot = self._slot_for(step, call, guided)
        cache = self._cache_for(step, slot, (rows, *latents.shape[1:]))
        if step.phase not in self.examples:
            self.examples[step.phase] = example(step, cache, inputs)
        with self.phases.turns(latents.device):
            output, captured = self.phases(step, cache, inputs)
            if any(step.keep):
                self._keep(step, slot, captured, latents, guided, sliced)
        if guided and not sliced:
            self._compare(step, call, output, inputs.get("timestep"))
        return output, rows

    def _slot_for(self, step: Step, call: int, guided: bool) -> int:
        """Return where what this call captures is kept, and what it reuses is found."""
        if not step.one_branch:
            return min(call, _OWN)
        if not step.gated:
            return 0
        if self._slot_since != step.full_at:  # the first gated one since then
            unblended = not guided and self._cached[_OWN][Kind.CROSS_ATTENTION]
            self._slot = _OWN if unblended else 0
            self._slot_since = step.full_at
        return self._slot

    def _compare(self, step: Step, call: int, output: Any, timestep: Any) -> None:
        """Note what the branches predict at a full step, where a later one depends on it."""
        holds = self._held is not None and step.keep[Kind.CROSS_ATTENTION]
        if not holds and not step.is_base and self.steps.watch is None:
            return
        if not self._guidance.has_other_branch(True):  # the first of two calls
            self._first_output = map_tensors(torch.clone, output)  # the loop may write to its own
            return
        conditional, unconditional = self._guidance.pair(output, self._first_output)
        if self._held is not None and holds:
            self._held.capture(conditional, unconditional, timestep, self.steps.index)
        if step.is_base:
            own = unconditional if self.schedule.branch == "negative" else conditional
            self._forecast.add(self.steps.index, own)
        self.compare(conditional, unconditional)

    def compare(self, conditional: Any, unconditional: Any) -> None:
        """Let the gate see how much alike the branches' outputs are, if it opens by that."""
        if self.steps.watch is not None:
            self.steps.watch.note(self.steps.index, conditional, unconditional)

    def computes(self, step: Step) -> bool:
        """Return whether the network runs at this step."""
        return step.computed

    def forecast_at(self, index: int) -> Any:
        """Return the output of a step at which the denoiser does not run."""
        return self._forecast.at(index)

    def end(self) -> None:
        """End the generation, even one that failed."""
        self.branch_sliced = False
        self._answers = ()
        self._first_output = self._held = None
        self._forecast = Forecast()

    @property
    def guided(self) -> bool:
        """Whether this step has two branches here."""
        return self.steps.guided

    def own_schedule(self, schedule: Schedule) -> Schedule:
        """Return what the generation's schedule means for this network."""
        return schedule

    def begin_step(self, timestep: Any) -> None:
        """Begin a step with its first call here."""
        self.steps.begin(timestep)

    def note(self, started: Any, phase: str, rows: int, compiled: int) -> None:
        """Note the call that has ended."""
        self.steps.clock.stop(started, self.steps.begun - 1, self.network.attribute, phase, rows, compiled)

    def _begin(self, latents: torch.Tensor) -> None:
        """Begin a loop with the network's first call: if that comes after the gate, its gate is the step after it."""
        self.device = latents.device
        self.loop = self.steps.loop
        self._begun_at = self.steps.index
        self._follow()
        if self.steps.watch is not None and not self.steps.guided:
            self.steps.watch.check_can_open()
        # By the slot, which is the call of its step that captured it, and the kind of site.
        self._cached: list[list[Sequence[torch.Tensor]]] = [[()] * len(Kind) for _ in _SLOTS]
        self._cached_for: list[list[tuple[int, ...]]] = [[()] * len(Kind) for _ in _SLOTS]  # the shape of the latents
        self._guided_rows = 0
        self._first_guided: int | None = None
        self._slot = 0  # from the gate on, where one branch goes on
        self._slot_since = -1  # the full step from which on that is the slot
        self._trends: dict[int, Trend] = {}  # of the deep branch, by the slot
        self._forecast = Forecast()
        self._held = None

    def _follow(self) -> None:
        """Take over the generation's schedule, whose gate may have opened."""
        self._follows = self.steps.schedule
        self.schedule = self.own_schedule(self._follows).begun_at(self._begun_at)

    def _verify(self, index: int, call: int, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See at the first guided step that the branches arrive as is assumed, and at the next one that all did."""
        if self._first_guided is None:
            self._first_guided = index
        if index == self._first_guided:
            self._guidance.check(inputs, latents)
        elif index == self._first_guided + 1 and call == 0:
            self._guidance.check_complete()

    def _check_rows(self, rows: int) -> None:
        """Raise `UnsupportedError` if a guided step has other rows than the first one: it is not guided after all."""
        self._guided_rows = self._guided_rows or rows
        if rows != self._guided_rows:
            raise UnsupportedError(
                f"Guidance is on, and the denoiser was given {rows} rows at step {self.steps.index}, but "
                f"{self._guided_rows} before: expected both branches at every step. Let guidance span all steps, turn "
                "it off, or use gate_step=None."
            )

    def _cache_for(self, step: Step, slot: int, shape: tuple[int, ...]) -> Cache:
        """Return what is cached of the kinds that this step reuses, for latents of this shape."""
        for role, cached_for in zip(step.roles, self._cached_for[slot], strict=True):
            if role is Role.REUSE and cached_for != shape:
                raise StateError(
                    f"The denoiser was given latents of shape {list(shape)} at step {self.steps.index}, but what is "
                    f"cached is for {list(cached_for)}: expected the batch and the resolution to stay as they were. "
                    "Leave guidance on or off for the whole generation, or use gate_step=None."
                )
        pairs = zip(step.roles, self._cached[slot], strict=True)
        cache = [cached if role is Role.REUSE else () for role, cached in pairs]
        if step.roles.deep_branch is Role.REUSE and slot in self._trends:
            cache[Kind.DEEP_BRANCH] = self._trends[slot].at(self.steps.index)
        return tuple(cache)

    def _keep(self, step: Step, slot: int, captured: Cache, latents: torch.Tensor, guided: bool, sliced: bool) -> None:
        """Copy what was captured into the static cache; of two branches into one's, if one goes on."""
        shape = latents.shape[1:]
        # The next step is gated, and both branches were still computed.
        last = self.schedule.one_branch and step.keep[Kind.CROSS_ATTENTION]
        merges = last and not sliced and self._guidance.has_other_branch(guided)
        rows = latents.shape[0]
        if merges or sliced:
            rows = self._guidance.rows_kept(rows)
        for kind in Kind:
            if step.keep[kind]:
                self.network.check_captured(kind, captured[kind])
                if merges:
                    first = self._cached[0][kind]
                    if self.steps.calls_back:
                        own, _ = self._guidance.pair(captured[kind], first)
                        self._cached[_OWN][kind] = self._cache.keep(kind, own, _OWN)
                        self._cached_for[_OWN][kind] = (rows, *shape)
                    slot = 0
                    kept = self._guidance.merge(self._cache, kind, captured[kind], first)
                elif kind is Kind.DEEP_BRANCH and self.schedule.deep_order == 1:
                    trend = self._trends.setdefault(slot, Trend(self._cache, kind, slot))
                    kept = trend.keep(self.steps.index, captured[kind])
                else:
                    kept = self._cache.keep(kind, captured[kind], slot)
                self._cached[slot][kind] = kept
                self._cached_for[slot][kind] = (rows, *shape)
                if last and (sliced or not guided):  # what an earlier step kept of one of two branches is stale
                    self._cached[_OWN][kind] = ()
