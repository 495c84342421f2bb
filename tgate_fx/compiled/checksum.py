"""A checksum of a tensor's bits, computed where the tensor is.

torch's own ``hash_tensor`` (2.13) is an exclusive or: two rows that changed places go unseen, and so does the same
change everywhere. Hash functions of other packages read memory of the CPU only.
"""

from __future__ import annotations

import torch

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_ROW = 1021  # a prime: what repeats in a weight falls on another multiplier in every row
# Odd ones lose no bit of a word: whatever changes in one word changes the sum.
_MULTIPLIERS = torch.randint(-(2**62), 2**62, (_ROW * 4,), generator=torch.Generator().manual_seed(0), device="cpu") | 1


def checksum(tensor: torch.Tensor) -> int:
    """Return a checksum of a tensor's bits that depends on their order, computed in one pass."""
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
    """Return the bits of a tensor as 64-bit integers, copied only where a weight is not dense or not aligned."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels-last: dense in this order
    flat = tensor.reshape(-1)
    size = flat.element_size()
    if flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0:
        return flat.view(torch.int64)
    return flat.view(_INTEGERS[size]).long()


def _weighted(rows: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of each row: [rows]."""
    if rows.device.type == "cpu":
        return torch.mv(rows, multipliers)
    return (rows * multipliers).sum(1)  # accelerators do not multiply matrices of integers
