"""torch.compile for the phases: a graph for each phase and input form, guards checked when due."""

from __future__ import annotations

import re
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
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
from .settings import CompileSettings
from .sites import Roles
from .split import Cache, PhaseFunction, PhaseResult


class Variant:
    """One compiled function, such as a phase for one form of its inputs, with a code object of its own.

    torch.compile keeps its graphs, and counts them against its recompile limit, by code object: phases, shapes and
    pipelines that shared one would use up each other's share.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        settings: CompileSettings,
        device: torch.device,
        held: HeldWeights | None = None,
        guard_filter: Callable[[Any], list[bool]] | None = None,
    ) -> None:
        code = function.__code__.replace(co_name=re.sub(r"\W+", "_", name))
        self._name = name
        freezes = settings.freezes(device)
        self._held = held if freezes else None  # the backend knows it, but does not keep it
        # Dynamo looks at inductor's own setting, not at the options, to keep weights out of the graph's inputs.
        self._frozen = torch._inductor.config.patch(freezing=True) if freezes else nullcontext()
        # Without this, hooks that are registered on modules later would not be noticed. (Every patch object that torch
        # makes takes memory for good, so there is one for all calls.)
        self._with_hook_guards = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
        # Else sizes that are equal when a graph is made would have to be equal for good.
        sizes: Any = torch.fx.experimental._config
        self._sizes = sizes.patch(use_duck_shape=False) if settings.dynamic else nullcontext()
        self._function = _with_code(function, code)
        # Else Dynamo would keep the graphs for as long as the modules live, though nothing calls the code any more.
        weakref.finalize(self, torch._C._dynamo.eval_frame.reset_code, code).atexit = False
        options = settings.options_for(device)
        if guard_filter is not None:
            options = {**(options or {}), "guard_filter_fn": guard_filter}
        self._compiled = torch.compile(
            self._function,
            backend=PrunedBackend(settings.backend, self._held),
            mode=settings.mode,
            options=options,
            dynamic=bool(settings.dynamic),
            fullgraph=True,
        )
        self.layout = torch.contiguous_format
        self.graphs = 0
        self.unguarded: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run with every guard checked, compiling if need be."""
        try:
            with self._frozen, self._with_hook_guards, self._sizes:
                result = self._compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            refused = getattr(error, "inner_exception", None)
            if isinstance(refused, TGateError):
                raise refused from None
            raise CompileError(
                f"The {self._name} could not be compiled as one graph: {error}\n"
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


class Compiled:
    """The functions that are compiled for a pipeline, and how many graphs they have.

    Attributes:
        graphs: how many there were so far.
        recompiles: how many of them in this generation, for a phase that had one before it.
    """

    def __init__(self, settings: CompileSettings) -> None:
        self._settings = settings
        self._variants: dict[object, Variant] = {}
        self._device = torch.device("cpu")
        self._compiled: set[Roles] = set()
        self._compiled_before: set[Roles] = set()
        self.graphs = 0
        self.recompiles = 0

    def describe(self) -> str:
        """The torch.compile settings in force."""
        return self._settings.describe(self._device)

    def begin(self, *, trusted: bool) -> None:
        """Begin a generation; ``trusted`` if nothing changes the denoiser between its steps."""
        self._compiled_before = set(self._compiled)
        self.recompiles = 0

    def _run_guarded(
        self, key: object, step: Step, new_variant: Callable[[], Variant], args: tuple[Any, ...]
    ) -> tuple[Variant, Any]:
        """Run the function that there is under this key with every guard checked, compiling if need be."""
        variant = self._variants.get(key) or new_variant()
        before = variant.graphs
        try:
            result = variant(*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit:  # modules changed more often than one function may follow
            variant, before = new_variant(), 0
            result = variant(*args)
        self._variants[key] = variant
        compiled = variant.graphs - before
        if compiled > 0:
            self.graphs += compiled
            if step.roles in self._compiled_before:
                self.recompiles += compiled
            self._compiled.add(step.roles)
        return variant, result


class CompiledPhases(Compiled):
    """Runs each phase through torch.compile.

    Guards are what torch.compile checks at every call, to see that a graph still fits the modules and inputs it was
    made for. Within one generation they are checked at a phase's first step, and after that only the form of the inputs
    is. Where anything but known code may change the modules between two steps (`tgate_fx.trust`), they are checked at
    every step.
    """

    def __init__(
        self, function_of: Callable[[Roles], PhaseFunction], denoiser: nn.Module, settings: CompileSettings
    ) -> None:
        super().__init__(settings)
        self._function_of = function_of
        self._denoiser = denoiser
        self._checked: dict[Variant, object] = {}  # the form of the inputs its guards were last checked with
        self._trusted = False
        self._held = HeldWeights(denoiser)
        self._replays = False

    def begin(self, *, trusted: bool) -> None:
        """Begin a generation; ``trusted`` if nothing changes the denoiser between its steps."""
        super().begin(trusted=trusted)
        self._trusted = trusted
        self._checked = {}
        self._held.begin()

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

        def new_variant() -> Variant:
            function = self._function_of(step.roles)
            variant = Variant(function, f"{step.phase} phase", self._settings, self._device, self._held)
            variant.layout = memory_format(latents)
            return variant

        variant, result = self._run_guarded(key, step, new_variant, (cache, (), inputs))
        if self._trusted:
            self._checked[variant] = form
        phase_result: PhaseResult = result
        return phase_result

    def _drop_stale(self) -> None:
        """Forget graphs that hold weights which the denoiser no longer has."""
        if self._held.changed():
            self._variants = {}
            self._checked = {}
            self._held = HeldWeights(self._denoiser)


def _with_code(function: Callable[..., Any], code: types.CodeType) -> Callable[..., Any]:
    """The same function with another code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
