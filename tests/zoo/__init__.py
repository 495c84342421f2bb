"""A tiny pipeline of every family: real classes with random weights that do not vanish, made without a network.

Text encoders are left out; embeddings are given. Each file has the pipelines of one family in ``ENTRIES``; `entries`
has them all.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

STEPS = 4
IS_OLD = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42)


@dataclass(frozen=True)
class Entry:
    """One pipeline, and what the oracle has to know of it.

    Attributes:
        pipeline: its class; with a word after it where there are several settings of one class.
        make: makes it with seeded weights.
        inputs: what it is called with, new at every call; with guidance, if it has any, and `STEPS` steps.
        form: how guidance reaches the denoiser: "batch" ([uncond, cond]), "reversed", "calls", "none", or "whole": in
            one batch of three or more chunks, of which none can go on alone.
        text: the names of the denoiser's inputs that carry the text.
        latents: the name of the denoiser's input that has the latents, or the names if there are several.
        output: the field of the pipeline's output to compare.
        denoisers: the attributes that have the denoisers.
        companions: the attributes that have what runs beside the denoiser, of several each one.
        companions_form: how guidance reaches these, "batch" or "none".
        only_cross: whether text reaches the denoiser by cross-attention only.
        loop: how many steps each of the pipeline's loops has, if it has several.
        graphs: how many graphs two generations take.
        graphs_of_full: how many more a full step after the gate takes, where the denoiser is not given there what it
            was given before.
        settings: what `tgate_fx.gate` has to be given besides.
    """

    pipeline: str
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    form: str = "batch"
    text: tuple[str, ...] = ("encoder_hidden_states",)
    latents: str | tuple[str, ...] = "hidden_states"
    output: str = "frames"
    denoisers: tuple[str, ...] = ("transformer",)
    companions: tuple[str, ...] = ()
    companions_form: str = "batch"
    only_cross: bool = True
    loop: int | None = None
    graphs: int = 2
    graphs_of_full: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def after_gate(self) -> str | None:
        """What is kept after the gate."""
        return {"none": None, "whole": "both"}.get(self.form, "positive")

    def run(self, pipe: Any, **changes: Any) -> torch.Tensor:
        """Generate, and return the latents (or whatever the pipeline gives) as one tensor."""
        with torch.no_grad():
            result = pipe(**{**self.inputs(), **changes})
        value = result[self.output] if isinstance(result, dict) else getattr(result, self.output)
        return torch.as_tensor(value)


def entries() -> list[Entry]:
    """Every entry of every file; an older diffusers than the one that is pinned lacks some classes."""
    modules = filter(None, map(_imported, pkgutil.iter_modules(__path__)))
    return [entry for module in modules for entry in module.ENTRIES if not IS_OLD or _has(module, entry)]


def entry_of(pipeline: str) -> Entry:
    """The entry of this name; skips the test that asks for it if this diffusers lacks its pipeline."""
    found = [entry for entry in entries() if entry.pipeline == pipeline]
    if not found and IS_OLD:
        pytest.skip(f"this diffusers has no {pipeline}")
    return found[0]


def _has(module: ModuleType, entry: Entry) -> bool:
    name = entry.pipeline.split()[0]
    return hasattr(diffusers, name) or hasattr(module, name)


def _imported(module: pkgutil.ModuleInfo) -> ModuleType | None:
    try:
        return importlib.import_module(f"{__name__}.{module.name}")
    except ImportError:
        if IS_OLD:
            return None
        raise


def quiet(pipe: Any) -> Any:
    """The same pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in eval mode with weights that depend on the seed, none of them all zeros.

    Models begin training with gates and last layers of zeros, with which text would change nothing.
    """
    torch.manual_seed(seed)
    module = make().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def noise(*shape: int, seed: int = 1, scale: float = 1.0) -> torch.Tensor:
    """Random numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def generator(seed: int = 3) -> torch.Generator:
    """A generator for a pipeline's latents."""
    return torch.Generator().manual_seed(seed)
