"""A loop that is written by hand around a gated pipeline's denoiser, as one generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ArgumentError, checked_count
from .gated import gated_of
from .steps import Steps


@contextmanager
def generation(pipe: Any, steps: int, *, guided: bool) -> Iterator[None]:
    """Context manager: the calls of the pipeline's denoiser are the steps of one generation, and gated as those are.

    A step is a call of the denoiser with a timestep; of guidance in separate calls, both with the same timestep tensor.
    After the gate the denoiser computes the branch that goes on, and gives what the pipeline's own loop would get. Set
    the scheduler's timesteps before the first call.

    Args:
        pipe: a pipeline under `gate`, `compile` or `load`.
        steps: how many steps the loop has.
        guided: whether the denoiser is given both branches of classifier-free guidance, as the pipeline would.

    Raises:
        ArgumentError: ``steps`` is no int ≥ 1.
        StateError: the pipeline is not gated, is in the middle of a generation, or its denoiser was not called.
        UnsupportedError: the calls are not what was said: more steps, or fewer where a share or a forecast depends on
            their number; other rows, or no two branches.

    Example:
        >>> with torch.no_grad(), tgate_fx.generation(pipe, 25, guided=True):  # doctest: +SKIP
        ...     for t in pipe.scheduler.timesteps:
        ...         noise = pipe.unet(torch.cat([latents] * 2), t, text).sample
    """
    gated = gated_of(pipe)
    steps = checked_count("steps", steps, least=1)
    if not isinstance(guided, bool):
        raise ArgumentError(
            f"guided={guided!r} ({type(guided).__name__}): expected True if the denoiser is given both branches of "
            "guidance, else False."
        )
    schedule = gated.settled(gated.schedule)
    gated.check(pipe, schedule)
    said = Steps(
        pipe,
        schedule,
        guided=lambda: guided,
        count=lambda timestep: steps,
        calls_back=True,  # what runs between the steps is not known
        only_conditional=False,
    )
    with gated.generation(pipe, said, by_hand=True):
        yield
