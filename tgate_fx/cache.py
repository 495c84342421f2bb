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

    def keep(self, kind: Kind, captured: Sequence[torch.Tensor], *, merge: bool) -> tuple[torch.Tensor, ...]:
        """Copy captured tensors into their buffers, and return the buffers.

        Args:
            kind: which kind of site they come from; each has buffers of its own.
            captured: one tensor for each site, leading with the batch.
            merge: the batch is [uncond, cond], and the mean of the two is kept (T-GATE's rule: the cache is the average
                of the branches), so each buffer has half the rows.
        """
        shapes = [_kept_shape(tensor, merge) for tensor in captured]
        key = (kind, *[(shape, tensor.dtype, tensor.device) for shape, tensor in zip(shapes, captured, strict=True)])
        buffers = self._sets.get(key)
        if buffers is None:
            buffers = tuple([self._buffer(shape, tensor) for shape, tensor in zip(shapes, captured, strict=True)])
            self._sets[key] = buffers
        for buffer, tensor in zip(buffers, captured, strict=True):
            if merge:
                uncond, cond = tensor.chunk(2)
                torch.add(uncond, cond, out=buffer)
                buffer.div_(2)
            else:
                buffer.copy_(tensor)
        return buffers

    def buffers(self) -> list[torch.Tensor]:
        """Return all buffers, in the order in which they were allocated."""
        return list(itertools.chain.from_iterable(self._sets.values()))

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def _buffer(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        # Under inference mode a new tensor could only ever be written under inference mode again.
        with torch.inference_mode(False):
            buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        if self._needs_static_addresses(buffer.device):
            private.mark_static_address(buffer)
        return buffer


def _kept_shape(tensor: torch.Tensor, merge: bool) -> tuple[int, ...]:
    return (tensor.shape[0] // 2, *tensor.shape[1:]) if merge else tuple(tensor.shape)
