"""Frees the weights that a frozen graph holds, once nothing can run the graph any more.

Inductor makes a Python module of every graph, with the weights that are part of it as attributes, and keeps it for as
long as the process lives: without this, each change of weights would leave another copy of them in memory.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


@contextmanager
def made_modules() -> Iterator[list[ModuleType]]:
    """The modules that inductor makes while this is entered, filled in when it is left.

    Enter it where Dynamo compiles, which it does in one thread at a time.
    """
    before = len(_kept())
    made: list[ModuleType] = []
    yield made
    made.extend(_kept()[before:])


def release_with(run: Callable[..., Any], modules: list[ModuleType]) -> None:
    """Drop the tensors that are attributes of these modules when ``run`` is no longer there."""
    weakref.finalize(run, _drop_tensors, modules).atexit = False


def _kept() -> list[ModuleType]:
    """The modules that inductor keeps; none before it is imported."""
    codecache: Any = sys.modules.get("torch._inductor.codecache")
    return codecache.PyCodeCache.modules if codecache is not None else []


def _drop_tensors(modules: list[ModuleType]) -> None:
    for module in modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)
