"""The cache: captured tensors in buffers that are allocated once per shape and never move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from . import private
from .roles import Kind


class StaticCache:
    """Buffers for what a phase captures, one set for each combination of shapes, dtypes and devices.

    A CUDA-graph replay overwrites the outputs of the replay before it, so a captured tensor must be copied out of the
    graph before the next call; and it re-records if an input's address moves, so the copy must always land in the same
    place. Both hold here on every device.

    Args:
        needs_static_addresses: whether graphs on a device read their caches in place, as CUDA graphs do: then addresses
            are marked.
    """

    def __init__(self, needs_static_addresses: Callable[[torch.device], bool]) -> None:
        self._needs_static_addresses = needs_static_addresses
        self._sets: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    @torch.no_grad()
    def keep(self, kind: Kind, captured: Sequence[torch.Tensor], slot: int = 0) -> tuple[torch.Tensor, ...]:
        """Copy captured tensors into their buffers, and return the buffers.

        Args:
            kind: which kind of site they come from; each has buffers of its own.
            captured: one tensor for each site, leading with the batch.
            slot: which call of its step captured them, from 0; each has buffers of its own too.
        """
        buffers = self._set(kind, slot, captured, [tensor.shape for tensor in captured])
        for buffer, tensor in zip(buffers, captured, strict=True):
            buffer.copy_(tensor)
        return buffers

    def keep_blend(
        self, kind: Kind, branches: Sequence[tuple[torch.Tensor, torch.Tensor]], weight: float
    ) -> tuple[torch.Tensor, ...]:
        """Copy what lies between the unconditional and the conditional branch's tensors into buffers; return these."""
        first = [unconditional for unconditional, _ in branches]
        buffers = self._set(kind, 0, first, [tensor.shape for tensor in first])
        for buffer, (unconditional, conditional) in zip(buffers, branches, strict=True):
            blend(unconditional, conditional, weight, buffer)
        return buffers

    def _set(
        self, kind: Kind, slot: int, captured: Sequence[torch.Tensor], shapes: Sequence[torch.Size]
    ) -> tuple[torch.Tensor, ...]:
        key = _key(kind, slot, captured, shapes)
        buffers = self._sets.get(key)
        if buffers is None:
            buffers = tuple([self._buffer(shape, tensor) for shape, tensor in zip(shapes, captured, strict=True)])
            self._sets[key] = buffers
        return buffers

    def buffers(self) -> list[torch.Tensor]:
        """Return all buffers, in the order in which they were allocated."""
        return list(itertools.chain.from_iterable(self._sets.values()))

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _buffer(self, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
        # Under inference mode a new tensor could only ever be written under inference mode again.
        with torch.inference_mode(False):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        if self._needs_static_addresses(buffer.device):
            private.mark_static_address(buffer)
        return buffer


@torch.no_grad()
def blend(unconditional: torch.Tensor, conditional: torch.Tensor, weight: float, out: torch.Tensor) -> None:
    """Write into ``out`` what lies between both branches, at this weight of the conditional one."""
    if weight == 0.5:  # upstream's mean, bit for bit
        torch.add(unconditional, conditional, out=out).div_(2)
    else:
        torch.lerp(unconditional, conditional, weight, out=out)


def _key(kind: Kind, slot: int, captured: Sequence[torch.Tensor], shapes: Sequence[torch.Size]) -> tuple[object, ...]:
    return (kind, slot, *[(shape, each.dtype, each.device) for shape, each in zip(shapes, captured, strict=True)])
