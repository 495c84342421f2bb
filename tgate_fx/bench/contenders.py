"""Who takes part: ways to generate the same image, each with the one that its result is checked against."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import tgate_fx

from .. import private
from ..compiled.backend import PrunedBackend
from ..compiled.settings import CompileSettings
from ..network import networks_of
from ..schedule import Schedule
from .workload import Workload

# Runs an image of some steps, gated at one of them if the contender is gated; returns the final latents.
Generate = Callable[[int, int], torch.Tensor]
# Puts a contender on a new pipeline, and returns how that is then run.
Prepare = Callable[[Any, Workload], Generate]

DEEPCACHE = tgate_fx.DeepCache(interval=3, branch=0)
INTERVALS: dict[str, Any] = {"sp_interval": 5, "fi_interval": 1, "warm_up": 2}
_NO_INTERVALS: dict[str, Any] = {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}  # not upstream's defaults

_UNGATED = Schedule(None)
_GATED = Schedule(1)
_GATED_INTERVALS = Schedule(1, **INTERVALS)
_DEEP = Schedule(None, deep_interval=DEEPCACHE.interval)
_GATED_DEEP = Schedule(1, deep_interval=DEEPCACHE.interval)


@dataclass(frozen=True)
class Contender:
    """One way to generate.

    Attributes:
        title: what tables call it.
        prepare: puts it on a new pipeline.
        schedule: what it computes, its ``gate_step`` being that of a run; None if no `Schedule` says it.
        takes_gate: whether a run depends on the gate step.
        reference: the contender whose latents its own must agree with; None if it is a reference itself.
        exact: whether they must be equal, bit for bit.
        ungated: the contender with the same compile settings and nothing cached.
        copies: how often it keeps the weights in memory, besides the file that all processes share.
    """

    title: str
    prepare: Prepare
    schedule: Schedule | None = _UNGATED
    takes_gate: bool = False
    reference: str | None = None
    ungated: str | None = None
    copies: float = 0
    exact: bool = False

    def schedule_at(self, gate: int | None) -> Schedule | None:
        """Return the schedule of a run with this gate."""
        return (
            replace(self.schedule, gate_step=gate) if self.schedule is not None and self.takes_gate else self.schedule
        )


def _diffusers(**settings: Any) -> Prepare:
    """Diffusers' own pipeline; with settings, its denoiser compiled."""

    def prepare(pipe: Any, workload: Workload) -> Generate:
        if settings:
            _compile_denoiser(pipe, **settings)
        return lambda steps, gate: workload.latents(pipe, steps)

    return prepare


def _compile_denoiser(pipe: Any, *, freezing: bool = False, **settings: Any) -> None:
    # For as long as the process lives, which runs nothing else.
    if freezing:
        private.frozen_parameters().__enter__()
    private.fail_at_recompile_limit().__enter__()  # else the rest would silently run eagerly
    (network,) = networks_of(pipe)
    setattr(pipe, network.attribute, torch.compile(network.module, **settings))


def _cutoff(**settings: Any) -> Prepare:
    """Diffusers' callback that drops guidance from a step on, and goes on with the conditional branch."""

    def prepare(pipe: Any, workload: Workload) -> Generate:
        callbacks = importlib.import_module("diffusers.callbacks")
        cls = callbacks.SDXLCFGCutoffCallback if workload.arch == "sdxl" else callbacks.SDCFGCutoffCallback
        if settings:
            _compile_denoiser(pipe, **settings)

        def generate(steps: int, gate: int) -> torch.Tensor:
            # It takes effect after the step with this index: the step `gate` is the first without guidance.
            callback = cls(cutoff_step_ratio=None, cutoff_step_index=gate - 1)
            return workload.latents(
                pipe,
                steps,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=cls.tensor_inputs,
            )

        return generate

    return prepare


_TGATE_LOADERS = {"sdxl": "TgateSDXLLoader", "pixart-alpha": "TgatePixArtAlphaLoader"}


def _tgate(*, compiled: bool = False, deepcache: bool = False, intervals: Mapping[str, Any] = _NO_INTERVALS) -> Prepare:
    """Upstream `tgate`."""

    def prepare(pipe: Any, workload: Workload) -> Generate:
        tgate = importlib.import_module("tgate")
        loader = _TGATE_LOADERS.get(workload.arch, "TgateSDLoader")
        if deepcache:
            loader = loader.replace("Loader", "DeepCacheLoader")
            pipe = getattr(tgate, loader)(pipe, cache_interval=DEEPCACHE.interval, cache_branch_id=DEEPCACHE.branch)
        else:
            pipe = getattr(tgate, loader)(pipe)
        if compiled:
            _compile_denoiser(pipe)
        return lambda steps, gate: workload.latents(pipe.tgate, steps, gate_step=gate, **intervals)

    return prepare


def _deepcache(pipe: Any, workload: Workload) -> Generate:
    """Return the `DeepCache` package."""
    helper = importlib.import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=DEEPCACHE.interval, cache_branch_id=DEEPCACHE.branch)
    helper.enable()
    return lambda steps, gate: workload.latents(pipe, steps)


