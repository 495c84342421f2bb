"""The weights that are part of frozen graphs, and whether the denoiser's are still the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from .. import private
from ..errors import UnsupportedError
from .checksum import checksum

_GLANCE = 2**13  # elements


class _Mark(NamedTuple):
    """What is known of a weight: its address and layout, and the checksums of all its bits and of the first ones."""

    tensor: weakref.ref[torch.Tensor]
    layout: tuple[object, ...]
    bits: int
    first_bits: int

    def matches(self, *, at_a_glance: bool) -> bool:
        """Return whether the weight is what it was; ``at_a_glance`` to read its first elements only."""
        tensor = self.tensor()
        if tensor is None or _layout(tensor) != self.layout:
            return False
        if at_a_glance:
            return _first_bits(tensor) == self.first_bits
        return checksum(tensor.detach()) == self.bits


class FrozenWeights:
    """The weights that the frozen graphs of one denoiser were compiled with.

    In-place writes through ``.data`` leave no trace on a tensor (LoRA fusing writes so), hence the bits of every weight
    are read; for Stable Diffusion 1.5 that takes 0.2 to 0.3 s on two cores.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._listed: list[int] = []
        self._marks: dict[int, _Mark] = {}
        self._read = False
        self._differs = False  # whether two graphs hold different values of a weight

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note the weights that a graph is about to be compiled with.

        Raises:
            UnsupportedError: a tensor cannot be read, so that changes to it would go unnoticed.
        """
        new = {id(tensor): _mark(tensor) for tensor in tensors}
        # An earlier graph holds what it was then, though it may be that again when it is looked at next.
        self._differs |= any(mark.bits != self._marks[name].bits for name, mark in new.items() if name in self._marks)
        if not self._marks:
            self._listed = _listed(self._denoiser)
        self._marks |= new

    def begin(self) -> None:
        """Begin a generation, in which the weights are to be read whole once."""
        self._read = False

    def changed(self) -> bool:
        """Return whether a weight was replaced, moved or written to since.

        After the first time in a generation, only the first elements of each are read, in a few milliseconds: what
        rewrites a weight as a whole is seen, even past its version counter.
        """
        at_a_glance, self._read = self._read, True
        if not self._marks:
            return False
        if self._differs:
            return True
        marks = self._marks.values()
        return self._listed != _listed(self._denoiser) or not all(
            mark.matches(at_a_glance=at_a_glance) for mark in marks
        )


def _listed(denoiser: nn.Module) -> list[int]:
    return [id(tensor) for tensor in itertools.chain(denoiser.parameters(), denoiser.buffers())]


def can_be_read(tensor: torch.Tensor) -> bool:
    """Return whether a weight has bits to read: one that is quantized or compressed, a subclass of tensors, may not."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter)
    return is_plain and tensor.layout is torch.strided and not tensor.is_quantized


def _mark(tensor: torch.Tensor) -> _Mark:
    if not can_be_read(tensor):
        raise UnsupportedError(
            f"A weight of type {type(tensor).__name__}, {tensor.layout}, {tensor.dtype} cannot be read: expected "
            "dense weights, since changes to those that a frozen graph holds would go unnoticed. Give "
            'options={"freezing": False} to tgate_fx.compile.'
        )
    return _Mark(weakref.ref(tensor), _layout(tensor), checksum(tensor.detach()), _first_bits(tensor))


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    # Of a few elements all are read each time, and LoRA layers have scales that are written to at every step.
    version = None if tensor.is_contiguous() and tensor.numel() <= _GLANCE else private.version_of(tensor)
    return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _first_bits(tensor: torch.Tensor) -> int:
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return checksum(tensor.view(-1)[:_GLANCE])
    return checksum(tensor[:1])
