"""One copy of the packed weights that frozen graphs have in common.

Inductor packs the weights of a frozen graph for this CPU's kernels, and keeps them as attributes of the module that it
makes of the graph: without this, each phase would have a copy of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import ModuleType

import torch

from . import private
from .checksum import checksum

# Of all graphs of this process that are still there, by layout, shape, dtype and checksum. Written where Dynamo
# compiles, which it does in one thread at a time.
_kept: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = weakref.WeakValueDictionary()


def share(modules: Iterable[ModuleType]) -> None:
    """Let these modules of inductor's hold the packed weights that another graph holds already, in place of their own.

    Only what is equal bit for bit, in oneDNN's own description of its layout too, is shared.
    """
    for module in modules:
        for name, weight in list(vars(module).items()):
            if isinstance(weight, torch.Tensor) and weight.is_mkldnn:
                setattr(module, name, _shared(weight))


def _shared(weight: torch.Tensor) -> torch.Tensor:
    packed = private.packed(weight)
    if packed is None or packed.data.nbytes == 0:
        return weight
    bits = torch.frombuffer(packed.data, dtype=torch.uint8)
    key = (packed.description, weight.shape, weight.dtype, checksum(bits))
    known = _kept.setdefault(key, weight)
    if known is weight:
        return weight
    others = private.packed(known)
    equal = others is not None and torch.equal(torch.frombuffer(others.data, dtype=torch.uint8), bits)
    return known if equal else weight
