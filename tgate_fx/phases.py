"""What runs a step: the contract, and the eager runner. The compiled runners have files of their own."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch

from .errors import StateError
from .inputs import canonical, on_meta
from .network import Network
from .roles import Roles
from .schedule import Step
from .split import EMPTY_CACHE, Cache, PhaseResult

_FREE = nullcontext()


class Phases(abc.ABC):
    """Runs a denoiser's steps, each in its phase.

    Attributes:
        is_compiled: whether steps run compiled code.
        graphs: how many graphs were compiled so far.
        recompiles: how many of them in this generation, for a phase that had one before it.
    """

    is_compiled: ClassVar[bool]
    graphs: int = 0
    recompiles: int = 0

    @abc.abstractmethod
    def describe(self) -> str:
        """Return how the phases run, in words for the report."""

    def uses_cuda_graphs(self, device: torch.device) -> bool:
        """Return whether steps on this device may be CUDA-graph replays: not if nothing is recorded when it runs."""
        return False

    def needs_static_addresses(self, device: torch.device) -> bool:
        """Return whether steps on this device read their cache in place, where it was when they were recorded."""
        return False

    def turns(self, device: torch.device) -> AbstractContextManager[object]:
        """Return what is held from when a step runs on this device until what it gave was copied."""
        return _FREE

    @abc.abstractmethod
    def inductor_options(self, device: torch.device) -> dict[str, Any] | None:
        """Return the options with which inductor compiles these phases ahead of time, for `tgate_fx.save`.

        None if they need torch.compile when they run, whose caches can be kept.

        Raises:
            StateError, UnsupportedError: nothing of them can be kept.
        """

    def attach(self) -> None:  # noqa: B027  (most need nothing there)
        """Put on the denoiser's modules what this needs there, right after its sites; they come off together."""

    @abc.abstractmethod
    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Begin a generation.

        Args:
            pipe: the pipeline.
            pipeline_class: its class before it was gated.
            calls_back: whether a callback of the user's runs between steps.

        Raises:
            UnsupportedError: something on the denoiser would be ignored.
        """

    def end(self) -> None:  # noqa: B027  (most need nothing there)
        """End a generation, even one that failed."""

    def detach(self) -> None:  # noqa: B027  (most need nothing there)
        """Take back what this changed on the denoiser's modules; what `attach` put there comes off with the sites."""

    @abc.abstractmethod
    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step.

        Args:
            step: which it is.
            cache: for each kind of site that is REUSE, its cached tensors.
            inputs: the denoiser's, by name.

        Returns:
            The denoiser's output, and what was captured of each kind of site.
        """


class EagerPhases(Phases):
    """Runs each phase as it is, without compiling; captures only at the steps whose values are kept."""

    is_compiled = False

    def __init__(self, network: Network) -> None:
        self._network = network

    def describe(self) -> str:
        """Return that they run eagerly."""
        return "eager"

    def inductor_options(self, device: torch.device) -> dict[str, Any] | None:
        """Raise `StateError`: there are none."""
        raise StateError("The pipeline is not compiled: expected one given to tgate_fx.compile.")

    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Do nothing: what is on the modules when a step runs is what it runs."""

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `Phases`."""
        if not any(cache) and not any(step.keep):
            return self._network.dispatch.original_forward(**inputs), EMPTY_CACHE
        return self._network.function(step.roles)(cache, (), inputs)


class Example(NamedTuple):
    """How a phase was run, with every tensor on the meta device: its shape and dtype without its contents.

    Attributes:
        name: the phase's name in the report.
        roles: what the sites did.
        cache: what was given for the sites that were REUSE.
        inputs: the denoiser's, as graphs are compiled for them.
    """

    name: str
    roles: Roles
    cache: Cache
    inputs: dict[str, Any]


def example(step: Step, cache: Cache, inputs: Mapping[str, Any]) -> Example:
    """Return the example that one step makes."""
    return Example(step.phase, step.roles, *on_meta((cache, canonical(inputs)[0])))
