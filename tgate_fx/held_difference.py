"""Guidance after the gate by what the branches differed in before it, held constant as noise.

A model that predicts the velocity v, or a flow, predicts noise times a number that depends on the step: from the last
full step to a later one its difference changes by the ratio of these. At a given x, v = α ε − σ x₀ of x = α x₀ + σ ε
(Salimans and Ho, arXiv:2202.00512) means Δε = α Δv; the flow ε − x₀ of x = (1 − σ) x₀ + σ ε (Lipman et al.,
arXiv:2210.02747) means Δε = (1 − σ) Δflow. A scheduler that inverts its sigmas counts from noise at 0, where that is σ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from .errors import UnsupportedError
from .inputs import floats_of, map_both, map_tensors

# What a difference of predictions is multiplied by for one of noises, so many evaluations before the step that the
# denoiser is called for: from the timestep there, and this number.
Level = Callable[[Any, int], "float | torch.Tensor"]

# Where less than this of the noise is in what the model predicts, it rather says what the picture is.
_LEAST = 1e-3

# These scale what goes into the model and what comes out, so that it predicts something else than they say.
_PRECONDITIONED = ("EDM", "CosineDPM")


class HeldDifference:
    """The difference of the branches' outputs, the conditional one's less the other's, from one step on.

    Args:
        scheduler: of the pipeline, with its timesteps set.

    Raises:
        UnsupportedError: it is not known what the scheduler's model predicts.
    """

    def __init__(self, scheduler: Any) -> None:
        self._level = _level(scheduler)
        self._difference: Any = None
        self._since: tuple[Any, int] = (None, 0)
        self._captured_at: float | torch.Tensor | None = None  # the level there, once it is asked for

    def capture(self, conditional: Any, unconditional: Any, timestep: Any, index: int) -> None:
        """Hold the difference of both branches' outputs at the step with this timestep and index."""
        self._difference = map_both(torch.sub, conditional, unconditional)
        kept = timestep.clone() if isinstance(timestep, torch.Tensor) else timestep  # the loop may write to its own
        self._since, self._captured_at = (kept, index), None

    def at(self, timestep: Any, index: int) -> Any:
        """Return the difference for the step with this timestep and index; None if there was no guidance before.

        Raises:
            UnsupportedError: the scheduler does not count the pipeline's steps, or there was nothing but noise where
                the difference is from.
        """
        if self._difference is None:
            return None
        if self._captured_at is None:
            since, captured = self._since
            self._captured_at = self._level(since, index - captured)
        factor = self._captured_at / self._level(timestep, 0)
        if isinstance(factor, float) and factor == 1.0:
            return self._difference
        return map_tensors(lambda tensor: tensor * factor, self._difference)


def _level(scheduler: Any) -> Level:
    name = type(scheduler).__name__
    predicts = getattr(scheduler.config, "prediction_type", None)
    if name.startswith("FlowMatch"):
        predicts = "flow_prediction"
    sigmas = getattr(scheduler, "sigmas", None)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    # Others of order 2 evaluate at levels of noise between those of their steps.
    between = getattr(scheduler, "order", 1) != 1 and not name.startswith("Heun")
    # In each stage of several, sigmas run from 1 to 0, and noise from the stage's start to its end.
    staged = getattr(scheduler.config, "stages", 1) > 1
    plain = not name.startswith(_PRECONDITIONED) and not staged
    if plain and predicts == "epsilon":
        return lambda timestep, back: 1.0
    if plain and not between:
        if sigmas is not None and hasattr(scheduler, "step_index"):
            values = floats_of(sigmas)
            if predicts == "v_prediction":
                return _by_position(scheduler, [1 / math.hypot(1, sigma) for sigma in values])
            if predicts == "flow_prediction" and max(values) <= 1:
                inverted = getattr(scheduler.config, "invert_sigmas", False)
                return _by_position(scheduler, values if inverted else [1 - sigma for sigma in values])
        elif predicts == "v_prediction" and alphas is not None:
            return _by_timestep(alphas.sqrt())
    where = " at levels between those of its steps" if between else " in stages" if staged else ""
    raise UnsupportedError(
        f"after_gate='guided' was given with a {name} whose model predicts {predicts!r}{where}: expected noise "
        "(epsilon), v_prediction or a flow, of which it is known how guidance changes with the noise. Give "
        "after_gate='positive' with cache_weight=1.0, or another scheduler."
    )


def _by_position(scheduler: Any, levels: list[float]) -> Level:
    """By the scheduler's own count of steps, a plain int that is None before its first one."""

    def level(timestep: Any, back: int) -> float:
        index: int | None = scheduler.step_index
        if index is None:
            raise UnsupportedError(
                f"after_gate='guided' was given for a pipeline that does not step its {type(scheduler).__name__} but "
                "copies of it: expected one that counts the steps, of which the noise is known. Give "
                "after_gate='positive' with cache_weight=1.0."
            )
        if back:
            _check_informative(levels[index - back])
        return levels[index - back]

    return level


def _by_timestep(levels: torch.Tensor) -> Level:
    """By the denoiser's timestep, looked up where that is, so that nothing waits for the device."""
    on_device = functools.cache(functools.partial(levels.to, non_blocking=True))
    begins_with_noise = bool(levels.min() < _LEAST)  # zero terminal SNR: only there the check waits for the device

    def level(timestep: Any, back: int) -> torch.Tensor:
        if not isinstance(timestep, torch.Tensor):
            found = levels[int(timestep)]
        else:
            found = on_device(timestep.device).index_select(0, timestep.reshape(-1)[:1].long())[0]
        if back and begins_with_noise:
            _check_informative(found)
        return found

    return level


def _check_informative(level: float | torch.Tensor) -> None:
    """Raise `UnsupportedError` if a difference from a step of this level says nothing of the noise."""
    if level < _LEAST:
        raise UnsupportedError(
            "after_gate='guided' was given with a gate right after a step at which there is nothing but noise, so "
            "that what the model predicts says nothing of it: expected a later gate. Give gate_step=2 or more, or "
            "tgate_fx.AutoGate(earliest=2)."
        )
