"""How many steps a generation will take, as its pipeline says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import private

# Pipelines that record the steps of all their loops together.
_RECORD_ALL_LOOPS = frozenset(("LTX2DFRTemporalRefinePipeline",))


def step_count(pipe: Any) -> int | None:
    """Return how many times the denoising loop that has just begun will call the denoiser, or None if unknown.

    Pipelines that cut their timesteps short (image-to-image, ``denoising_end``) record the number that is left; the
    others run all of their scheduler's timesteps from its begin index on.
    """
    recorded = vars(pipe).get(private.STEP_COUNT, getattr(pipe, "num_timesteps", None))
    if recorded is not None and not {base.__name__ for base in type(pipe).__mro__} & _RECORD_ALL_LOOPS:
        return int(recorded)
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    if timesteps is None:
        return None
    return len(timesteps) - (getattr(pipe.scheduler, "begin_index", None) or 0)


@contextmanager
def fresh_step_count(pipe: Any) -> Iterator[None]:
    """Context manager: a recorded number of steps is one that this generation has recorded itself."""
    before = vars(pipe).pop(private.STEP_COUNT, None)
    try:
        yield
    finally:
        if before is not None:
            vars(pipe).setdefault(private.STEP_COUNT, before)
