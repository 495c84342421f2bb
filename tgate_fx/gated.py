"""The gate on one pipeline, and its generations."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .companion_run import CompanionRun
from .companions import only_conditional
from .errors import ArgumentError, StateError, UnsupportedError
from .gated_class import AS_GATED, ATTRIBUTE, KEYWORDS, gate_of, gated_class, plain_class
from .keywords import check_not_misspelt
from .network import Network
from .phases import Phases
from .pipeline_guidance import GuidanceIsOn, check_known_guidance, check_settings, unconditional_is_empty
from .run import GatedNetwork, Run
from .schedule import Schedule
from .step_count import fresh_step_count, step_count
from .steps import Steps

# Keywords of `gate` that are for the pipeline as a whole.
_NOT_FOR_ONE_CALL = ("deepcache", "gate_companions")


class Gated:
    """The gate on one pipeline: its schedule, its networks, and the last generation.

    Args:
        pipe: the pipeline, not gated yet; nothing is changed on it before `attach`.
        schedule: which phase each step is in.
        networks: its denoisers, each with what runs its phases.
        companions: what runs beside them, in the same way.

    Raises:
        UnsupportedError: the pipeline guides in a way that cannot be gated so.

    Attributes:
        schedule, networks, companions: these.
        parameters: of the pipeline's call.
        steps: of the last generation, or the one that is running; None before the first.
        runs: the same generation, seen from each network.
        disabled: how many times over the gate is switched off.
    """

    def __init__(
        self,
        pipe: Any,
        schedule: Schedule,
        networks: Sequence[GatedNetwork],
        companions: Sequence[GatedNetwork] = (),
    ) -> None:
        self.schedule = schedule
        self.networks = tuple(networks)
        self.companions = tuple(companions)
        self.disabled = 0
        self.parameters = _parameters(type(pipe))
        self.check(pipe, self.settled(schedule))
        self.steps: Steps | None = None
        self.runs: list[Run] = []
        self._plain_class = type(pipe)
        self._base: type[Any] = plain_class(self._plain_class)
        self._gated_class = gated_class(self._base)  # type: ignore[arg-type]
        self._attributes: list[str] = []
        self._generating = threading.Lock()
        self._thread: int | None = None

    @classmethod
    def of(cls, pipe: Any) -> Gated | None:
        """Return the gate on this pipeline, if any."""
        found: Gated | None = gate_of(pipe)
        return found

    def attach(self, pipe: Any) -> None:
        """Put this gate on its pipeline."""
        for each in self.all:
            each.network.attach(self)
            each.phases.attach()
        self.set_attribute(pipe, ATTRIBUTE, self)
        pipe.__class__ = self._gated_class

    def set_attribute(self, pipe: Any, name: str, value: object) -> None:
        """Give the pipeline an attribute that goes when the gate is taken off."""
        vars(pipe)[name] = value
        self._attributes.append(name)

    def detach(self, pipe: Any) -> None:
        """Take this gate off its pipeline."""
        if type(pipe) is not self._gated_class:
            raise StateError(
                f"The class of this {self._plain_class.__name__} was changed after it was gated: expected it "
                "unchanged. Undo first what was installed on the pipeline last."
            )
        with self.one_at_a_time():
            self.take_back()
            for each in self.all:
                each.network.detach(self)
            pipe.__class__ = self._plain_class
            for name in self._attributes:
                del vars(pipe)[name]

    def generate(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own ``__call__`` as one generation."""
        given = {name: kwargs.pop(name) for name in KEYWORDS if name in kwargs}
        self._check_unknown(kwargs)
        overrides = {name: value for name, value in given.items() if value is not AS_GATED}
        schedule = self.settled(dataclasses.replace(self.schedule, **overrides))
        self.check(pipe, schedule)
        bound = functools.partial(_bound, self.parameters, (pipe, *args), kwargs)
        control_is_conditional = only_conditional(pipe, bound("guess_mode"))
        if schedule.after_gate == "negative" and (control_is_conditional or unconditional_is_empty(pipe, bound)):
            schedule = dataclasses.replace(schedule, after_gate="positive")
        if schedule.acts:
            check_settings(pipe, bound)
        steps = Steps(
            pipe,
            schedule,
            guided=GuidanceIsOn(pipe, bound("guidance_scale")),
            count=functools.partial(step_count, pipe, end=bound("denoising_end"), strength=bound("strength")),
            calls_back=bound("callback_on_step_end") is not None or bound("callback") is not None,
            only_conditional=control_is_conditional,
        )
        with self.generation(pipe, steps):
            return call(pipe, *args, **kwargs)

    def _check_unknown(self, kwargs: Mapping[str, Any]) -> None:
        """Raise `ArgumentError` for what was meant for the gate, and would be ignored by a call that takes anything."""
        ignored = [name for name in kwargs if name not in self.parameters]
        for name in ignored:
            if name in _NOT_FOR_ONE_CALL:
                raise ArgumentError(
                    f"{name} was given to a call: expected one of {', '.join(KEYWORDS)}. Give it to tgate_fx.gate "
                    "or compile."
                )
        check_not_misspelt(ignored, KEYWORDS)

    def settled(self, schedule: Schedule) -> Schedule:
        """Return a schedule as it is for the pipeline's denoiser, and off if the gate is."""
        settled = schedule.settled(self.networks[0].network.family.after_gate)
        return dataclasses.replace(settled, off=self.disabled > 0)

    def check(self, pipe: Any, schedule: Schedule) -> None:
        """Raise `UnsupportedError` if the pipeline cannot be gated so."""
        if schedule.off:
            return
        check_known_guidance(pipe, self.parameters, schedule)
        for each in self.networks:
            each.network.check_schedule(schedule)
        order = getattr(getattr(pipe, "scheduler", None), "order", 1)
        if schedule.forecast > 1 and order != 1:
            raise UnsupportedError(
                f"forecast={schedule.forecast} was given with a {type(pipe.scheduler).__name__}, which evaluates the "
                f"denoiser {order} times a step: expected a scheduler of order 1, whose outputs lie along one line. "
                "Leave forecast out, or use another scheduler."
            )

    @contextmanager
    def generation(self, pipe: Any, steps: Steps, *, by_hand: bool = False) -> Iterator[None]:
        """Context manager: what the networks are called with is one generation.

        Args:
            pipe: the pipeline.
            steps: of the generation.
            by_hand: whether the loop is not the pipeline's own, which forgets first that its last call was interrupted.

        Raises:
            StateError: the pipeline is not as it was when it was gated, is in the middle of another generation, or did
                not call its denoiser.
            UnsupportedError: it cannot be gated as it is now, or had fewer steps than it said.
        """
        with self.one_at_a_time():
            was_interrupted = by_hand and getattr(pipe, "interrupt", False)
            for each in self.all:
                each.network.check_unchanged(pipe)
            self.steps = steps
            self.runs = [Run(each, steps) for each in self.networks]
            companions = [CompanionRun(each, steps) for each in self.companions]
            for each in self.all:
                each.phases.begin(pipe, self._base, calls_back=steps.calls_back)
            with ExitStack() as stack:
                for each in self.all:
                    stack.callback(each.phases.end)
                for run in (*self.runs, *companions):
                    stack.callback(run.end)
                    stack.enter_context(run.network.dispatch.running(run.step, calls_back=steps.calls_back))
                stack.enter_context(fresh_step_count(pipe))
                yield
            if getattr(pipe, "interrupt", False) and not was_interrupted:
                return
            steps.check_ran_all()
            steps.warn_if_never_gated()
            # A generation may rightly end before its first step, with too little strength for one.
            if all(run.device is None for run in self.runs) and step_count(pipe) != 0:
                raise StateError(
                    f"The generation ended without a call of pipe.{self.networks[0].network.attribute} through "
                    "tgate_fx, so nothing was gated: expected the forward of the denoiser to be the one that was "
                    "gated. Call tgate_fx.restore(pipe) and gate it again after whatever replaced it."
                )

    @property
    def all(self) -> tuple[GatedNetwork, ...]:
        """The denoisers and their companions."""
        return (*self.networks, *self.companions)

    @property
    def branch_sliced(self) -> bool:
        """Whether the denoiser's last call, of the generation that is running, saw one guidance branch only."""
        return any(run.branch_sliced for run in self.runs)

    @property
    def devices(self) -> list[torch.device]:
        """Where each network is."""
        return [next(each.network.module.parameters()).device for each in self.networks]

    @contextmanager
    def running_with(self, make_phases: Callable[[Network], Phases]) -> Iterator[None]:
        """Context manager: what this makes for each network runs its phases."""
        own = [each.phases for each in self.all]
        try:
            for each in self.all:
                each.phases = make_phases(each.network)
                each.phases.attach()
            yield
        finally:
            self.take_back()
            for each, phases in zip(self.all, own, strict=True):
                each.phases = phases

    def take_back(self) -> None:
        """Take back, until the next step, what the phases changed on modules: LoRA layers have their own scales."""
        for each in self.all:
            each.phases.detach()

    @contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Context manager: generations from several threads follow one another, for scheduler and cache serve one."""
        if self._thread == threading.get_ident():
            raise StateError(
                "This pipeline is in the middle of a generation: expected that to end before it is called again. Do "
                "not call a pipeline from its own callback."
            )
        with self._generating:
            self._thread = threading.get_ident()
            try:
                yield
            finally:
                self._thread = None


def gated_of(pipe: Any) -> Gated:
    """Return the gate on this pipeline; raise `StateError` if there is none."""
    gated = Gated.of(pipe)
    if gated is None:
        raise StateError(
            f"This {type(pipe).__name__} is not gated: expected a pipeline given to tgate_fx.gate or tgate_fx.compile."
        )
    return gated


def check_not_gated(pipe: Any) -> None:
    """Raise `StateError` if the pipeline is gated already."""
    if Gated.of(pipe) is not None:
        raise StateError(
            f"This {type(pipe).__name__} is gated already: expected one that is not. Call tgate_fx.restore(pipe) "
            "first; to change the gate for one call, use pipe(..., gate_step=...)."
        )


def _parameters(pipeline_class: type[Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call, and those of the calls it overrides where it takes any keyword."""
    found: dict[str, inspect.Parameter] = {}
    for cls in pipeline_class.__mro__:
        if "__call__" not in vars(cls):
            continue
        own = inspect.signature(vars(cls)["__call__"]).parameters
        by_name = bool(found) and all(each.kind is not inspect.Parameter.VAR_POSITIONAL for each in found.values())
        for name, parameter in own.items():
            becomes = by_name and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            found.setdefault(name, parameter.replace(kind=parameter.KEYWORD_ONLY) if becomes else parameter)
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values()):
            break
    return found


def _bound(parameters: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return what a call of the pipeline binds to this parameter, its default included; None if there is none."""
    if name in kwargs:
        return kwargs[name]
    if name not in parameters:
        return None
    names = [each for each, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else parameters[name].default
