"""Which library computes the linear layers of frozen float32 graphs on a CPU.

Inductor hands them to MKL, which is made for Intel's processors. On AMD's, oneDNN computes them more than twice as
fast, and with what follows a layer (GELU, a residual) fused into it, as inductor has it in code that is compiled ahead
of time. Other processors keep inductor's choice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from . import private
from .cpu import cpuinfo


def onednn_on_amd() -> AbstractContextManager[None]:
    """Context manager: inductor packs linear layers for oneDNN if this is an AMD processor.

    Enter it where Dynamo compiles, which it does in one thread at a time: the choice is the whole process's.
    """
    return private.linear_layers_in_onednn() if cpuinfo("vendor_id") == "AuthenticAMD" else nullcontext()
