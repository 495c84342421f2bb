"""One call of the denoiser: count the step, cut out a guidance branch, run the phase, give the whole batch back."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from . import families
from .cache import StaticCache
from .errors import StateError, UnsupportedError
from .report import StepClock
from .schedule import Phase, Roles, Schedule, resolve_gate
from .sites import Sites
from .slots import ForwardSlot
from .split import PhaseFunction, PhaseResult

_ATTRIBUTE = "_tgate_dispatch"


class _Running(threading.local):
    """The generations that this thread is in the middle of, by the dispatch they go through."""

    def __init__(self) -> None:
        self.by_dispatch: dict[int, Run] = {}


_running = _Running()


class Phases(Protocol):
    """How phases are run: eagerly or compiled."""

    graphs: int

    def __call__(
        self, phase: Phase, cache: tuple[torch.Tensor, ...], inputs: dict[str, Any], *, keep: bool
    ) -> PhaseResult:
        """Run one step of ``phase``; ``keep`` if what it captures will be used."""


class EagerPhases:
    """Runs each phase as it is, without compiling; captures only at the step whose values are kept."""

    graphs = 0

    def __init__(self, functions: Mapping[Roles, PhaseFunction], forward: Callable[..., Any]) -> None:
        self._functions = functions
        self._forward = forward

    def __call__(
        self, phase: Phase, cache: tuple[torch.Tensor, ...], inputs: dict[str, Any], *, keep: bool
    ) -> PhaseResult:
        """Run one step; see `Phases`."""
        if not cache and not keep:
            return self._forward(**inputs), ()
        return self._functions[phase.roles](cache, (), inputs)


class Dispatch:
    """What stands in the forward slot of a gated denoiser.

    Within a run of a gated pipeline it passes each call to that run; at all other times, and for every other pipeline
    that shares the denoiser, it calls the denoiser's own forward with every site LIVE.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.sites = Sites(denoiser)
        self.__signature__ = inspect.signature(denoiser.forward)
        self.parameters = tuple(self.__signature__.parameters)
        self._denoiser = denoiser
        self._slot = ForwardSlot(denoiser, self)
        self.inner = self._slot.inner
        self.users = 0
        # The roles of the sites are shared by all who call this denoiser, so one phase runs at a time.
        self.lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser, in place of its ``forward``."""
        if torch.compiler.is_compiling():  # somebody else's graph around this denoiser
            return self.inner(*args, **kwargs)
        run = _running.by_dispatch.get(id(self))
        with self.lock:
            return self.inner(*args, **kwargs) if run is None else run.step(args, kwargs)

    @classmethod
    def of(cls, denoiser: nn.Module) -> Dispatch | None:
        """The dispatch that is installed on this denoiser, if any."""
        return vars(denoiser).get(_ATTRIBUTE)

    @classmethod
    def install(cls, denoiser: nn.Module) -> Dispatch:
        """The dispatch of this denoiser, installed if it is not yet; `release` it once for every `install`."""
        dispatch = cls.of(denoiser)
        if dispatch is None:
            dispatch = cls(denoiser)
            setattr(denoiser, _ATTRIBUTE, dispatch)
        dispatch.users += 1
        return dispatch

    def release(self) -> None:
        """Take the dispatch and the sites off the denoiser, once nobody uses them any more."""
        self.users -= 1
        if self.users == 0:
            self._slot.remove()
            self.sites.remove()
            delattr(self._denoiser, _ATTRIBUTE)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    @contextmanager
    def running(self, run: Run) -> Iterator[None]:
        """While this lasts, the calls of this thread go to ``run``."""
        runs = _running.by_dispatch
        if id(self) in runs:
            raise StateError(
                "The denoiser is in the middle of a generation in this thread: expected that to end before the next "
                "begins. Do not call a gated pipeline from a callback of another that shares its denoiser."
            )
        runs[id(self)] = run
        try:
            yield
        finally:
            del runs[id(self)]


class Request(NamedTuple):
    """What one call of a gated pipeline asks for.

    Attributes:
        gate_step: resolved to a step index at the first step, when the number of steps is known.
        after_gate: which guidance branch goes on after the gate.
        guidance_scale: as bound by the call, for pipelines without ``do_classifier_free_guidance``.
    """

    gate_step: int | float | None
    after_gate: str
    guidance_scale: Any


class Run:
    """One generation of a gated pipeline: counts its steps and runs each in its phase.

    Attributes:
        schedule: which phase a step is in; known from the first step on.
        steps: how many steps were run.
        cut: whether the step that ran last saw one guidance branch only.
        clock: what each step was, and how long it took.
    """

    def __init__(self, pipe: Any, dispatch: Dispatch, phases: Phases, cache: StaticCache, request: Request) -> None:
        self._pipe = pipe
        self._dispatch = dispatch
        self._phases = phases
        self._cache = cache
        self._request = request
        self._cached: tuple[torch.Tensor, ...] = ()
        self._cached_form: tuple[int, ...] = ()
        self._timestep: object = None
        self._expected: int | None = None
        self.schedule = Schedule(None)
        self.clock = StepClock()
        self.steps = 0
        self.cut = False

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser, with the arguments that the pipeline gave."""
        inputs = dict(zip(self._dispatch.parameters, args, strict=False))
        inputs.update(kwargs)
        _, latents = families.first_input(inputs)
        started = self.clock.start(latents.device)
        guided = families.guidance_active(self._pipe, self._request.guidance_scale)
        if self.steps == 0:
            self._begin(inputs, latents, guided)
        elif self.schedule.gate is not None:
            self._check_new_step(inputs)
        phase, keep = self.schedule.at(self.steps)
        rows = latents.shape[0]
        self.cut = guided and phase.one_branch
        if self.cut:
            inputs = families.one_branch(inputs, self.schedule.after_gate, rows)
            rows //= 2
        if self._cached and (rows, *latents.shape[1:]) != self._cached_form:
            self._refuse_new_form((rows, *latents.shape[1:]))
        graphs = self._phases.graphs
        output, captured = self._phases(phase, self._cached, inputs, keep=keep)
        if keep:
            self._keep(captured, latents, merge=guided and self.schedule.one_branch)
        if self.cut:
            output = families.both_branches(output)
        self.clock.stop(started, self.steps, phase.name, rows, self._phases.graphs - graphs)
        self.steps += 1
        return output

    def _begin(self, inputs: dict[str, Any], latents: torch.Tensor, guided: bool) -> None:
        """At the first step: settle where the gate is, and refuse now what could not be gated then."""
        self._expected = families.step_count(self._pipe)
        gate = resolve_gate(self._request.gate_step, self._expected)
        self.schedule = Schedule(gate, self._request.after_gate)
        if gate is not None and guided:
            families.check_guidance_batch(latents)
            if self.schedule.one_branch:
                families.one_branch(inputs, self._request.after_gate, latents.shape[0])
        self._timestep = inputs.get("timestep")

    def _check_new_step(self, inputs: dict[str, Any]) -> None:
        """Refuse a second call in the same step: one with the same timestep object, or one beyond the last step."""
        timestep = inputs.get("timestep")
        same = timestep is self._timestep and isinstance(timestep, torch.Tensor)
        if same or (self._expected is not None and self.steps >= self._expected):
            raise UnsupportedError(
                f"{type(self._pipe).__name__} calls its denoiser several times a step: expected one call with the "
                "batch [uncond, cond]. Use it with gate_step=None."
            )
        self._timestep = timestep

    def _keep(self, captured: tuple[torch.Tensor, ...], latents: torch.Tensor, *, merge: bool) -> None:
        self._dispatch.sites.check_captured(captured)
        self._cached = self._cache.keep(captured, merge=merge)
        rows = latents.shape[0] // 2 if merge else latents.shape[0]
        self._cached_form = (rows, *latents.shape[1:])

    def _refuse_new_form(self, form: tuple[int, ...]) -> None:
        raise StateError(
            f"After the gate the denoiser was given latents of shape {list(form)}, but what is cached is for "
            f"{list(self._cached_form)}: expected the batch and the resolution to stay as they were at the gate. Leave "
            "guidance on or off for the whole generation, or use gate_step=None."
        )
