"""Which library computes the linear layers of frozen float32 graphs on a CPU.

Inductor hands them to MKL, which is made for Intel's processors. On AMD's, oneDNN computes them more than twice as
fast, and with what follows a layer (GELU, a residual) fused into it, as inductor has it in code that is compiled ahead
of time. Other processors keep inductor's choice.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .fingerprint import cpuinfo

_PASSES = "torch._inductor.fx_passes.mkldnn_fusion"  # takes seconds to import
_CHOICE = "_get_mkldnn_device_op"  # its function that returns, for a device, what packs layers


@contextmanager
def onednn_on_amd() -> Iterator[None]:
    """While it is entered, inductor packs linear layers for oneDNN if this is an AMD processor.

    Enter it where Dynamo compiles, which it does in one thread at a time: the choice is the whole process's.
    """
    packs = _packs_for_onednn() if cpuinfo("vendor_id") == "AuthenticAMD" else None
    if packs is None:
        yield
        return
    passes = importlib.import_module(_PASSES)
    inductors = getattr(passes, _CHOICE)
    setattr(passes, _CHOICE, lambda device: packs if device == "cpu" else inductors(device))
    try:
        yield
    finally:
        setattr(passes, _CHOICE, inductors)


@functools.cache
def _packs_for_onednn() -> Any:
    """What packs every layer for oneDNN; None where inductor is not written as expected, whose choice then stays."""
    passes = importlib.import_module(_PASSES)
    inductors: Any = getattr(passes, "CpuMkldnnDeviceOp", None)
    names = ("pack_linear_weight", "pack_linear")
    methods = [getattr(inductors, name, None) for name in names]
    if not hasattr(passes, _CHOICE) or not all(method and _takes_precision(method) for method in methods):
        return None

    # Inductor gives all layers of lower precision to oneDNN, and is told that every layer is one.
    def always(name: str) -> Any:
        return lambda self, graph, _, *rest: getattr(inductors, name)(self, graph, True, *rest)

    return type("PacksForOnednn", (inductors,), {name: always(name) for name in names})()


def _takes_precision(method: Any) -> bool:
    return list(inspect.signature(method).parameters)[1:3] == ["graph", "is_lp_weight"]
