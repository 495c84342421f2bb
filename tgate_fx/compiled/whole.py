"""Compilation of whole phases: a graph for each phase and signature of its inputs, guards checked when due."""

from __future__ import annotations

from typing import Any

import torch

from .. import private
from ..errors import UnsupportedError
from ..inputs import canonical, latents_of, map_tensors, memory_format
from ..network import Network
from ..schedule import Step
from ..split import Cache, PhaseResult
from .frozen_weights import FrozenWeights
from .settings import CompileSettings
from .untraceable import check_stays, check_traceable
from .variant import CompiledPhases, Variant


class WholePhases(CompiledPhases):
    """Runs each phase through torch.compile.

    Guards are what torch.compile checks at every call, to see that a graph still fits the modules and inputs it was
    made for. Within one generation they are checked at a phase's first step, and after that only the signature of the
    inputs is. Where anything but known code may change the modules between two steps (`guard_policy`), they
    are checked at every step.

    Raises:
        UnsupportedError: no graph of this whole model serves latents of every size, as ``dynamic`` asks for.
    """

    def __init__(self, network: Network, settings: CompileSettings) -> None:
        super().__init__(network.module, settings)
        if settings.dynamic and network.family.sizes_are_numbers:
            raise UnsupportedError(
                f"dynamic=True was given for a {type(network.module).__name__}, which computes its position embeddings "
                "from the size as numbers, so that every size takes graphs of its own: expected a model without that. "
                "Add regional=True, under which the blocks serve all sizes, or leave dynamic out."
            )
        self._network = network
        self._checked: dict[Variant, object] = {}  # the signature of the inputs its guards were last checked with
        self._weights = FrozenWeights(network.module)
        self._uses_cuda_graphs = False

    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Begin a generation; see `Phases`."""
        super().begin(pipe, pipeline_class, calls_back=calls_back)
        check_traceable(f"pipe.{self._network.attribute}", self._network.module, self._network.dispatch)
        private.settle_cache_hooks(self._network.module)
        self._checked = {}
        self._weights.begin()

    def _run(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        inputs, signature = canonical(inputs)
        signature = (signature, *map(id, cache), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        key = (step.roles, None if self._settings.dynamic else signature)
        variant = self._variants.get(key)
        name, latents = latents_of(inputs)
        layout = memory_format(latents) if variant is None else variant.layout
        inputs[name] = latents.contiguous(memory_format=layout)
        if self._uses_cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if variant is not None and variant.unguarded is not None and self._checked.get(variant) == signature:
            output, captured = variant.unguarded(cache, (), inputs)
        else:
            output, captured = self._run_checked(step, cache, inputs, key, signature, inputs[name])
        if self._uses_cuda_graphs:
            output = map_tensors(torch.clone, output)
        return output, captured

    def _run_checked(
        self,
        step: Step,
        cache: Cache,
        inputs: dict[str, Any],
        key: object,
        signature: object,
        latents: torch.Tensor,
    ) -> PhaseResult:
        """Run with every guard checked, compiling if need be."""
        self._device = latents.device
        self._uses_cuda_graphs = self._settings.uses_cuda_graphs(self._device)
        if self._uses_cuda_graphs:
            check_stays(f"pipe.{self._network.attribute}", self._network.module, self.describe())
        if not self._checked:  # the first step of a generation, or every one if guards are checked at every one
            self._drop_stale()

        def new_variant() -> Variant:
            function = self._network.function(step.roles)
            variant = Variant(function, f"{step.phase} phase", self._settings, self._device, self._weights)
            variant.layout = memory_format(latents)
            return variant

        variant, result = self._call_variant(key, step, new_variant, (cache, (), inputs))
        if not self._changes:
            self._checked[variant] = signature
        phase_result: PhaseResult = result
        return phase_result

    def _drop_stale(self) -> None:
        """Forget graphs that hold weights which the denoiser no longer has."""
        if self._weights.changed():
            self._variants = {}
            self._checked = {}
            self._weights = FrozenWeights(self._network.module)
