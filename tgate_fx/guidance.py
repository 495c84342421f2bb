"""Classifier-free guidance as a denoiser sees it: the contract of how its branches arrive."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .cache import StaticCache
from .roles import Kind
from .rows import Rows

_UNKNOWN = object()  # before the first call


class GuidanceForm(abc.ABC):
    """How the branches of guidance reach a network: seen from one generation, call by call.

    Args:
        denoiser: the network's module.
        rows: which of its inputs follow the batch.
        branch: which branch goes on after the gate: "negative", "positive" or "both".
        weight: of the conditional branch in what is cached of both.

    Attributes:
        calls: how many calls a step may have.
        branches: which branches may go on after the gate alone.
    """

    calls: ClassVar[int] = 1
    branches: ClassVar[tuple[str, ...]] = ("negative", "positive")

    def __init__(self, denoiser: nn.Module, rows: Rows, branch: str, weight: float) -> None:
        self._denoiser = denoiser
        self._rows = rows
        self._branch = branch
        self._weight = weight
        self._timestep: object = _UNKNOWN
        self._call = 0

    def place(self, inputs: Mapping[str, Any], guided: bool) -> int:
        """Return which call of its step this is, from 0; ask once for each call.

        Calls of one step are given the very same tensor as their timestep.

        Args:
            inputs: the denoiser's inputs by name.
            guided: whether the pipeline guides now.
        """
        timestep = inputs.get("timestep")
        repeated = timestep is self._timestep and isinstance(timestep, torch.Tensor)
        self._timestep = timestep
        self._call = self._call + 1 if repeated else 0
        return self._call

    @abc.abstractmethod
    def check(self, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See, at each call of the first step of a guided generation, that the branches do arrive in this way.

        Raises:
            UnsupportedError: they do not, or the branch that goes on cannot be cut out of every input.
        """

    @abc.abstractmethod
    def check_complete(self) -> None:
        """See, when the step after the first one of a guided generation begins, that every branch came.

        Raises:
            UnsupportedError: one did not.
        """

    @abc.abstractmethod
    def rows_kept(self, rows: int) -> int:
        """Return how many of a call's rows belong to the branch that goes on."""

    @abc.abstractmethod
    def one_branch(self, inputs: dict[str, Any], rows: int, *, gated: bool) -> dict[str, Any]:
        """Return the inputs of the branch that goes on.

        Args:
            inputs: the denoiser's inputs by name, as the first call of a step has them.
            rows: the rows of that call.
            gated: whether its cross-attention is cached.

        Raises:
            UnsupportedError: a tensor of which it is not known how its rows follow the batch.
        """

    @abc.abstractmethod
    def has_other_branch(self, guided: bool) -> bool:
        """Return whether this call, of a step that is guided or not, has a branch that does not go on."""

    @abc.abstractmethod
    def merge(
        self, cache: StaticCache, kind: Kind, captured: Sequence[torch.Tensor], first: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Keep what such a call captured, blended of both branches, their mean in T-GATE's cache; return the buffers.

        Args:
            cache: where to keep it.
            kind: which kind of site it comes from.
            captured: one tensor for each site.
            first: the buffers of what the first call of the step captured, if this is not the first.

        Raises:
            UnsupportedError: the branches differ in shape.
        """

    @abc.abstractmethod
    def pair(self, result: Any, first: Any) -> tuple[Any, Any]:
        """Return what the conditional branch gave and what the other one did, after such a call, before it is merged.

        Args:
            result: the output of this call, or what it captured.
            first: the same of the first call of the step, which may be this one.
        """

    @abc.abstractmethod
    def give_back(self, output: Any, difference: Any) -> tuple[Any, ...]:
        """Return what each of the step's calls gets for the output of the branch that goes on.

        Args:
            output: of that branch.
            difference: by how much it is ahead of the other branch; None if that gets the same, so that guidance over
                both gives back just that.
        """
