"""What torch's compile caches have of a pipeline, where its phases cannot be packages: see `ahead_of_time`.

A process that loads it traces each phase again, and finds all that it would compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..compiled.settings import CompileSettings
from ..compiled.variant import CompiledPhases
from ..errors import StateError, UnsupportedError
from ..gated import Gated
from ..pipeline import phases_with
from ..warmup import reach_every_phase
from . import private
from .contents import is_plain

FILE = "caches.bin"


def settings_of(gated: Gated) -> dict[str, Any]:
    """Return what a pipeline was compiled with, as a manifest has it.

    Raises:
        UnsupportedError: an option that a manifest cannot hold.
    """
    phases = gated.networks[0].phases
    assert isinstance(phases, CompiledPhases)
    settings = phases.given_settings
    options = dict(settings.options or {})
    unknown = [name for name, value in options.items() if not is_plain(value)]
    if unknown:
        raise UnsupportedError(
            f"A pipeline compiled with options[{unknown[0]!r}]={options[unknown[0]]!r} cannot be saved: expected text, "
            "numbers and booleans, which a manifest can hold. Compile it without that."
        )
    return {
        "mode": settings.mode,
        "dynamic": settings.dynamic,
        "options": None if settings.options is None else options,
        "regional": settings.regional,
    }


def write(file: Path, pipe: Any, gated: Gated, call: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compile every phase anew, and write what torch's caches then have of them.

    Raises:
        UnsupportedError: torch has cached nothing.
        CompileError: a phase could not be compiled.
    """
    with private.caches_of_their_own(), gated.running_with(phases_with(CompileSettings(**settings))):
        reach_every_phase(pipe, gated, call, "compiling")
        saved = torch.compiler.save_cache_artifacts()
    if saved is None or not saved[1].inductor_artifacts:
        raise UnsupportedError(
            "torch has cached nothing of what it compiled: expected its compile caches to be on. Unset "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES, or use tgate_fx.compile and tgate_fx.warmup in every process."
        )
    file.write_bytes(saved[0])


def fill(file: Path) -> None:
    """Put into torch's caches what such a file has; torch reads it by pickle once it finds it there.

    Raises:
        StateError: torch cannot read it, or its caches are off.
    """
    found = torch.compiler.load_cache_artifacts(file.read_bytes()) if private.caches_are_on() else None
    if found is None or not found.inductor_artifacts:
        raise StateError(
            f"torch's compile caches took nothing of {file}: expected what tgate_fx.save wrote, and caches that are "
            "on. Unset TORCHINDUCTOR_FORCE_DISABLE_CACHES, or save it again."
        )
