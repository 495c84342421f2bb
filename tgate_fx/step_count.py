"""How many steps a generation will take, as its pipeline says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import private
from .class_names import class_names
from .inputs import floats_of

# Pipelines that record other steps than a loop runs: those of all their loops, or those that were asked for, which are
# others where timesteps are given.
_RECORD_OTHERS = frozenset(("LTX2DFRTemporalRefinePipeline", "AceStepPipeline"))

# Pipelines that record their steps, if they do, before ``denoising_end`` cuts them.
_XL = "StableDiffusionXL"
_CUT_LATER = frozenset(
    f"{_XL}{name}Pipeline"
    for name in (
        "ControlNet",
        "ControlNetInpaint",
        "ControlNetPAG",
        "ControlNetUnion",
        "ControlNetUnionInpaint",
        "Adapter",
        "InstructPix2Pix",
    )
)

# Pipelines that begin within their timesteps by ``strength``, and whose denoiser is given none to see it by.
_CUT_BY_STRENGTH = frozenset(("AmusedImg2ImgPipeline", "AmusedInpaintPipeline"))

# Pipelines that leave out the scheduler's last timestep.
_LEAVE_LAST_OUT = frozenset(("LTXI2VLongMultiPromptPipeline",))


def step_count(pipe: Any, timestep: Any = None, *, end: Any = None, strength: Any = None) -> int | None:
    """Return how many times the denoising loop that has just begun will call the denoiser, or None if unknown.

    Pipelines that cut their timesteps short (image-to-image, ``denoising_end``) record the number that is left; the
    others run all of their scheduler's timesteps from its begin index on, or from the loop's first one on.

    Args:
        pipe: the pipeline, in the middle of its call.
        timestep: of the first call of the denoiser.
        end: the call's ``denoising_end``.
        strength: the call's ``strength``.
    """
    names = class_names(type(pipe))
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    recorded = vars(pipe).get(private.STEP_COUNT, getattr(pipe, "num_timesteps", None))
    if recorded is not None and not names & _RECORD_OTHERS:
        count = int(recorded) - bool(names & _LEAVE_LAST_OUT)
    elif timesteps is None:
        return None
    else:
        begin: int | None = getattr(pipe.scheduler, "begin_index", None)
        if begin is None:
            values, first = floats_of(timesteps), noisiest(timestep)
            begin = values.index(first) if first in values else 0  # what models are given may be scaled
        count = len(timesteps) - begin - _ends_without_noise(pipe.scheduler)
    if names & _CUT_BY_STRENGTH and strength is not None:
        count = int(count * strength)
    if names & _CUT_LATER and isinstance(end, float) and 0 < end < 1:
        trained: int = pipe.scheduler.config.num_train_timesteps
        last = round(trained - end * trained)  # as these pipelines compute it
        return sum(each >= last for each in floats_of(timesteps)[-count:])
    return count


def _ends_without_noise(scheduler: Any) -> bool:
    """Return whether the last timestep is where no noise is left, with no step from there."""
    sigmas = getattr(scheduler, "sigmas", None)
    return sigmas is not None and len(sigmas) == len(scheduler.timesteps) and float(sigmas[-1]) == 0.0


def noisiest(timestep: Any) -> float:
    """Return the timestep of what is noisiest: conditioning within the latents may have timesteps of its own."""
    if timestep is None:
        return float("nan")
    return float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)


@contextmanager
def fresh_step_count(pipe: Any) -> Iterator[None]:
    """Context manager: a recorded number of steps is one that this generation has recorded itself."""
    before = vars(pipe).pop(private.STEP_COUNT, None)
    try:
        yield
    finally:
        if before is not None:
            vars(pipe).setdefault(private.STEP_COUNT, before)
