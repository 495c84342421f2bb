"""torch.compile for the phases: choices for each device, a graph for each phase and input form, guards when due."""

from __future__ import annotations

import itertools
import operator
import re
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .errors import CompileError
from .families import first_input
from .forms import canonical, memory_format
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


class PrunedBackend:
    """A torch.compile backend, handed graphs without dead code and without the inputs that only dead code used.

    So the post-gate graph has neither the text nor any parameter that only the text went through (PixArt's caption
    projection), which Dynamo leaves in.
    """

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self._backend = backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile ``graph``; ``kwargs`` are the mode and options that torch.compile was given."""
        graph.graph.eliminate_dead_code(is_impure_node=_has_effect)
        placeholders = graph.graph.find_nodes(op="placeholder")
        used = [bool(node.users) for node in placeholders]
        for node, keep in zip(placeholders, used, strict=True):
            if not keep:
                graph.graph.erase_node(node)
        graph.recompile()
        compiled = self._compile(graph, list(itertools.compress(inputs, used)), kwargs)
        count = sum(used)

        def run(*args: Any) -> Any:
            # Dynamo passes what the graph has left when this returns; should it pass all that it began with, choose.
            return compiled(*args) if len(args) == count else compiled(*itertools.compress(args, used))

        return run

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if self._backend == "inductor":
            # Inductor itself takes no mode: torch.compile turns it into options, but not for a backend like this one.
            mode = torch._inductor.list_mode_options(kwargs["mode"]) if "mode" in kwargs else {}
            kwargs = {"config_patches": {**mode, **kwargs.get("options", {})}}
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(graph, inputs, **kwargs)
        return compiled


# iadd, imul, ... as methods (__iadd__) and as functions of the operator module, and item assignment.
_IN_PLACE = {name.strip("_") for name in dir(operator) if name.startswith("__i")} | {"setitem"}


def _has_effect(node: torch.fx.Node) -> bool:
    """Whether a node does more than compute its value: Dynamo's graphs may still write in place."""
    if node.op in ("call_method", "call_function"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        writes = name.strip("_") in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if writes or "out" in node.kwargs or node.kwargs.get("inplace"):
            return True
    return bool(node.is_impure())


class _Variant:
    """One compiled function: a phase for one form of its inputs, with a code object of its own.

    torch.compile keeps its graphs, and counts them against its recompile limit, by code object: phases, shapes and
    pipelines that shared one would use up each other's share.
    """

    def __init__(self, function: PhaseFunction, phase: str, settings: CompileSettings, latents: torch.Tensor) -> None:
        code = function.__code__.replace(co_name=re.sub(r"\W+", "_", phase))
        self._phase = phase
        self._function = _with_code(function, code)
        self._compiled = torch.compile(
            self._function,
            backend=PrunedBackend(settings.backend),
            mode=settings.mode,
            options=settings.options_for(latents.device),
            dynamic=bool(settings.dynamic),
            fullgraph=True,
        )
        self._freezes = settings.freezes(latents.device)
        self.layout = memory_format(latents)
        self.graphs = 0
        self.unguarded: PhaseFunction | None = None

    def __call__(self, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run with every guard checked, compiling if need be."""
        # Dynamo looks at inductor's own setting, not at the options, to keep weights out of the graph's inputs.
        frozen = torch._inductor.config.patch(freezing=True) if self._freezes else nullcontext()
        try:
            with frozen:
                result: PhaseResult = self._compiled(cache, (), inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
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

    @property
    def full(self) -> bool:
        """Whether torch.compile would refuse to compile this function once more."""
        return self.graphs >= torch._dynamo.config.recompile_limit


class CompiledPhases:
    """Runs each phase through torch.compile.

    Guards are what torch.compile checks at every call, to see that a graph still fits the modules and inputs it was
    made for. Within one generation they are checked at a phase's first step, and after that only the form of the inputs
    is. Where a callback of the user's may change the modules between two steps, they are checked at every step. What
    else changes modules between two steps of a generation is not noticed: hooks on the denoiser, a pipeline's own loop,
    an attention processor that counts its calls.

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
        self._frozen_weights: object = None
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
        """Begin a generation; ``trusted`` if no callback of the user's runs between its steps."""
        self._trusted = trusted
        self._checked = {}
        self._compiled_before = set(self._compiled)
        self.recompiles = 0
        self._drop_stale()

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
        if not self._trusted:
            self._drop_stale()
        variant = self._variants.get(key)
        if variant is None or variant.full:
            variant = _Variant(self._function_of(step.roles), step.phase, self._settings, latents)
        before = variant.graphs
        result = variant(cache, inputs)
        self._variants[key] = variant
        if self._trusted:
            self._checked[variant] = form
        if variant.graphs > before:
            self._note_compilation(step.roles, variant.graphs - before)
        return result

    def _note_compilation(self, roles: Roles, graphs: int) -> None:
        self.graphs += graphs
        if roles in self._compiled_before:
            self.recompiles += graphs
        self._compiled.add(roles)
        if self._frozen_weights is None and self._settings.freezes(self._device):
            self._frozen_weights = fingerprint(self._denoiser)

    def _drop_stale(self) -> None:
        """Forget graphs that hold weights which the denoiser no longer has."""
        if self._frozen_weights is not None and fingerprint(self._denoiser) != self._frozen_weights:
            self._variants = {}
            self._checked = {}
            self._frozen_weights = None


def fingerprint(module: nn.Module) -> tuple[object, ...]:
    """Something that changes when a weight of ``module`` is replaced, moved or written to.

    In-place writes through ``.data`` leave no trace on the tensor (LoRA fusing writes so), hence eight values of every
    weight are part of it: such a write is seen if it changes one of these.
    """
    marks: list[object] = []
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        version = None if tensor.is_inference() else tensor._version
        marks.append((id(tensor), tensor.data_ptr(), version))
        if tensor.numel() and not tensor.is_meta:
            stride = max(1, tensor.numel() // 8)
            count = (tensor.numel() - 1) // stride + 1
            # Over the storage, not the indices: a dense weight of any memory layout is read without a copy.
            sample = torch.as_strided(tensor.detach(), (count,), (stride,), tensor.storage_offset())
            marks.append(tuple(sample.tolist()))
    return tuple(marks)


def _with_code(function: PhaseFunction, code: types.CodeType) -> PhaseFunction:
    """The same function with another code object."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
