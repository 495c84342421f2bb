"""Steps at which the denoiser does not run: its output goes on in a straight line."""

from __future__ import annotations

from typing import Any

import torch

from .inputs import map_both, map_tensors


class Forecast:
    """The last two outputs that were computed after the gate, and what they say of the steps that follow.

    Along the steps, as Taylor expansions of first order do (Liu et al., arXiv:2503.06923, for features of a
    transformer); right after the gate there is one output yet, which is held.
    """

    def __init__(self) -> None:
        self._computed: list[tuple[int, Any]] = []

    def add(self, index: int, output: Any) -> None:
        """Note what the step with this index computed."""
        # A copy, for the pipeline may write to what it gets.
        self._computed = [*self._computed[-1:], (index, map_tensors(torch.clone, output))]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was computed yet."""
        return not self._computed

    @property
    def last(self) -> Any:
        """The output that was computed last."""
        return self._computed[-1][1]

    def at(self, index: int) -> Any:
        """Return the output that is expected of the step with this index."""
        if len(self._computed) == 1:
            return map_tensors(torch.clone, self.last)
        last_index, last = self._computed[-1]
        earlier_index, earlier = self._computed[0]
        far = (index - earlier_index) / (last_index - earlier_index)
        return map_both(lambda start, end: torch.lerp(start, end, far), earlier, last)
