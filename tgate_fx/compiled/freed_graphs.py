"""Frees the weights that are part of a frozen graph, once nothing can run the graph any more.

Inductor makes a Python module of every graph, with the weights that are part of it as attributes, and keeps it for as
long as the process lives: without this, each change of weights would leave another copy of them in memory. Its own
``PyCodeCache.cache_clear`` and ``torch.compiler.reset`` (torch 2.13) forget every graph of the process, or none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from . import private


@contextmanager
def made_modules() -> Iterator[list[ModuleType]]:
    """Context manager: the modules that inductor makes meanwhile, filled in at the end.

    Enter it where Dynamo compiles, which it does in one thread at a time.
    """
    before = len(private.inductor_modules())
    made: list[ModuleType] = []
    yield made
    made.extend(private.inductor_modules()[before:])


def release_with(run: Callable[..., Any], modules: list[ModuleType]) -> None:
    """Drop the tensors that are attributes of these modules when ``run`` is no longer there."""
    weakref.finalize(run, _drop_tensors, modules).atexit = False


def _drop_tensors(modules: list[ModuleType]) -> None:
    for module in modules:
        for name in [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]:
            delattr(module, name)
