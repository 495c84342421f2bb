"""What a gated pipeline carries, and the class that makes each of its calls one generation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import families
from .cache import StaticCache
from .compiler import CompiledPhases
from .deepcache import DeepCache, find_deep_branch
from .dispatch import Dispatch, EagerPhases, Phases, Run
from .errors import StateError
from .ladder import climb
from .packages import PackagedPhases
from .phase_graph import Example, PhaseGraph, trace
from .regional import RegionalPhases, add_regions
from .report import Report, Rung
from .schedule import Schedule
from .settings import CompileSettings
from .sites import Roles, Site
from .split import PhaseFunction, phase_function
from .trust import check_no_global_hooks, known_to_leave_modules_alone

_ATTRIBUTE = "_tgate"
_PLAIN_CLASS = "_tgate_plain_class"
_FOR_ONE_CALL = ("gate_step", "sp_interval", "fi_interval", "warm_up")


class _AsGated:
    """The default of those keywords, for which None has a meaning of its own."""

    def __repr__(self) -> str:
        return "<as gated>"


_AS_GATED = _AsGated()


class Gated:
    """The gate on one pipeline: its schedule, its phases, its cache, and the last run.

    Args:
        pipe: the pipeline; nothing is changed on it before `attach`.
        schedule: which phase each step is in.
        deepcache: the deep branch to cache, if any.
        settings: what torch.compile is given, or None to run eagerly.

    Raises:
        StateError: the pipeline is gated already.
        UnsupportedError: it cannot be gated.
    """

    def __init__(
        self, pipe: Any, schedule: Schedule, deepcache: DeepCache | None, settings: CompileSettings | None
    ) -> None:
        if Gated.of(pipe) is not None:
            raise StateError(
                f"This {type(pipe).__name__} is gated already: expected one that is not. Call tgate_fx.restore(pipe) "
                "first; to change the gate for one call, use pipe(..., gate_step=...)."
            )
        self.schedule = schedule
        self.branch = None if deepcache is None else deepcache.branch
        self.disabled = 0
        self.attribute, self.denoiser = families.find_denoiser(pipe)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        families.check_guidance_form(pipe, self.parameters)
        self.settings = settings
        if settings is not None and settings.dynamic and not settings.regional:
            families.check_dynamic(self.denoiser)
        self._deep_branch = None if self.branch is None else find_deep_branch(self.denoiser, self.branch)
        self._plain_class = type(pipe)
        base: type[Any] = getattr(self._plain_class, _PLAIN_CLASS, None) or self._plain_class
        self._gated_class = _gated_class(base)  # type: ignore[arg-type]
        self.cache = StaticCache(settings.fixes_addresses if settings is not None else lambda device: False)
        self.run: Run | None = None
        self._generating = threading.Lock()
        self._thread: int | None = None

    @classmethod
    def of(cls, pipe: Any) -> Gated | None:
        """The gate on this pipeline, if any."""
        return getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)

    def attach(self, pipe: Any, packaged: PackagedPhases | None = None) -> None:
        """Put this gate on its pipeline; ``packaged`` runs the phases if they were compiled ahead of time."""
        self.dispatch = dispatch = Dispatch.install(self.denoiser, self)
        if self.branch is not None and self._deep_branch is not None:
            dispatch.sites.add_deep_branch(self.branch, self._deep_branch)

        @functools.cache
        def function_of(roles: Roles) -> PhaseFunction:
            return phase_function(dispatch.sites, dispatch.inner, roles, self.branch)

        self._function_of = function_of
        self._eager = EagerPhases(function_of, dispatch.inner)
        self.compiled: CompiledPhases | RegionalPhases | PackagedPhases | None = None
        if packaged is not None:
            self.compiled = packaged
        elif self.settings is not None and self.settings.regional:
            add_regions(self.denoiser, dispatch.sites)
            self.compiled = RegionalPhases(function_of, dispatch.sites, self.settings)
        elif self.settings is not None:
            self.compiled = CompiledPhases(function_of, self.denoiser, self.settings)
        self.phases: Phases = self.compiled or self._eager
        self._attributes: list[str] = []
        self.add(pipe, _ATTRIBUTE, self)
        pipe.__class__ = self._gated_class

    def add(self, pipe: Any, name: str, value: object) -> None:
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
        with self._one_at_a_time():
            self.dispatch.release(self)
            pipe.__class__ = self._plain_class
            for name in self._attributes:
                del vars(pipe)[name]

    def generate(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own ``__call__`` as one generation."""
        given = {name: kwargs.pop(name) for name in _FOR_ONE_CALL if name in kwargs}
        overrides = {name: value for name, value in given.items() if value is not _AS_GATED}
        schedule = dataclasses.replace(self.schedule, off=self.disabled > 0, **overrides)
        bound = functools.partial(_bound, self.parameters, (pipe, *args), kwargs)
        with self._one_at_a_time():
            self._check_pipeline(pipe)
            run = self.run = Run(pipe, self, schedule, bound("guidance_scale"))
            if self.compiled is not None:
                check_no_global_hooks()
                calls_back = bound("callback_on_step_end") is not None or bound("callback") is not None
                self.compiled.begin(trusted=not calls_back and known_to_leave_modules_alone(pipe, self.denoiser))
            try:
                with self.dispatch.running(run), families.fresh_step_count(pipe):
                    result = call(pipe, *args, **kwargs)
            finally:
                run.cut = False
            # A generation may rightly end before its first step: interrupted, or with too little strength for one.
            if run.steps == 0 and not getattr(pipe, "_interrupt", False) and families.step_count(pipe) != 0:
                raise StateError(
                    f"The generation ended without a call of pipe.{self.attribute} through tgate_fx, so nothing was "
                    "gated: expected the forward of the denoiser to be the one that was gated. Call "
                    "tgate_fx.restore(pipe) and gate it again after whatever replaced it."
                )
            return result

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """While this lasts, the phases run eagerly."""
        self.phases = self._eager
        try:
            yield
        finally:
            self.phases = self.compiled or self._eager

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Generations of one pipeline from several threads follow one another: its scheduler and cache serve one."""
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

    def _check_pipeline(self, pipe: Any) -> None:
        denoiser = getattr(pipe, self.attribute, None)
        if isinstance(denoiser, nn.Module):
            families.check_not_compiled(self.attribute, denoiser)
            families.check_no_deepcache_helper(denoiser)
        if denoiser is not self.denoiser:
            raise StateError(
                f"pipe.{self.attribute} is another module than the one that was gated: expected the same. Put it back, "
                "or call tgate_fx.restore(pipe) and gate the pipeline again."
            )

    def sites(self, schedule: Schedule) -> list[Site]:
        """The sites of the kinds that are cached under this schedule."""
        kinds = [True, schedule.caches_self_attention, self.branch is not None]
        return [
            site
            for kind, cached in enumerate(kinds)
            if cached
            for site in self.dispatch.sites.of_kind(kind)
            if site.branch in (None, self.branch)
        ]

    def check_captured(self, kind: int, captured: Sequence[Any]) -> None:
        """Raise `StateError` if a site of this kind did not run while its denoiser did."""
        self.dispatch.sites.check_captured(kind, self.branch, captured)

    def graphs(self) -> dict[str, PhaseGraph]:
        """The graphs of the last run's phases."""
        if self.run is None or not self.run.examples:
            raise StateError(
                "No generation has run since this pipeline was gated: expected one, since graphs are traced for inputs "
                "like its own. Generate an image first; the fewest steps that reach every phase will do."
            )
        traced = map(self.trace, self.run.examples.values())
        return {graph.name: graph for graph in traced}

    def trace(self, of: Example) -> PhaseGraph:
        """The graph of a phase that was run like this."""
        with self.dispatch.lock:
            return trace(self.denoiser, self.dispatch.sites, self.dispatch.inner, self.branch, of)

    def report(self, *, ladder: bool = False) -> Report:
        """The report on the last run; empty if there was none."""
        run, compiled = self.run, self.compiled
        steps = run.clock.steps() if run is not None else ()
        return Report(
            steps=steps,
            compiled_graphs=compiled.graphs if compiled is not None else 0,
            recompiles=compiled.recompiles if compiled is not None else 0,
            gate=next((step.index for step in steps if step.phase.startswith("post-gate")), None),
            sites=len(self.sites(self.schedule if run is None else run.schedule)),
            compiler=compiled.describe() if compiled is not None else "eager",
            cache_bytes=self.cache.nbytes,
            ladder=self._ladder() if ladder else (),
        )

    def _ladder(self) -> tuple[Rung, ...]:
        """Where the gain of the last run comes from."""
        with self._one_at_a_time(), self.dispatch.lock, torch.no_grad():
            return climb(self.run, self._function_of, next(self.denoiser.parameters()).device)


def _bound(parameters: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """The value that a call of the pipeline binds to this parameter, its default included; None if it has none."""
    if name in kwargs:
        return kwargs[name]
    names = list(parameters)
    if name not in names:
        return None
    position = names.index(name)
    return args[position] if position < len(args) else parameters[name].default


@functools.cache
def _gated_class(base: type[Any]) -> type[Any]:
    """A subclass of a pipeline's class whose call is one generation; it has the same name, module and behaviour.

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
            cut = gated is not None and gated.run is not None and gated.run.cut
            return 0.0 if cut else base.guidance_rescale.fget(self)

        attributes["guidance_rescale"] = property(guidance_rescale)
    return type(base.__name__, (base,), {**attributes, "__qualname__": base.__qualname__})


def _with_overrides(signature: inspect.Signature) -> inspect.Signature:
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_AS_GATED) for name in _FOR_ONE_CALL]
    parameters = sorted([*signature.parameters.values(), *added], key=lambda parameter: parameter.kind)
    return signature.replace(parameters=parameters)
