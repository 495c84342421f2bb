"""torch.compile for the phases: choices for each device, a graph for each phase and input form, guards when due."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import CompileError, TGateError
from .families import first_input
from .forms import canonical, memory_format
from .held import HeldWeights
from .pruning import PrunedBackend
from .schedule import Step
from .sites import Roles
from .split import Cache, PhaseFunction, PhaseResult

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class CompileSettings:
    """What is handed on to torch.compile; ``fullgraph`` is always on.

    On a CPU, inductor's ``freezing`` is on unless ``mode`` or ``options["freezing"]`` says otherwise: it packs the
    weights for the CPU's kernels, and without it inductor is no faster than eager there.
    """

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None

    def options_for(self, device: torch.device) -> dict[str, Any] | None:
        """The ``options`` for graphs on this device."""
        options = dict(self.options or {})
        if self.backend == "inductor" and self.mode is None and device.type == "cpu":
            options.setdefault("freezing", True)
        return options or None

    def freezes(self, device: torch.device) -> bool:
        """Whether compiled graphs on this device hold the weights as they were when compiled."""
        return self.backend == "inductor" and bool((self.options_for(device) or {}).get("freezing"))

    def replays(self, device: torch.device) -> bool:
        """Whether graphs on this device may be CUDA-graph replays, whose outputs the next replay overwrites."""
        options = self.options or {}
        return device.type == "cuda" and (self.mode in _CUDA_GRAPH_MODES or bool(options.get("triton.cudagraphs")))

    def describe(self, device: torch.device) -> str:
        """The settings in force on this device, in words."""
        backend = self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", "custom backend")
        said = [f"mode={self.mode}"] if self.mode else []
        said += [f"{key}={value}" for key, value in (self.options_for(device) or {}).items()]
        if self.dynamic:
            said.append("dynamic")
        return f"torch.compile ({', '.join([str(backend), *said])})"


class _Variant:
    """One compiled function: a phase for one form of its inputs, with a code object of its own.

    torch.compile keeps its graphs, and counts them against its recompile limit, by code object: phases, shapes and
    pipelines that shared one would use up each other's share.
    """

    def __init__(
        self, function: PhaseFunction, phase: str, settings: CompileSettings, latents: torch.Tensor, held: HeldWeights
    ) -> None:
        code = function.__code__.replace(co_name=re.sub(r"\W+", "_", phase))
        self._phase = phase
        self._freezes = settings.freezes(latents.device)
        self._function = _with_code(function, code)
        self._compiled = torch.compile(
            self._function,
            backend=PrunedBackend(settings.backend, held.hold if self._freezes else None),
            mode=settings.mode,
            options=settings.options_for(latents.device),
            dynamic=bool(settings.dynamic),
            fullgraph=True,
        )
        self.layout = memory_format(latents)
        self.graphs = 0
        self.unguarded: PhaseFunction | None = None

    def __call__(self, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run with every guard checked, compiling if need be."""
        # Dynamo looks at inductor's own setting, not at the options, to keep weights out of the graph's inputs.
        frozen = torch._inductor.config.patch(freezing=True) if self._freezes else nullcontext()
        # Without this, hooks that are registered on modules later would not be noticed.
        with_hook_guards = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
        try:
            with frozen, with_hook_guards:
                result: PhaseResult = self._compiled(cache, (), inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            refused = getattr(error, "inner_exception", None)
            if isinstance(refused, TGateError):
                raise refused from None
            raise CompileError(
                f"The {self._phase} phase could not be compiled as one graph: {error}\n"
                "Expected a denoiser that torch.compile takes whole. Remove what breaks the graph (the message above "
                "names it), or use tgate_fx.gate(pipe, ...), which gates without compiling."
            ) from error
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(self._function.__code__)
        self.graphs = len(entries)
        # Dynamo keeps the entry that ran last in front. Under another stance than these, none of them may have run.
        if entries and torch._dynamo.eval_frame._stance.stance in ("default", "fail_on_recompile"):
            self.unguarded = _with_code(self._function, entries[0].code)
        else:
            self.unguarded = None
        return result


class CompiledPhases:
    """Runs each phase through torch.compile.

    Guards are what torch.compile checks at every call, to see that a graph still fits the modules and inputs it was
    made for. Within one generation they are checked at a phase's first step, and after that only the form of the inputs
    is. Where anything but known code may change the modules between two steps (`tgate_fx.trust`), they are checked at
    every step.

    Attributes:
        graphs: how many graphs were compiled so far.
        recompiles: how many of them since `begin`, for a phase that had one by then.
    """

    def __init__(
        self, function_of: Callable[[Roles], PhaseFunction], denoiser: nn.Module, settings: CompileSettings
    ) -> None:
        self._function_of = function_of
        self._denoiser = denoiser
        self._settings = settings
        self._variants: dict[object, _Variant] = {}
        self._checked: dict[_Variant, object] = {}  # the form of the inputs its guards were last checked with
        self._trusted = False
        self._held = HeldWeights(denoiser)
        self._device = torch.device("cpu")
        self._replays = False
        self._compiled: set[Roles] = set()
        self._compiled_before: set[Roles] = set()
        self.graphs = 0
        self.recompiles = 0

    def describe(self) -> str:
        """The torch.compile settings in force."""
        return self._settings.describe(self._device)

    def begin(self, *, trusted: bool) -> None:
        """Begin a generation; ``trusted`` if nothing changes the denoiser between its steps."""
        self._trusted = trusted
        self._checked = {}
        self._compiled_before = set(self._compiled)
        self.recompiles = 0

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `tgate_fx.dispatch.Phases`."""
        inputs, form = canonical(inputs)
        form = (form, *map(id, cache), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        key = (step.roles, None if self._settings.dynamic else form)
        variant = self._variants.get(key)
        name, latents = first_input(inputs)
        layout = memory_format(latents) if variant is None else variant.layout
        inputs[name] = latents.contiguous(memory_format=layout)
        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if variant is not None and variant.unguarded is not None and self._checked.get(variant) == form:
            output, captured = variant.unguarded(cache, (), inputs)
        else:
            output, captured = self._guarded(step, cache, inputs, key, form)
        if self._replays:
            output = tree_map_only(torch.Tensor, torch.clone, output)
        return output, captured

    def _guarded(self, step: Step, cache: Cache, inputs: dict[str, Any], key: object, form: object) -> PhaseResult:
        """Run with every guard checked, compiling if need be."""
        latents = first_input(inputs)[1]
        self._device = latents.device
        self._replays = self._settings.replays(self._device)
        if not self._checked:  # the first step of a generation, or every one of a generation that is not trusted
            self._drop_stale()
        variant = self._variants.get(key) or self._new_variant(step, latents)
        before = variant.graphs
        try:
            result = variant(cache, inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # modules changed more often than one function may follow
            variant, before = self._new_variant(step, latents), 0
            result = variant(cache, inputs)
        self._variants[key] = variant
        if self._trusted:
            self._checked[variant] = form
        if variant.graphs > before:
            self._note_compilation(step.roles, variant.graphs - before)
        return result

    def _new_variant(self, step: Step, latents: torch.Tensor) -> _Variant:
        return _Variant(self._function_of(step.roles), step.phase, self._settings, latents, self._held)

    def _note_compilation(self, roles: Roles, graphs: int) -> None:
        self.graphs += graphs
        if roles in self._compiled_before:
            self.recompiles += graphs
        self._compiled.add(roles)

    def _drop_stale(self) -> None:
        """Forget graphs that hold weights which the denoiser no longer has."""
        if self._held.changed():
            self._variants = {}
            self._checked = {}
            self._held = HeldWeights(self._denoiser)


def _with_code(function: PhaseFunction, code: types.CodeType) -> PhaseFunction:
    """The same function with another code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
