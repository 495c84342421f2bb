"""How each contender is put on a pipeline, and then run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

import tgate_fx

from ..compiled import private
from ..compiled.backend import PrunedBackend
from ..compiled.settings import CompileSettings
from ..inputs import map_tensors
from ..network import networks_of
from .workload import Workload

# Runs an image of some steps, gated at one of them if the contender is gated; returns the final latents.
Generate = Callable[[int, int], torch.Tensor]
# Puts a contender on a new pipeline, and returns how that is then run.
Prepare = Callable[[Any, Workload], Generate]

DEEPCACHE = tgate_fx.DeepCache(interval=3, branch=0)
NO_INTERVALS: dict[str, Any] = {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}  # not upstream's defaults


def plain(**settings: Any) -> Prepare:
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
    compiled = torch.compile(network.module, **settings)
    if settings.get("mode") == "reduce-overhead":
        keep_outputs(compiled)
    setattr(pipe, network.attribute, compiled)


def keep_outputs(compiled: Any) -> None:
    """Let a compiled model give copies of what the next replay overwrites, which a step of two calls needs."""
    run = compiled.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return map_tensors(torch.clone, run(*args, **kwargs))

    compiled.forward = forward


def cutoff(**settings: Any) -> Prepare:
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


def upstream(
    *, compiled: bool = False, deepcache: bool = False, intervals: Mapping[str, Any] = NO_INTERVALS
) -> Prepare:
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


def deepcache_package(pipe: Any, workload: Workload) -> Generate:
    """Return the `DeepCache` package."""
    helper = importlib.import_module("DeepCache").DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=DEEPCACHE.interval, cache_branch_id=DEEPCACHE.branch)
    helper.enable()
    return lambda steps, gate: workload.latents(pipe, steps)


def openvino(pipe: Any, workload: Workload) -> Generate:
    """Diffusers' own pipeline, its denoiser converted to OpenVINO."""
    from .openvino import convert

    convert(networks_of(pipe)[0].module, workload.torch_dtype)
    return lambda steps, gate: workload.latents(pipe, steps)


def gated(
    compile_settings: Mapping[str, Any] | None = None,
    deepcache: tgate_fx.DeepCache | None = None,
    **rules: Any,
) -> Prepare:
    """This library; eager without compile settings."""

    def prepare(pipe: Any, workload: Workload) -> Generate:
        if compile_settings is None:
            tgate_fx.gate(pipe, deepcache=deepcache, **rules)
        else:
            tgate_fx.compile(pipe, deepcache=deepcache, **rules, **compile_settings)
        return lambda steps, gate: workload.latents(pipe, steps, gate_step=gate)

    return prepare


def as_phases(pipe: Any, workload: Workload) -> Generate:
    """Diffusers' own pipeline, its denoiser compiled as tgate_fx compiles a phase, but capturing nothing."""
    settings = CompileSettings()
    options = settings.options_for(torch.device("cpu"))
    _compile_denoiser(pipe, backend=PrunedBackend(settings.backend), freezing=True, options=options, dynamic=False)
    return lambda steps, gate: workload.latents(pipe, steps)
