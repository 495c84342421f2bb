"""Guidance as diffusers mostly writes it: one call of the denoiser on the batch [uncond, cond]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from .cache import StaticCache
from .errors import UnsupportedError
from .guidance import GuidanceForm
from .inputs import map_both, map_tensors
from .roles import Kind


class OneBatch(GuidanceForm):
    """Every batched input leads with [uncond, cond]; the output does too."""

    order: ClassVar[tuple[str, str]] = ("negative", "positive")

    def check(self, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See that both halves of the batch are the same latents, if one is cut off; see `GuidanceForm.check`."""
        if self._branch == "both":
            return
        rows = latents.shape[0]
        own = self._rows.own_latents(self._denoiser, latents)
        if rows % 2 or not torch.equal(own[: rows // 2], own[rows // 2 :]):
            raise UnsupportedError(
                f"Guidance is on, but the denoiser was given {rows} rows that are not the same latents twice: expected "
                "one batch of an unconditional and a conditional branch. This pipeline or loop guides in another way "
                "(separate calls, three chunks, a ControlNet in guess mode by hand); use it with gate_step=None or "
                "guidance off. Three chunks go on with after_gate='both'."
            )
        self.one_branch(dict(inputs), rows, gated=False)

    def check_complete(self) -> None:
        """Do nothing: both came in one call."""

    def rows_kept(self, rows: int) -> int:
        """Return half of them."""
        return rows // 2

    def one_branch(self, inputs: dict[str, Any], rows: int, *, gated: bool) -> dict[str, Any]:
        """Return that half of every batched input which has the branch."""
        return self._rows.half(inputs, rows, second=self._branch == self.order[1], gated=gated)

    def has_other_branch(self, guided: bool) -> bool:
        """Return whether the step is guided."""
        return guided

    def merge(
        self, cache: StaticCache, kind: Kind, captured: Sequence[torch.Tensor], first: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Keep a blend of both halves."""
        return cache.keep_blend(kind, [self._branches(tensor) for tensor in captured], self._weight)

    def pair(self, result: Any, first: Any) -> tuple[Any, Any]:
        """Return both halves."""
        conditional = map_tensors(lambda tensor: self._branches(tensor)[1], result)
        return conditional, map_tensors(lambda tensor: self._branches(tensor)[0], result)

    def give_back(self, output: Any, difference: Any) -> tuple[Any, ...]:
        """Return the output once for each branch, as one batch."""
        if difference is None:
            return (map_tensors(lambda tensor: torch.cat([tensor, tensor]), output),)
        return (map_both(lambda own, ahead: torch.cat(self._ordered(own - ahead, own)), output, difference),)

    def _branches(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the unconditional and the conditional half of a tensor."""
        first, second = self._ordered(*tensor.chunk(2))
        return first, second

    def _ordered(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
        return [first, second] if self.order[0] == "negative" else [second, first]


class ReversedBatch(OneBatch):
    """Every batched input leads with [cond, uncond]; the output does too."""

    order = ("positive", "negative")
