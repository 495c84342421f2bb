"""The weights that compiled graphs hold copies of, and whether the denoiser's are still the same."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from .errors import UnsupportedError

_GLANCE = 2**13  # elements


class _Mark(NamedTuple):
    """What is known of a held tensor: its place and form, and the checksums of all its bits and of the first ones."""

    tensor: weakref.ref[torch.Tensor]
    form: tuple[object, ...]
    bits: int
    first_bits: int

    def fits(self, *, at_a_glance: bool) -> bool:
        tensor = self.tensor()
        if tensor is None or _form(tensor) != self.form:
            return False
        if at_a_glance:
            return _first_bits(tensor) == self.first_bits
        return checksum(tensor.detach()) == self.bits


class HeldWeights:
    """What the frozen graphs of one denoiser were compiled with.

    In-place writes through ``.data`` leave no trace on a tensor (LoRA fusing writes so), hence the bits of every held
    tensor are read; for Stable Diffusion 1.5 that takes 0.2 to 0.3 s on two cores.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._listed: list[int] = []
        self._marks: dict[int, _Mark] = {}
        self._read = False

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note what a graph is about to be compiled with.

        Raises:
            UnsupportedError: a tensor cannot be read, so that changes to it would go unnoticed.
        """
        new = {id(tensor): _mark(tensor) for tensor in tensors if id(tensor) not in self._marks}
        if not self._marks:
            self._listed = _listed(self._denoiser)
        self._marks |= new

    def begin(self) -> None:
        """Begin a generation, in which the weights are to be read whole once."""
        self._read = False

    def changed(self) -> bool:
        """Whether a held tensor was replaced, moved or written to since.

        After the first time in a generation, only the first elements of each are read, in a few milliseconds: what
        rewrites a weight as a whole is seen, even past its version counter.
        """
        at_a_glance, self._read = self._read, True
        if not self._marks:
            return False
        marks = self._marks.values()
        return self._listed != _listed(self._denoiser) or not all(mark.fits(at_a_glance=at_a_glance) for mark in marks)


def _listed(denoiser: nn.Module) -> list[int]:
    return [id(tensor) for tensor in itertools.chain(denoiser.parameters(), denoiser.buffers())]


def _mark(tensor: torch.Tensor) -> _Mark:
    # A quantized or compressed weight, which is a subclass or has another layout, need not have bits to read.
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnsupportedError(
            f"A weight of type {type(tensor).__name__}, {tensor.layout}, {tensor.dtype} cannot be read: expected "
            "dense weights, for changes to those that a frozen graph holds would go unnoticed. Give "
            'options={"freezing": False} to tgate_fx.compile.'
        )
    return _Mark(weakref.ref(tensor), _form(tensor), checksum(tensor.detach()), _first_bits(tensor))


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.shape, tensor.stride()


def _first_bits(tensor: torch.Tensor) -> int:
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return checksum(tensor.view(-1)[:_GLANCE])
    return checksum(tensor[:1])


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_ROW = 1021  # a prime: what repeats in a weight falls on another multiplier in every row
# Odd ones lose no bit of a word: whatever changes in one word changes the sum.
_MULTIPLIERS = torch.randint(-(2**62), 2**62, (_ROW * 4,), generator=torch.Generator().manual_seed(0)) | 1


def checksum(tensor: torch.Tensor) -> int:
    """A checksum of a tensor's bits that depends on their order; computed where the tensor is, in one pass."""
    if tensor.is_meta or tensor.numel() == 0:
        return 0
    words = _words(tensor)
    multipliers = _MULTIPLIERS.to(words.device)
    while words.numel() > len(multipliers):
        rows = words[: words.numel() // _ROW * _ROW].view(-1, _ROW)
        rest = words[rows.numel() :]
        words = torch.cat([_weighted(rows, multipliers[:_ROW]), rest])
    # Sums are modulo 2**64, in which the highest bits would only count as odd or even: bring them down first.
    mixed = words ^ (words >> 31)
    return int(_weighted(mixed[None], multipliers[: mixed.numel()]))


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as 64-bit integers, copied only where a weight is not dense or not aligned."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels-last: dense in this order
    flat = tensor.reshape(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(_INTEGERS[size]).long()


def _weighted(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each row: [rows]."""
    if rows.device.type == "cpu":
        return torch.mv(rows, multipliers)
    return (rows * multipliers).sum(1)  # accelerators do not multiply matrices of integers
