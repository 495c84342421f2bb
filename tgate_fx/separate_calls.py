"""Guidance as diffusers writes it for most videos: two calls of the denoiser a step, the conditional branch first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .cache import StaticCache, blend
from .errors import UnsupportedError
from .guidance import GuidanceForm
from .inputs import map_both, map_tensors
from .roles import Kind


class SeparateCalls(GuidanceForm):
    """The first call of a step has the conditional branch, the second, if there is one, the unconditional one.

    The conditional branch goes on, since its inputs come first. The second call of a gated step is answered with the
    first one's output: guidance over two equal predictions gives back exactly that.
    """

    calls = 2
    branches = ("positive",)
    _latents: torch.Tensor | None = None
    _conditioned: torch.Tensor | None = None  # by the first call's inputs

    def check(self, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See that both calls have the same latents; see `GuidanceForm.check`."""
        if self._call == 0:
            self._latents = latents.clone()  # Kandinsky 5 writes each step's latents over the last one's
            self._conditioned = inputs.get(self._rows.conditioned or "")
            return
        first, self._latents = self._latents, None
        if first is None or not self._same(first, latents):
            raise UnsupportedError(
                "Guidance is on, and the denoiser was called twice in a step, but with other latents: expected one "
                "call for each branch with the same latents. Use gate_step=None, or guidance off."
            )

    def _same(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        own = [self._rows.own_latents(self._denoiser, latents) for latents in (first, second)]
        if self._conditioned is not None:
            own = [torch.where(self._conditioned == 0, latents, 0) for latents in own]
        return torch.equal(*own)

    def check_complete(self) -> None:
        """See that there was a second call; see `GuidanceForm.check_complete`."""
        if self._latents is not None and self._branch != "both":
            raise UnsupportedError(
                f"Guidance is on, but the {type(self._denoiser).__name__} was called once in the first step: expected "
                "one call for each branch. Use gate_step=None, or guidance off."
            )

    def rows_kept(self, rows: int) -> int:
        """Return all of them."""
        return rows

    def one_branch(self, inputs: dict[str, Any], rows: int, *, gated: bool) -> dict[str, Any]:
        """Return the same inputs."""
        return inputs

    def has_other_branch(self, guided: bool) -> bool:
        """Return whether this is the second call of its step."""
        return self._call > 0

    def merge(
        self, cache: StaticCache, kind: Kind, captured: Sequence[torch.Tensor], first: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Replace what is kept of the first call by its blend with these."""
        for buffer, tensor in zip(first, captured, strict=True):
            if buffer.shape != tensor.shape:
                raise UnsupportedError(
                    f"A {kind.title} output has shape {list(buffer.shape)} in one guidance branch and "
                    f"{list(tensor.shape)} in the other: expected the same. Use gate_step=None, or guidance off."
                )
            blend(tensor, buffer, self._weight, buffer)
        return first

    def pair(self, result: Any, first: Any) -> tuple[Any, Any]:
        """Return the first call's and this one's."""
        return first, result

    def give_back(self, output: Any, difference: Any) -> tuple[Any, ...]:
        """Return the output for the first call, and for the second one, each to write to as one likes."""
        other = map_tensors(torch.clone, output) if difference is None else map_both(torch.sub, output, difference)
        return output, other


class PairedCalls(SeparateCalls):
    """Separate calls each of which may have a timestep tensor of its own: every guided step has two calls."""

    _second_is_next = False

    def place(self, inputs: Mapping[str, Any], guided: bool) -> int:
        """Return which call of its step this is; see `GuidanceForm.place`."""
        self._call = int(self._second_is_next)
        self._second_is_next = guided and self._call == 0
        return self._call
