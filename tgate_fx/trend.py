"""What is cached of a kind of site, in a straight line through the last two values that were computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cache import StaticCache
from .roles import Kind

# Beside a slot's own buffers: those of the value before, and those that a step reads.
_EARLIER, _READ = 2, 4


class Trend:
    """The last two captures of a kind of site, and what they say of the steps that follow.

    Along the steps, as in Linear-DeepCache and in Taylor expansions of first order (Liu et al., arXiv:2503.06923). Of
    other rows than before, as at the gate, there is one capture yet, which is held.

    Args:
        cache: where the captures are kept.
        kind: of site.
        slot: which call of its step captures them, from 0.
    """

    def __init__(self, cache: StaticCache, kind: Kind, slot: int) -> None:
        self._cache, self._kind, self._slot = cache, kind, slot
        self._indices: tuple[int, ...] = ()
        self._last: tuple[torch.Tensor, ...] = ()
        self._earlier: tuple[torch.Tensor, ...] = ()

    def keep(self, index: int, captured: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Copy what the step with this index captured into its buffers, and return these."""
        if self._last and [each.shape for each in self._last] == [each.shape for each in captured]:
            self._earlier = self._cache.keep(self._kind, self._last, self._slot + _EARLIER)
            self._indices = (self._indices[-1], index)
        else:
            self._indices = (index,)
        self._last = self._cache.keep(self._kind, captured, self._slot)
        return self._last

    def at(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return what is expected at the step with this index, always in the same buffers."""
        read = self._cache.keep(self._kind, self._last, self._slot + _READ)
        if len(self._indices) == 2:
            first, second = self._indices
            far = (index - first) / (second - first)
            for out, start, end in zip(read, self._earlier, self._last, strict=True):
                torch.lerp(start, end, far, out=out)
        return read
