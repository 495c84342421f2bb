"""One function under torch.compile, and what the runners that compile have in common."""

from __future__ import annotations

import abc
import re
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import CompileError, TGateError
from ..inputs import latents_of
from ..phases import Phases
from ..roles import Roles
from ..schedule import Step
from ..split import Cache, PhaseResult
from . import private
from .backend import PrunedBackend
from .frozen_weights import FrozenWeights, can_be_read
from .guard_policy import check_no_global_hooks, runs_only_known_code
from .image_scales import ImageScales
from .lora_scales import LoraScales
from .settings import CompileSettings

# All CUDA graphs that were first run in one thread share their memory, and until torch 2.13 any thread may replay them.
_REPLAYS = threading.RLock()


class Variant:
    """One compiled function, such as a phase for inputs of one signature, with a code object of its own.

    torch.compile keeps its graphs, and counts them against its recompile limit, by code object: phases, shapes and
    pipelines that shared one would use up each other's share. (``torch.compile(isolate_recompiles=True)`` of torch 2.13
    counts apart too, but keeps the graphs for as long as the modules live, though nothing calls the function any more.)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        settings: CompileSettings,
        device: torch.device,
        weights: FrozenWeights | None = None,
        guard_filter: Callable[[Any], list[bool]] | None = None,
    ) -> None:
        code = function.__code__.replace(co_name=re.sub(r"\W+", "_", name))
        self._name = name
        freezes = settings.freezes(device)
        self._weights = weights if freezes else None  # the backend knows it, but does not keep it
        # Every patch object that torch makes takes memory for good, so there is one for all calls.
        self._frozen = private.frozen_parameters() if freezes else nullcontext()
        self._with_hook_guards = private.hook_guards()
        self._sizes = private.sizes_apart() if settings.dynamic else nullcontext()
        self._function = _with_code(function, code)
        weakref.finalize(self, private.forget, code).atexit = False
        options = settings.options_for(device)
        if guard_filter is not None:
            options = {**(options or {}), "guard_filter_fn": guard_filter}
        cuda_graphs = settings.uses_cuda_graphs(device)
        # The backend knows the mode: torch.compile takes no mode beside options, of which the guard filter is one.
        self._backend = PrunedBackend(settings.backend, self._weights, mode=settings.mode, cuda_graphs=cuda_graphs)
        self._compiled = torch.compile(
            self._function,
            backend=self._backend,
            options=options,
            dynamic=bool(settings.dynamic),
            fullgraph=True,
        )
        self.layout = torch.contiguous_format
        self.unguarded: Callable[..., Any] | None = None

    @property
    def graphs(self) -> int:
        """How many graphs it has compiled."""
        return self._backend.graphs

    def __call__(self, *args: Any) -> Any:
        """Run with every guard checked, compiling if need be."""
        try:
            with self._frozen, self._with_hook_guards, self._sizes:
                result = self._compiled(*args)
        except private.compile_errors() as error:
            refused = getattr(error, "inner_exception", None)
            if isinstance(refused, TGateError):
                raise refused from None
            raise CompileError(
                f"The {self._name} could not be compiled as one graph: {error}\n"
                "Expected a denoiser that torch.compile takes whole. Remove what breaks the graph (the message above "
                "names it), or use tgate_fx.gate(pipe, ...), which gates without compiling."
            ) from error
        last = private.last_run(self._function.__code__)
        self.unguarded = None if last is None else _with_code(self._function, last)
        return result


class CompiledPhases(Phases):
    """Runs phases by functions under torch.compile, and counts the graphs that these have.

    Raises:
        UnsupportedError: this torch lacks something that compiling needs.
    """

    is_compiled = True

    def __init__(self, denoiser: nn.Module, settings: CompileSettings) -> None:
        inductor_mode = settings.mode is not None and settings.backend == "inductor"
        private.check_can_compile(dynamic=bool(settings.dynamic), inductor_mode=inductor_mode)
        self._given = self._settings = settings
        self._denoiser = denoiser
        self._lora_scales = LoraScales(denoiser)
        self._image_scales = ImageScales(denoiser)
        self._variants: dict[object, Variant] = {}
        self._device = torch.device("cpu")
        self._compiled: set[Roles] = set()
        self._compiled_before: set[Roles] = set()
        self._changes = True  # whether the modules may change between the steps of this generation

    def describe(self) -> str:
        """Return the torch.compile settings in force."""
        return self._settings.describe(self._device)

    def uses_cuda_graphs(self, device: torch.device) -> bool:
        """Return whether they are for CUDA graphs on this device."""
        return self._settings.uses_cuda_graphs(device)

    def turns(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a lock where a replay overwrites what another gave; see `Phases`."""
        return _REPLAYS if self.uses_cuda_graphs(device) else super().turns(device)

    def needs_static_addresses(self, device: torch.device) -> bool:
        """Return whether graphs on this device read their cache in place."""
        return self._settings.needs_static_addresses(device)

    @property
    def given_settings(self) -> CompileSettings:
        """What the pipeline was compiled with; quantized weights may need others."""
        return self._given

    def inductor_options(self, device: torch.device) -> dict[str, Any] | None:
        """Return inductor's options for compiling ahead of time; see `Phases`."""
        return self._settings.ahead_of_time(device)

    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Begin a generation; see `Phases`."""
        check_no_global_hooks()
        is_dense = all(can_be_read(weight) for weight in self._denoiser.parameters())
        self._settings = self._given if is_dense else self._given.for_quantized_weights()
        self._changes = calls_back or not runs_only_known_code(pipe, pipeline_class, self._denoiser)
        self._lora_scales.begin(may_change=self._changes)
        self._image_scales.begin()
        self._compiled_before = set(self._compiled)
        self.recompiles = 0

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step, with every scale as an input of its graph; see `Phases`."""
        device = latents_of(inputs)[1].device
        try:
            inputs = self._lora_scales.put(inputs, device)
            self._image_scales.put(device)
            return self._run(step, cache, inputs)
        finally:
            self._image_scales.give_back()
            self._lora_scales.take_out()

    @abc.abstractmethod
    def _run(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step."""

    def detach(self) -> None:
        """Give LoRA layers their own scales back; see `Phases`."""
        self._lora_scales.give_back()

    def _call_variant(
        self, key: object, step: Step, new_variant: Callable[[], Variant], args: tuple[Any, ...]
    ) -> tuple[Variant, Any]:
        """Run the function that there is under this key with every guard checked, compiling if need be."""
        variant = self._variants.get(key) or new_variant()
        before = variant.graphs
        try:
            try:
                result = variant(*args)
            except private.recompile_limit_errors():  # modules changed more often than one function may follow
                variant, before = new_variant(), 0
                result = variant(*args)
        finally:  # what an interruption in its first run leaves is a graph all the same
            compiled = variant.graphs - before
            if compiled > 0:
                self._variants[key] = variant
                self.graphs += compiled
                if step.roles in self._compiled_before:
                    self.recompiles += compiled
                self._compiled.add(step.roles)
        self._variants[key] = variant
        return variant, result


def _with_code(function: Callable[..., Any], code: types.CodeType) -> Callable[..., Any]:
    """Return the same function with another code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
