"""One call of the denoiser: count the step, cut out a guidance branch, run the phase, give the whole batch back."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from . import families
from .cache import StaticCache
from .errors import StateError, UnsupportedError
from .phase_graph import Example, example
from .report import StepClock
from .schedule import Schedule, Step
from .sites import KINDS, Role, Roles, Sites
from .slots import ForwardSlot, Replacement
from .split import Cache, PhaseFunction, PhaseResult

_ATTRIBUTE = "_tgate_dispatch"

# The owner of a dispatch that `tgate_fx.split` has installed, and of one that came with a copy of its denoiser.
SPLIT = "split"
COPIED = "copied"


class _Running(threading.local):
    """The generations that this thread is in the middle of, by the dispatch they go through."""

    def __init__(self) -> None:
        self.by_dispatch: dict[int, Run] = {}


_running = _Running()


class Phases(Protocol):
    """How phases are run: eagerly or compiled."""

    graphs: int

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step with the denoiser's inputs by name, and return its output and what it captured."""


class EagerPhases:
    """Runs each phase as it is, without compiling; captures only at the steps whose values are kept."""

    graphs = 0

    def __init__(self, function_of: Callable[[Roles], PhaseFunction], forward: Callable[..., Any]) -> None:
        self._function_of = function_of
        self._forward = forward

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `Phases`."""
        if not any(cache) and not any(step.keep):
            return self._forward(**inputs), ((), (), ())
        return self._function_of(step.roles)(cache, (), inputs)


class Gate(Protocol):
    """What a run needs of the gate on its pipeline."""

    denoiser: nn.Module
    dispatch: Dispatch
    phases: Phases
    cache: StaticCache

    def check_captured(self, kind: int, captured: Sequence[torch.Tensor]) -> None:
        """Raise `StateError` if a site of this kind did not run."""


class Dispatch(Replacement):
    """What stands in the forward slot of a gated denoiser.

    Within a run of a gated pipeline it passes each call to that run; at all other times, and for every other pipeline
    that shares the denoiser, it calls the denoiser's own forward with every site LIVE.

    Attributes:
        sites: the sites of the denoiser.
        parameters: the names of its forward's parameters.
        inner: its own forward.
        owners: who uses this dispatch: the gates of pipelines, and `SPLIT`; or `COPIED`.
        lock: held while the denoiser runs, since the roles of the sites are shared by all who call it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.sites = Sites(denoiser)
        self.__signature__ = inspect.signature(denoiser.forward)
        self.parameters = tuple(self.__signature__.parameters)
        self._denoiser = denoiser
        self._slot = ForwardSlot(denoiser, self)
        self.inner = self._slot.inner
        self.owners: set[object] = set()
        self.lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser, in place of its ``forward``."""
        if torch.compiler.is_dynamo_compiling():  # somebody else's graph around this denoiser
            return self.inner(*args, **kwargs)
        run = _running.by_dispatch.get(id(self))
        with self.lock:
            return self.inner(*args, **kwargs) if run is None else run.step(args, kwargs)

    @classmethod
    def of(cls, denoiser: nn.Module) -> Dispatch | None:
        """The dispatch that is installed on this denoiser, if any."""
        return vars(denoiser).get(_ATTRIBUTE)

    @classmethod
    def install(cls, denoiser: nn.Module, owner: object) -> Dispatch:
        """The dispatch of this denoiser, installed if it is not yet, until every owner has let go of it."""
        dispatch = cls.of(denoiser)
        if dispatch is None:
            dispatch = cls(denoiser)
            setattr(denoiser, _ATTRIBUTE, dispatch)
        dispatch.owners.discard(COPIED)
        dispatch.owners.add(owner)
        return dispatch

    def release(self, owner: object) -> None:
        """Take the dispatch and the sites off the denoiser, if nobody else uses them."""
        self.owners -= {owner, COPIED}
        if not self.owners:
            self._slot.remove()
            self.sites.remove()
            delattr(self._denoiser, _ATTRIBUTE)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatch:
        memo[id(self.lock)] = threading.RLock()
        memo[id(self.owners)] = {COPIED}  # no pipeline gates the copy
        return super().__deepcopy__(memo)

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


class Run:
    """One generation of a gated pipeline: counts its steps and runs each in its phase.

    Args:
        pipe: the pipeline, in the middle of its own ``__call__``.
        gated: what the pipeline carries.
        schedule: which phase each step is in.
        guidance_scale: as bound by the call, for pipelines without ``do_classifier_free_guidance``.

    Attributes:
        schedule: the same, with a share of the steps made a step index once they are known.
        steps: how many steps were run.
        cut: whether the step that ran last saw one guidance branch only.
        clock: what each step was, and how long it took.
        examples: for each phase what it was given first, for `tgate_fx.graphs`.
        device: where the denoiser ran; None before the first step.
        eager: whether its phases run eagerly.
    """

    def __init__(self, pipe: Any, gated: Gate, schedule: Schedule, guidance_scale: Any) -> None:
        self._pipe = pipe
        self._gated = gated
        self.schedule = schedule
        self._guidance_scale = guidance_scale
        self._cached: list[tuple[torch.Tensor, ...]] = [()] * len(KINDS)
        self._cached_form: list[tuple[int, ...]] = [()] * len(KINDS)
        self._timestep: object = None
        self._expected: int | None = None
        self.clock = StepClock()
        self.examples: dict[Roles, Example] = {}
        self.device: torch.device | None = None
        self.eager = isinstance(gated.phases, EagerPhases)
        self.steps = 0
        self.cut = False

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser, with the arguments that the pipeline gave."""
        inputs = dict(zip(self._gated.dispatch.parameters, args, strict=False))
        inputs.update(kwargs)
        _, latents = families.first_input(inputs)
        started = self.clock.start(latents.device)
        guided = families.guidance_active(self._pipe, self._guidance_scale)
        if self.steps == 0:
            self._begin(inputs, latents, guided)
        elif self.schedule.caches:
            self._check_new_step(inputs)
        step = self.schedule.at(self.steps)
        rows = latents.shape[0]
        self.cut = guided and step.gated and self.schedule.one_branch
        if self.cut:
            inputs = families.one_branch(inputs, self.schedule.after_gate, rows)
            rows //= 2
        cache = self._cache_for(step, (rows, *latents.shape[1:]))
        if step.roles not in self.examples:
            self.examples[step.roles] = example(step, cache, inputs)
        graphs = self._gated.phases.graphs
        output, captured = self._gated.phases(step, cache, inputs)
        if any(step.keep):
            self._keep(step, captured, latents, guided)
        if self.cut:
            output = families.both_branches(output)
        self.clock.stop(started, self.steps, step.phase, rows, self._gated.phases.graphs - graphs)
        self.steps += 1
        return output

    def _begin(self, inputs: dict[str, Any], latents: torch.Tensor, guided: bool) -> None:
        """At the first step: settle where the gate is, and refuse now what could not be gated then."""
        self.device = latents.device
        self._expected = families.step_count(self._pipe)
        self.schedule = self.schedule.resolve(self._expected)
        gate = self.schedule.gate_step
        if guided and gate is not None and (self._expected is None or gate < self._expected):
            families.check_guidance_batch(self._gated.denoiser, latents)
            if self.schedule.one_branch:
                families.one_branch(inputs, self.schedule.after_gate, latents.shape[0])
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

    def _cache_for(self, step: Step, form: tuple[int, ...]) -> Cache:
        """What is cached of the kinds that this step reuses."""
        for role, cached_form in zip(step.roles, self._cached_form, strict=True):
            if role is Role.REUSE and cached_form != form:
                raise StateError(
                    f"The denoiser was given latents of shape {list(form)} at step {self.steps}, but what is cached is "
                    f"for {list(cached_form)}: expected the batch and the resolution to stay as they were. Leave "
                    "guidance on or off for the whole generation, or use gate_step=None."
                )
        return tuple([held if role is Role.REUSE else () for role, held in zip(step.roles, self._cached, strict=True)])

    def _keep(self, step: Step, captured: Cache, latents: torch.Tensor, guided: bool) -> None:
        """Copy what was captured into the static cache; from a guidance batch into one branch's, if one goes on."""
        # The next step is the first gated one, and the batch is still whole.
        merge = guided and self.schedule.one_branch and not step.gated and self.schedule.at(self.steps + 1).gated
        rows = latents.shape[0] // 2 if merge or self.cut else latents.shape[0]
        for kind, keep in enumerate(step.keep):
            if keep:
                self._gated.check_captured(kind, captured[kind])
                self._cached[kind] = self._gated.cache.keep(kind, captured[kind], merge=merge)
                self._cached_form[kind] = (rows, *latents.shape[1:])
