"""The gate on one pipeline, and the class that makes each of its calls one generation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .cache import StaticCache
from .errors import StateError
from .network import Network
from .phases import Phases
from .run import Run
from .schedule import Schedule
from .step_count import fresh_step_count, step_count

_ATTRIBUTE = "_tgate"
_PLAIN_CLASS = "_tgate_plain_class"
_FOR_ONE_CALL = ("gate_step", "sp_interval", "fi_interval", "warm_up")


class _AsGated:
    """The default of those keywords, for which None has a meaning of its own."""

    def __repr__(self) -> str:
        return "<as gated>"


_AS_GATED = _AsGated()


class Gated:
    """The gate on one pipeline: its schedule, its network, what runs the phases, its cache, and the last run.

    Args:
        pipe: the pipeline, not gated yet; nothing is changed on it before `attach`.
        schedule: which phase each step is in.
        network: its denoiser.
        phases: what runs the denoiser's phases.

    Attributes:
        schedule, network, phases: these.
        parameters: of the pipeline's call.
        cache: where captured values are kept.
        run: the last generation, or the one that is running; None before the first.
        disabled: how many times over the gate is switched off.
    """

    def __init__(self, pipe: Any, schedule: Schedule, network: Network, phases: Phases) -> None:
        self.schedule = schedule
        self.network = network
        self.phases = phases
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        self.cache = StaticCache(phases.needs_static_addresses)
        self.run: Run | None = None
        self.disabled = 0
        self._plain_class = type(pipe)
        self._base: type[Any] = getattr(self._plain_class, _PLAIN_CLASS, None) or self._plain_class
        self._gated_class = _gated_class(self._base)  # type: ignore[arg-type]
        self._attributes: list[str] = []
        self._generating = threading.Lock()
        self._thread: int | None = None

    @classmethod
    def of(cls, pipe: Any) -> Gated | None:
        """Return the gate on this pipeline, if any."""
        return getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)

    def attach(self, pipe: Any) -> None:
        """Put this gate on its pipeline."""
        self.network.attach(self)
        self.phases.attach()
        self.set_attribute(pipe, _ATTRIBUTE, self)
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
            self.network.detach(self)
            pipe.__class__ = self._plain_class
            for name in self._attributes:
                del vars(pipe)[name]

    def generate(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own ``__call__`` as one generation."""
        given = {name: kwargs.pop(name) for name in _FOR_ONE_CALL if name in kwargs}
        overrides = {name: value for name, value in given.items() if value is not _AS_GATED}
        schedule = dataclasses.replace(self.schedule, off=self.disabled > 0, **overrides)
        bound = functools.partial(_bound, self.parameters, (pipe, *args), kwargs)
        with self.one_at_a_time():
            self.network.check_unchanged(pipe)
            run = self.run = Run(pipe, self.network, self.phases, self.cache, schedule, bound("guidance_scale"))
            calls_back = bound("callback_on_step_end") is not None or bound("callback") is not None
            self.phases.begin(pipe, self._base, calls_back=calls_back)
            try:
                with self.network.dispatch.running(run.step), fresh_step_count(pipe):
                    result = call(pipe, *args, **kwargs)
            finally:
                run.branch_sliced = False
            # A generation may rightly end before its first step: interrupted, or with too little strength for one.
            if run.steps == 0 and not getattr(pipe, "interrupt", False) and step_count(pipe) != 0:
                raise StateError(
                    f"The generation ended without a call of pipe.{self.network.attribute} through tgate_fx, so "
                    "nothing was gated: expected the forward of the denoiser to be the one that was gated. Call "
                    "tgate_fx.restore(pipe) and gate it again after whatever replaced it."
                )
            return result

    @contextmanager
    def running_with(self, phases: Phases) -> Iterator[None]:
        """Context manager: these run the phases."""
        own, self.phases = self.phases, phases
        try:
            yield
        finally:
            self.phases = own

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


def check_not_gated(pipe: Any) -> None:
    """Raise `StateError` if the pipeline is gated already."""
    if Gated.of(pipe) is not None:
        raise StateError(
            f"This {type(pipe).__name__} is gated already: expected one that is not. Call tgate_fx.restore(pipe) "
            "first; to change the gate for one call, use pipe(..., gate_step=...)."
        )


def _bound(parameters: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return what a call of the pipeline binds to this parameter, its default included; None if there is none."""
    if name in kwargs:
        return kwargs[name]
    names = list(parameters)
    if name not in names:
        return None
    position = names.index(name)
    return args[position] if position < len(args) else parameters[name].default


@functools.cache
def _gated_class(base: type[Any]) -> type[Any]:
    """Return a subclass of a pipeline's class whose call is one generation; it has the same name, module and behaviour.

    Only gated instances get this class: the pipeline class itself is never changed. An instance of it that was made
    from a gated one, and is not gated itself, is a plain pipeline.
    """

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        gated = Gated.of(self)
        if gated is None:
            return base.__call__(self, *args, **kwargs)
        return gated.generate(self, base.__call__, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if Gated.of(self) is not None:
            raise StateError(
                "A gated pipeline can be neither copied nor pickled, since its denoiser's forwards belong to it alone: "
                "expected a plain one. Call tgate_fx.restore(pipe) first, or make another with from_pipe."
            )
        return base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]

    __call__.__signature__ = _with_overrides(inspect.signature(base.__call__))  # type: ignore[attr-defined]
    attributes: dict[str, Any] = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    attributes |= {"__reduce_ex__": __reduce_ex__, _PLAIN_CLASS: base}
    if isinstance(getattr(base, "guidance_rescale", None), property):

        def guidance_rescale(self: Any) -> Any:
            # Where guidance sees one branch twice, rescaling would blend two equal predictions and only round them.
            gated = Gated.of(self)
            sliced = gated is not None and gated.run is not None and gated.run.branch_sliced
            return 0.0 if sliced else base.guidance_rescale.fget(self)

        attributes["guidance_rescale"] = property(guidance_rescale)
    return type(base.__name__, (base,), {**attributes, "__qualname__": base.__qualname__})


def _with_overrides(signature: inspect.Signature) -> inspect.Signature:
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_AS_GATED) for name in _FOR_ONE_CALL]
    parameters = sorted([*signature.parameters.values(), *added], key=lambda parameter: parameter.kind)
    return signature.replace(parameters=parameters)
