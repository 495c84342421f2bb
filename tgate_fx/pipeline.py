"""The public functions that change a pipeline or a denoiser: gate or compile, disabled, restore; split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .auto_gate import AutoGate
from .companions import companions_of
from .compiled.regional import RegionalPhases
from .compiled.settings import CompileSettings
from .compiled.whole import WholePhases
from .deepcache import DeepCache
from .dispatch import SPLIT, Dispatch
from .errors import ArgumentError, StateError, UnsupportedError
from .gated import Gated, check_not_gated, gated_of
from .keywords import refuse_unknown
from .network import Network, check_not_compiled, networks_of
from .phases import EagerPhases, Phases
from .run import GatedNetwork
from .schedule import Schedule
from .split import split as split_functions

Pipeline = TypeVar("Pipeline")


@refuse_unknown
def gate(
    pipe: Pipeline,
    gate_step: int | float | str | AutoGate | None = 10,
    *,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    deepcache: DeepCache | None = None,
    after_gate: str | None = None,
    cache_weight: float = 0.5,
    forecast: int = 1,
    guidance: tuple[int, int] | None = None,
    full_steps: Sequence[int | float] = (),
    gate_companions: bool = True,
) -> Pipeline:
    """Gate a diffusers pipeline, without compiling it.

    From ``gate_step`` on, the pipeline's denoiser takes every cross-attention's output from a cache and, under
    classifier-free guidance, computes one branch of the batch only (T-GATE, arXiv:2404.02747). The pipeline is changed
    in place; its own call stays the way to use it, and takes all of these arguments but ``deepcache`` and
    ``gate_companions`` as further keywords, for that call alone.

    Args:
        pipe: a diffusers pipeline with a UNet or a diffusion transformer that has cross-attention.
        gate_step: index of the first gated step, ≥ 1, counted in evaluations of the denoiser from 0 (schedulers of
            order 2, such as Heun, evaluate it twice a step but for the last one; PNDM that skips its Runge-Kutta steps
            once more than it has steps). A float in (0, 1) is that share of the evaluations, rounded, at least 1. None:
            never gated. So it is with as many as there are evaluations or more, of which a generation warns. "auto" or
            an `AutoGate`: once both guidance branches predict nearly the same.
        sp_interval, fi_interval, warm_up: TGATE-V2's cache of self-attention, as in upstream `tgate`. Before the gate
            self-attention is computed at the steps up to ``warm_up``, at every multiple of ``sp_interval``, and at the
            last step; from the gate on at every multiple of ``fi_interval``. At the steps between, its cached output
            is used. With both intervals 1 it is always computed.
        deepcache: skip the deep branch of a UNet at most steps, as the `DeepCache` package does. Works without a gate
            too; not together with the intervals.
        after_gate: which guidance branch goes on after the gate. "negative" or "positive": that branch alone; they
            differ only where the conditioning reaches the denoiser in another way than by cross-attention, as in SDXL.
            "guided": the conditional branch alone, and guidance goes on with the difference of the branches at the last
            full step, held constant as noise, which for a flow must not be the first of all. "both": the whole batch
            with a cache for each branch, and guidance goes on. None is upstream's rule where it has one ("positive" for
            Stable Video Diffusion, "negative" for other Stable Diffusion and PixArt), "positive" for all others, and
            with ``cache_weight=1.0``. Where the other branch has zeros in place of control (``guess_mode``, GLIGEN's
            boxes, the image of StableUnCLIP), "positive" goes on in place of "negative".
        cache_weight: what is cached where one branch goes on: ``lerp(unconditional, conditional, cache_weight)`` of the
            branches' outputs, from 0 to 1. 0.5 is T-GATE's mean, 1.0 the conditional branch's own. It changes no graph.
        forecast: from the gate on, the denoiser is computed at every such step, counted from the gate and from each of
            ``full_steps``, and at the last one; between, its output goes on in a straight line from the last two that
            were computed. Not together with ``fi_interval``, ``deepcache``, ``after_gate="both"`` or a scheduler of
            order 2.
        guidance: ``(start, stop)``, the steps with guidance: at the others the conditional branch alone is computed,
            with live cross-attention before the gate and with ``gate_step=None`` (a guidance interval, Kynkäänniemi et
            al., arXiv:2404.07724). The gate ends it too. It takes one graph more. Not together with the intervals,
            ``deepcache`` or an ``after_gate`` other than "positive", and it must begin before the gate.
        full_steps: steps that are computed in full after the gate too, with all branches and text, as the last one
            before it is: what is cached is renewed there, and so is the difference that is held. They keep the prompt
            after an early gate, and change nothing before it. Ints are indices, floats in (0, 1) shares of the steps.
        gate_companions: after the gate, ControlNets too run on the branch that goes on, with their cross-attentions
            cached; False lets them compute the whole batch at every step.

    Returns:
        The same pipeline object.

    Raises:
        ArgumentError: an argument has the wrong type or value, or is unknown.
        UnsupportedError: the pipeline cannot be gated exactly; the message says why.
        StateError: the pipeline is gated already.
    """
    networks = _networks(pipe, deepcache)
    schedule = Schedule(
        gate_step,
        sp_interval,
        fi_interval,
        warm_up,
        *_deep(deepcache),
        after_gate,
        cache_weight,
        forecast,
        guidance,
        full_steps,
    )
    attach(pipe, schedule, networks, gate_companions, EagerPhases)
    return pipe


@refuse_unknown
def compile(
    pipe: Pipeline,
    gate_step: int | float | str | AutoGate | None = 10,
    *,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    deepcache: DeepCache | None = None,
    after_gate: str | None = None,
    cache_weight: float = 0.5,
    forecast: int = 1,
    guidance: tuple[int, int] | None = None,
    full_steps: Sequence[int | float] = (),
    gate_companions: bool = True,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    regional: bool = False,
) -> Pipeline:
    """Gate a diffusers pipeline, and run each phase through torch.compile.

    Nothing is compiled before the first generation. Two graphs are compiled for each shape and dtype of the inputs,
    one for each phase, always whole (``fullgraph=True``); prompts, seeds, schedulers, guidance scales above 1, gates
    and step counts may change without another. ``sp_interval`` > 1 needs one graph more, ``fi_interval`` > 1 too, and
    ``deepcache`` one more for each phase.

    Args:
        pipe, gate_step, sp_interval, fi_interval, warm_up, deepcache, after_gate, cache_weight, forecast, guidance,
            full_steps, gate_companions: as for `gate`.
        backend, mode, options: handed on to torch.compile. With inductor on a CPU, ``options["freezing"]`` is on unless
            ``mode`` is given or ``options={"freezing": False}``: it packs the weights for this CPU, and is what makes
            inductor faster than eager there. Packed weights are there once for all phases where they are packed alike;
            weights that change later are noticed, and compiled again. ``"openvino"`` computes by OpenVINO's CPU plugin
            (not by torch's backend of that name, which decomposes attention), whose graphs are frozen too;
            ``options`` are then properties for its ``compile_model``.
        dynamic: True for graphs that serve all sizes (of PixArt and Latte, with ``regional`` only); None or False for
            graphs of each.
        regional: compile the denoiser's repeated blocks, one graph for all that are alike, and run what is between
            them eagerly: compiling takes a fraction of the time, and steps are slower than with whole phases.
            ``freezing`` is then off, since it would bake each block's weights into a graph of its own.

    Returns:
        The same pipeline object.

    Raises:
        ArgumentError, UnsupportedError, StateError: as for `gate`. The first generation raises `CompileError` if a
            phase cannot be compiled as one graph.
    """
    if mode is not None and options is not None:
        raise ArgumentError(f"mode={mode!r} and options={options!r} were both given: expected one of them.")
    settings = CompileSettings(backend, mode, dynamic, options, regional)
    networks = _networks(pipe, deepcache)
    schedule = Schedule(
        gate_step,
        sp_interval,
        fi_interval,
        warm_up,
        *_deep(deepcache),
        after_gate,
        cache_weight,
        forecast,
        guidance,
        full_steps,
    )
    attach(pipe, schedule, networks, gate_companions, phases_with(settings))
    return pipe


def phases_with(settings: CompileSettings) -> Callable[[Network], Phases]:
    """Return what makes the phases of a network under these settings."""
    phases = RegionalPhases if settings.regional else WholePhases
    return lambda network: phases(network, settings)


def attach(
    pipe: Any,
    schedule: Schedule,
    networks: Sequence[Network],
    gate_companions: bool,
    make_phases: Callable[[Network], Phases],
) -> None:
    """Gate a pipeline whose denoisers these networks are."""
    if not isinstance(gate_companions, bool):
        raise ArgumentError(
            f"gate_companions={gate_companions!r} ({type(gate_companions).__name__}) was given: expected True or False."
        )
    gated, companions = (
        [GatedNetwork(network, make_phases(network)) for network in each]
        for each in (networks, companions_of(pipe) if gate_companions else [])
    )
    Gated(pipe, schedule, gated, companions).attach(pipe)


def _deep(deepcache: DeepCache | None) -> tuple[int | None, int]:
    """Return what a schedule has of DeepCache: the interval of the deep branch, and what stands in for it between."""
    return (None, 0) if deepcache is None else (deepcache.interval, deepcache.order)


def _networks(pipe: Any, deepcache: object) -> list[Network]:
    check_not_gated(pipe)
    if deepcache is not None and not isinstance(deepcache, DeepCache):
        raise ArgumentError(
            f"deepcache={deepcache!r} ({type(deepcache).__name__}) is no setting for DeepCache: expected "
            "tgate_fx.DeepCache(interval=..., branch=...), or None."
        )
    return networks_of(pipe, deepcache)


@contextmanager
def disabled(pipe: Any) -> Iterator[None]:
    """Context manager: the pipeline generates with nothing cached, whatever its gate and its calls say.

    Of a pipeline under `gate` the results are bit-exact with the untouched pipeline; one under `compile` runs its
    compiled pre-gate graph at every step.

    Raises:
        StateError: the pipeline is not gated.
    """
    gated = gated_of(pipe)
    gated.disabled += 1
    try:
        yield
    finally:
        gated.disabled -= 1


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
        if dispatch.gates and not dispatch.marks:
            raise StateError(
                f"This {type(target).__name__} belongs to a gated pipeline: expected a denoiser given to "
                "tgate_fx.split. Call tgate_fx.restore(pipe) with the pipeline."
            )
        dispatch.detach_from(SPLIT)
    else:
        gated_of(target).detach(target)


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
        tensor's two halves, and one half of every other input. Called from several threads they take turns; once you
        have compiled them, call them from one thread at a time.

    Raises:
        UnsupportedError: the denoiser has no cross-attention, or is compiled already.
    """
    if not isinstance(denoiser, nn.Module):
        raise UnsupportedError(f"split was given a {type(denoiser).__name__}: expected a denoiser, such as pipe.unet.")
    check_not_compiled("denoiser", denoiser)
    dispatch = Dispatch.attach_to(denoiser, SPLIT)
    return split_functions(dispatch.sites, dispatch.original_forward, dispatch.lock)
