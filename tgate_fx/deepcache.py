"""DeepCache's deep branch as sites: what is skipped at a shallow step, and the one tensor that stands in for it.

DeepCache (Ma et al., arXiv:2312.00858) keeps the output of a UNet's deep blocks over several steps. The `DeepCache`
package caches the output of every block that it skips; of these only one is ever read by what goes on: the features
that enter the first layer of the up path that is computed. That one is the site here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from .errors import UnsupportedError, checked_count, checked_order

# The package numbers branches as if every block had three layers.
_LAYERS = 3


@dataclass(frozen=True)
class DeepCache:
    """Skip the UNet's deep branch at most steps.

    Attributes:
        interval: the deep branch is computed at every multiple of this, ≥ 1. The count starts anew at the last step
            before the gate and at the gate, as in upstream `tgate`.
        branch: where the deep branch begins, as in the `DeepCache` package: ``3 * block + layer`` for the block and
            layer of the down path from which on it is skipped; 0 skips the most.
        order: what stands in for its output at the steps between. 0: the last one that was computed, as in the package;
            1: the straight line through the last two.
    """

    interval: int = 3
    branch: int = 0
    order: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", checked_count("interval", self.interval, least=1))
        object.__setattr__(self, "branch", checked_count("branch", self.branch, least=0))
        object.__setattr__(self, "order", checked_order(self.order))


class DeepBranch(NamedTuple):
    """The deep branch of one UNet.

    Attributes:
        exit: name of the module whose output the rest of the UNet goes on with.
        in_tuple: whether that output comes as a tuple of one tensor.
        skipped: names of the modules that need not be computed.
    """

    exit: str
    in_tuple: bool
    skipped: tuple[str, ...]


def find_deep_branch(denoiser: Any, branch: int) -> DeepBranch:
    """Return the modules of the deep branch with this number.

    Raises:
        UnsupportedError: the denoiser is no UNet with down, mid and up blocks, or has no such branch.
    """
    parts = [getattr(denoiser, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    if not all(isinstance(part, nn.Module) for part in parts):
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no down, mid and up blocks: expected a UNet for DeepCache. Leave deepcache "
            "out."
        )
    down_blocks, _, up_blocks = parts
    for each in (*down_blocks, *up_blocks):  # type: ignore[misc]
        if not hasattr(each, "resnets"):
            raise UnsupportedError(
                f"{type(denoiser).__name__} has a {type(each).__name__}: expected blocks with layers of their own for "
                "DeepCache, which begins at one of them. Leave deepcache out."
            )
    last = len(down_blocks) - 1  # type: ignore[arg-type]
    block, layer = divmod(branch, _LAYERS)
    if block > last:
        raise UnsupportedError(
            f"DeepCache(branch={branch}) begins in down block {block}: expected a branch from 0 to "
            f"{_LAYERS * (last + 1) - 1}, since this {type(denoiser).__name__} has {last + 1} blocks."
        )
    skipped = [f"down_blocks.{index}" for index in range(block + 1, last + 1)]
    skipped += _layers_from(f"down_blocks.{block}", down_blocks[block], layer)  # type: ignore[index]
    skipped += ["mid_block", *[f"up_blocks.{index}" for index in range(last - block)]]

    # Up block i mirrors down block last - i; its layers run from the deepest on.
    up = last - block
    first_computed = len(up_blocks[up].resnets) - 1 - layer  # type: ignore[index]
    name = f"up_blocks.{up}"
    for index in range(max(0, first_computed)):
        skipped += [f"{name}.resnets.{index}", *_attentions(name, up_blocks[up], index)]  # type: ignore[index]
    exit_ = skipped.pop()
    return DeepBranch(exit_, ".attentions." in exit_, tuple(skipped))


def _attentions(name: str, block: Any, layer: int) -> list[str]:
    """Return the attentions of a block's layer: one, none, or several as in AudioLDM 2."""
    count = len(getattr(block, "attentions", None) or ()) // len(block.resnets)
    return [f"{name}.attentions.{index}" for index in range(layer * count, (layer + 1) * count)]


def _layers_from(name: str, block: Any, layer: int) -> list[str]:
    """Return the modules of a down block from this layer on; the whole block if that is all of it."""
    if layer == 0:
        return [name]
    count = len(block.resnets)
    found = [f"{name}.resnets.{index}" for index in range(layer, count)]
    found += [attention for index in range(layer, count) for attention in _attentions(name, block, index)]
    if block.downsamplers is not None and count >= layer:
        found += [f"{name}.downsamplers.{index}" for index in range(len(block.downsamplers))]
    return found
