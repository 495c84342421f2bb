"""What is installed on a pipeline, and taken off it again: gate, compile, disabled, report, restore, split, sites."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from . import families
from .cache import StaticCache
from .compiler import CompiledPhases, CompileSettings
from .dispatch import Dispatch, EagerPhases, Request, Run
from .errors import ArgumentError, StateError, UnsupportedError
from .report import Report
from .schedule import POST_GATE, PRE_GATE, check_after_gate, check_gate_step
from .sites import SiteInfo, find_sites
from .split import phase_function
from .split import split as split_functions

Pipeline = TypeVar("Pipeline")

_ATTRIBUTE = "_tgate"
_PLAIN_CLASS = "_tgate_plain_class"


def gate(
    pipe: Pipeline, gate_step: int | float | None = 10, *, after_gate: str = "negative", **unknown: Any
) -> Pipeline:
    """Gate a diffusers pipeline, without compiling it.

    From ``gate_step`` on, the pipeline's denoiser takes every cross-attention's output from a cache and, under
    classifier-free guidance, computes one branch of the batch only (T-GATE, arXiv:2404.02747). The pipeline is changed
    in place; its own call stays the way to use it and takes one more keyword, ``gate_step``, for that call alone.

    Args:
        pipe: a diffusers pipeline with a UNet or a diffusion transformer that has cross-attention.
        gate_step: index of the first gated step, ≥ 1, counted in evaluations of the denoiser from 0 (schedulers of
            order 2, such as Heun, evaluate it twice a step; PNDM once more than it has steps). A float in (0, 1) is
            that share of the evaluations, rounded, at least 1. None, or as many as there are evaluations: never gated.
        after_gate: which guidance branch goes on after the gate. "negative" (upstream's rule) or "positive": that
            branch alone, with the mean of both branches' cross-attention outputs as its cache; they differ only where
            the conditioning reaches the denoiser in another way than by cross-attention, as in SDXL. "both": the whole
            batch with a cache for each branch, and guidance goes on.

    Returns:
        The same pipeline object.

    Raises:
        ArgumentError: an argument has the wrong type or value, or is unknown.
        UnsupportedError: the pipeline cannot be gated exactly; the message says why.
        StateError: the pipeline is gated already.
    """
    return _install(pipe, gate_step, after_gate, None, unknown)


def compile(
    pipe: Pipeline,
    gate_step: int | float | None = 10,
    *,
    after_gate: str = "negative",
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> Pipeline:
    """Gate a diffusers pipeline, and run each phase through torch.compile.

    Nothing is compiled before the first generation. Two graphs are compiled for each shape and dtype of the inputs,
    one for each phase, always whole (``fullgraph=True``); prompts, seeds, schedulers, guidance scales, gates and step
    counts may change without another.

    Args:
        pipe, gate_step, after_gate: as for `gate`.
        backend, mode, options: handed on to torch.compile. With inductor on a CPU, ``options["freezing"]`` is on unless
            ``mode`` is given or ``options={"freezing": False}``: it packs the weights for this CPU, and is what makes
            inductor faster than eager there. Each phase then keeps its own copy of the weights; weights that change
            later are noticed, and compiled again.
        dynamic: True for one pair of graphs that serves all shapes; None or False for one pair for each.

    Returns:
        The same pipeline object.

    Raises:
        ArgumentError, UnsupportedError, StateError: as for `gate`. The first generation raises `CompileError` if a
            phase cannot be compiled as one graph.
    """
    if mode is not None and options is not None:
        raise ArgumentError(f"mode={mode!r} and options={options!r} were both given: expected one of them.")
    settings = CompileSettings(backend, mode, dynamic, options)
    return _install(pipe, gate_step, after_gate, settings, unknown)


def restore(target: Any) -> None:
    """Take everything that tgate_fx put on a pipeline (or, after `split`, on a denoiser) off again.

    Class, attributes, state_dict and results are then what they were, bit for bit.

    Raises:
        StateError: the target is not gated, or a generation is running on it.
    """
    if isinstance(target, nn.Module):
        dispatch = Dispatch.of(target)
        if dispatch is None:
            raise StateError(f"This {type(target).__name__} is not split: expected a denoiser given to tgate_fx.split.")
        dispatch.release()
    else:
        _gated(target).remove(target)


@contextmanager
def disabled(pipe: Any) -> Iterator[None]:
    """While this lasts the pipeline generates ungated: as if every call had ``gate_step=None``.

    Of a pipeline under `gate` the results are bit-exact with the untouched pipeline; one under `compile` runs its
    compiled pre-gate graph at every step.

    Raises:
        StateError: the pipeline is not gated.
    """
    gated = _gated(pipe)
    gated.disabled += 1
    try:
        yield
    finally:
        gated.disabled -= 1


def report(pipe: Any) -> Report:
    """What the last generation of a gated pipeline did, step by step; `print` it for a table.

    Raises:
        StateError: the pipeline is not gated.
    """
    return _gated(pipe).report()


def sites(target: Any) -> tuple[SiteInfo, ...]:
    """The sites of a pipeline or a denoiser, gated or not: what would be cached after the gate. Compiles nothing.

    Raises:
        UnsupportedError: there is no denoiser, or it has no cross-attention.
    """
    denoiser = target if isinstance(target, nn.Module) else families.find_denoiser(target)[1]
    return tuple(SiteInfo(name, "cross-attention") for name, _ in find_sites(denoiser))


def split(denoiser: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Split a denoiser into the pure functions of its two phases, eager, to run, compile or export as you like.

    Args:
        denoiser: any model with cross-attention modules; `sites` lists them. Its modules stay in place and behave as
            before outside these functions; `restore` takes the sites off again.

    Returns:
        ``pre(*args, **kwargs) -> (output, cache)``: the denoiser on the whole batch, and the tuple of its
        cross-attentions' outputs in the order of `sites`; each is [rows, tokens, channels], for whichever rows the
        batch has. ``post(cache, *args, **kwargs) -> output``: the denoiser with these outputs instead of its
        cross-attentions. To go on with one branch of a guidance batch, T-GATE gives ``post`` the mean of each cached
        tensor's two halves, and one half of every other input.

    Raises:
        UnsupportedError: the denoiser has no cross-attention, or is compiled already.
    """
    if not isinstance(denoiser, nn.Module):
        raise UnsupportedError(f"split was given a {type(denoiser).__name__}: expected a denoiser, such as pipe.unet.")
    families.check_not_compiled("denoiser", denoiser)
    dispatch = Dispatch.install(denoiser)
    return split_functions(dispatch.sites, dispatch.inner)


class _Gated:
    """What a gated pipeline carries: its gate, its compiled phases, its cache, and the last run."""

    def __init__(
        self, pipe: Any, gate_step: int | float | None, after_gate: str, settings: CompileSettings | None
    ) -> None:
        self.gate_step = gate_step
        self.after_gate = after_gate
        self.disabled = 0
        self.attribute, self.denoiser = families.find_denoiser(pipe)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        families.check_guidance_form(pipe, self.parameters)
        self.plain_class = type(pipe)
        base: type[Any] = getattr(self.plain_class, _PLAIN_CLASS, None) or self.plain_class
        self.gated_class = _gated_class(base)  # type: ignore[arg-type]
        self.dispatch = dispatch = Dispatch.install(self.denoiser)
        functions = {
            phase.roles: phase_function(dispatch.sites, dispatch.inner, phase.roles) for phase in (PRE_GATE, POST_GATE)
        }
        self.compiled = None if settings is None else CompiledPhases(functions, self.denoiser, settings)
        self.phases = self.compiled or EagerPhases(functions, dispatch.inner)
        self.cache = StaticCache()
        self.run: Run | None = None
        self._generating = threading.Lock()
        self._thread: int | None = None

    def generate(self, pipe: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pipeline's own ``__call__`` as one generation."""
        gate_step = check_gate_step(kwargs.pop("gate_step")) if "gate_step" in kwargs else self.gate_step
        bound = functools.partial(_bound, self.parameters, (pipe, *args), kwargs)
        with self._one_at_a_time():
            self._check_pipeline(pipe)
            request = Request(
                gate_step=None if self.disabled else gate_step,
                after_gate=self.after_gate,
                guidance_scale=bound("guidance_scale"),
            )
            run = self.run = Run(pipe, self.dispatch, self.phases, self.cache, request)
            if self.compiled is not None:
                self.compiled.begin(trusted=bound("callback_on_step_end") is None and bound("callback") is None)
            try:
                with self.dispatch.running(run), families.fresh_step_count(pipe):
                    result = call(pipe, *args, **kwargs)
            finally:
                run.cut = False
            if run.steps == 0:
                raise StateError(
                    f"The generation ended without a call of pipe.{self.attribute} through tgate_fx, so nothing was "
                    "gated: expected the forward of the denoiser to be the one that was gated. Call "
                    "tgate_fx.restore(pipe) and gate it again after whatever replaced it."
                )
            return result

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
        if denoiser is not self.denoiser:
            raise StateError(
                f"pipe.{self.attribute} is another module than the one that was gated: expected the same. Put it back, "
                "or call tgate_fx.restore(pipe) and gate the pipeline again."
            )

    def report(self) -> Report:
        """The report on the last run; empty if there was none."""
        run, compiled = self.run, self.compiled
        steps = run.clock.steps() if run is not None else ()
        return Report(
            steps=steps,
            compiled_graphs=compiled.graphs if compiled is not None else 0,
            recompiles=compiled.recompiles if compiled is not None else 0,
            gate=next((step.index for step in steps if step.phase == POST_GATE.name), None),
            sites=len(self.dispatch.sites),
            compiler=compiled.describe() if compiled is not None else "eager",
            cache_bytes=self.cache.nbytes,
        )

    def remove(self, pipe: Any) -> None:
        """Take this gate off its pipeline."""
        if type(pipe) is not self.gated_class:
            raise StateError(
                f"The class of this {self.plain_class.__name__} was changed after it was gated: expected it unchanged. "
                "Undo first what was installed on the pipeline last."
            )
        with self._one_at_a_time():
            self.dispatch.release()
            pipe.__class__ = self.plain_class
            del vars(pipe)[_ATTRIBUTE]


def _gated(pipe: Any) -> _Gated:
    gated: _Gated | None = getattr(pipe, "__dict__", {}).get(_ATTRIBUTE)
    if gated is None:
        raise StateError(
            f"This {type(pipe).__name__} is not gated: expected a pipeline given to tgate_fx.gate or tgate_fx.compile."
        )
    return gated


def _bound(parameters: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
    """The value that a call of the pipeline binds to this parameter, its default included; None if it has none."""
    if name in kwargs:
        return kwargs[name]
    names = list(parameters)
    if name not in names:
        return None
    position = names.index(name)
    return args[position] if position < len(args) else parameters[name].default


def _install(
    pipe: Pipeline, gate_step: object, after_gate: object, settings: CompileSettings | None, unknown: Mapping[str, Any]
) -> Pipeline:
    if unknown:
        raise ArgumentError(
            f"Unknown keyword {', '.join(unknown)}: expected the keywords that tgate_fx.gate or tgate_fx.compile "
            "documents."
        )
    if _ATTRIBUTE in getattr(pipe, "__dict__", {}):
        raise StateError(
            f"This {type(pipe).__name__} is gated already: expected one that is not. Call tgate_fx.restore(pipe) "
            "first; to change the gate for one call, use pipe(..., gate_step=...)."
        )
    gated = _Gated(pipe, check_gate_step(gate_step), check_after_gate(after_gate), settings)
    vars(pipe)[_ATTRIBUTE] = gated
    pipe.__class__ = gated.gated_class
    return pipe


@functools.cache
def _gated_class(base: type[Any]) -> type[Any]:
    """A subclass of a pipeline's class whose call is one generation; it has the same name, module and behaviour.

    Only gated instances get this class: the pipeline class itself is never changed. An instance of it that was made
    from a gated one, and is not gated itself, is a plain pipeline.
    """

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        gated: _Gated | None = vars(self).get(_ATTRIBUTE)
        if gated is None:
            return base.__call__(self, *args, **kwargs)
        return gated.generate(self, base.__call__, args, kwargs)

    __call__.__signature__ = _with_gate_step(inspect.signature(base.__call__))  # type: ignore[attr-defined]
    attributes: dict[str, Any] = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    attributes[_PLAIN_CLASS] = base
    if isinstance(getattr(base, "guidance_rescale", None), property):

        def guidance_rescale(self: Any) -> Any:
            # Where guidance sees one branch twice, rescaling would blend two equal predictions and only round them.
            gated: _Gated | None = vars(self).get(_ATTRIBUTE)
            cut = gated is not None and gated.run is not None and gated.run.cut
            return 0.0 if cut else base.guidance_rescale.fget(self)

        attributes["guidance_rescale"] = property(guidance_rescale)
    return type(base.__name__, (base,), {**attributes, "__qualname__": base.__qualname__})


def _with_gate_step(signature: inspect.Signature) -> inspect.Signature:
    keyword = inspect.Parameter("gate_step", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = sorted([*signature.parameters.values(), keyword], key=lambda parameter: parameter.kind)
    return signature.replace(parameters=parameters)