def _openvino(pipe: Any, workload: Workload) -> Generate:
    """Diffusers' own pipeline, its denoiser converted to OpenVINO."""
    from .openvino import convert

    convert(networks_of(pipe)[0].module, workload.torch_dtype)
    return lambda steps, gate: workload.latents(pipe, steps)


def _tgate_fx(
    compile_settings: Mapping[str, Any] | None = None,
    deepcache: tgate_fx.DeepCache | None = None,
    **intervals: Any,
) -> Prepare:
    """This library; eager without compile settings."""

    def prepare(pipe: Any, workload: Workload) -> Generate:
        if compile_settings is None:
            tgate_fx.gate(pipe, deepcache=deepcache, **intervals)
        else:
            tgate_fx.compile(pipe, deepcache=deepcache, **intervals, **compile_settings)
        return lambda steps, gate: workload.latents(pipe, steps, gate_step=gate)

    return prepare


def _as_phases(pipe: Any, workload: Workload) -> Generate:
    """Diffusers' own pipeline, its denoiser compiled as tgate_fx compiles a phase, but capturing nothing."""
    settings = CompileSettings()
    options = settings.options_for(torch.device("cpu"))
    _compile_denoiser(pipe, backend=PrunedBackend(settings.backend), freezing=True, options=options, dynamic=False)
    return lambda steps, gate: workload.latents(pipe, steps)


_UNFROZEN = {"options": {"freezing": False}}

CONTENDERS: dict[str, Contender] = {
    "diffusers": Contender("diffusers", _diffusers()),
    "diffusers-compiled": Contender("diffusers, torch.compile", _diffusers(backend="inductor"), reference="diffusers"),
    "diffusers-frozen": Contender(
        "diffusers, torch.compile with freezing", _diffusers(freezing=True), reference="diffusers", copies=1
    ),
    "openvino": Contender("diffusers, OpenVINO", _openvino, reference="diffusers", copies=1),
    "cutoff": Contender("diffusers' CFG cutoff", _cutoff(), None, True, ungated="diffusers"),
    "cutoff-frozen": Contender(
        "diffusers' CFG cutoff, torch.compile with freezing",
        _cutoff(freezing=True, dynamic=False),
        None,
        True,
        "cutoff",
        "diffusers-frozen",
        copies=2,
    ),
    "deepcache": Contender("DeepCache", _deepcache, _DEEP, ungated="diffusers"),
    "tgate": Contender("tgate", _tgate(), _GATED, True, ungated="diffusers"),
    "tgate-compiled": Contender(
        "tgate, torch.compile", _tgate(compiled=True), _GATED, True, "tgate", "diffusers-compiled"
    ),
    "tgate-intervals": Contender(
        "tgate, self-attention every 5", _tgate(intervals=INTERVALS), _GATED_INTERVALS, True, ungated="diffusers"
    ),
    "tgate-deepcache": Contender(
        "tgate with DeepCache", _tgate(deepcache=True), _GATED_DEEP, True, ungated="diffusers"
    ),
    "gated": Contender("tgate_fx, eager", _tgate_fx(), _GATED, True, "tgate", "diffusers", exact=True),
    "gated-intervals": Contender(
        "tgate_fx, eager, self-attention every 5",
        _tgate_fx(**INTERVALS),
        _GATED_INTERVALS,
        True,
        "tgate-intervals",
        "diffusers",
        exact=True,
    ),
    "gated-deepcache": Contender(
        "tgate_fx, eager, DeepCache",
        _tgate_fx(deepcache=DEEPCACHE),
        _GATED_DEEP,
        True,
        "tgate-deepcache",
        "diffusers",
        exact=True,
    ),
    "gated-unfrozen": Contender(
        "tgate_fx, compiled without freezing", _tgate_fx(_UNFROZEN), _GATED, True, "tgate", "diffusers-compiled"
    ),
    "ungated-compiled": Contender("diffusers, compiled as tgate_fx does", _as_phases, reference="diffusers", copies=1),
    "gated-compiled": Contender(
        "tgate_fx, compiled", _tgate_fx({}), _GATED, True, "tgate", "ungated-compiled", copies=3
    ),
    "gated-openvino": Contender(
        "tgate_fx, OpenVINO", _tgate_fx({"backend": "openvino"}), _GATED, True, "tgate", "openvino", copies=3
    ),
    "gated-deepcache-compiled": Contender(
        "tgate_fx, compiled, DeepCache",
        _tgate_fx({}, DEEPCACHE),
        _GATED_DEEP,
        True,
        "tgate-deepcache",
        "ungated-compiled",
        copies=3,
    ),
}

# Each adds one thing to another, which it is set against.
LADDER: dict[str, str | None] = {
    "diffusers": None,
    "cutoff": "diffusers",
    "gated": "cutoff",
    "gated-intervals": "gated",
    "gated-deepcache": "gated",
    "gated-compiled": "gated",
    "gated-deepcache-compiled": "gated-compiled",
}


def applicable(names: tuple[str, ...], arch: str) -> tuple[str, ...]:
    """Return those of the contenders that there are for a model."""
    without = ("cutoff", "deepcache") if arch.startswith("pixart") else ()
    return tuple(name for name in names if not any(part in name for part in without))
