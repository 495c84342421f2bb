"""Compiling ahead of traffic: the shortest generation that reaches every phase."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from . import private
from .auto_gate import AutoGate
from .errors import ArgumentError, StateError, checked_count
from .gated import Gated
from .inspection import report
from .report import Report
from .schedule import Schedule

_TRIES = 4
_CHOSEN = ("num_inference_steps", "gate_step")


def warmup(
    pipe: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    **inputs: Any,
) -> Report:
    """Compile every phase of a pipeline for one size of image, by generating one in as few steps as reach them all.

    It has nothing to do with ``warm_up``, which is upstream's name for a step of its schedule.

    Graphs are for one shape and dtype of the denoiser's inputs: call this once for each size and batch that you will
    ask for. Call it again with ``guidance_scale=1`` if you will generate without guidance, since the batch size
    differs, and under ``torch.inference_mode()`` if you will generate under it. Where phases are CUDA graphs they are
    recorded too. Nothing else may generate with the pipeline meanwhile.

    Args:
        pipe: a pipeline under `tgate_fx.compile`, or from `tgate_fx.load`, which has nothing left to compile.
        height, width: of the image in pixels; None is the pipeline's default.
        batch_size: how many prompts at once; 1 if left out.
        inputs: what else the pipeline's call needs: an image, ``prompt_embeds`` in place of prompts, a guidance scale.

    Returns:
        The report on that generation: its seconds include compiling.

    Raises:
        ArgumentError: ``batch_size`` was given for a pipeline without prompts, or together with prompts; or something
            that the pipeline's call does not take, or that is chosen here: the steps and the gate.
        StateError: the pipeline is not compiled, or ends before it reaches every phase.
    """
    gated, call = call_for(pipe, height, width, batch_size, inputs)
    reach_every_phase(pipe, gated, call, "compiling")
    if any(run.device is not None and run.phases.uses_cuda_graphs(run.device) for run in gated.runs):
        reach_every_phase(pipe, gated, call, "recording")  # a CUDA graph is recorded when it runs again
    return report(pipe)


def call_for(
    pipe: Any, height: int | None, width: int | None, batch_size: int | None, inputs: dict[str, Any]
) -> tuple[Gated, dict[str, Any]]:
    """Return the gate of a compiled pipeline, and what to call it with for images of this size; see `warmup`."""
    gated = Gated.of(pipe)
    if gated is None or not gated.networks[0].phases.is_compiled:
        raise StateError(
            f"This {type(pipe).__name__} is not compiled: expected one given to tgate_fx.compile. There is nothing to "
            "compile ahead for any other."
        )
    sizes = {"height": height, "width": width}
    call = {**inputs, **{name: size for name, size in sizes.items() if size is not None}}
    refused = [name for name in call if name not in gated.parameters or name in _CHOSEN]
    if refused:
        raise ArgumentError(
            f"{', '.join(refused)} was given for a {type(pipe).__name__}: expected what its call takes, without "
            f"{' and '.join(_CHOSEN)}, which are chosen to reach every phase. Leave it out."
        )
    return gated, call | _prompts(pipe, gated, batch_size, inputs)


def reach_every_phase(pipe: Any, gated: Gated, call: dict[str, Any], doing: str) -> None:
    """Generate with as few steps as there can be for every phase of the pipeline's schedule to run.

    Args:
        pipe: the pipeline.
        gated: its gate.
        call: what the pipeline is called with besides.
        doing: what the progress bar says.

    Raises:
        StateError: not every phase was reached.
    """
    # Full steps need no phase of their own, and there may be so many that no step is gated.
    wanted, steps, gate = _shortest(replace(gated.schedule, full_steps=()))
    defaults = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    call = {**{name: value for name, value in defaults.items() if name in gated.parameters}, **call}
    strength = _strength(gated, call)
    steps = math.ceil(steps / strength)
    with _progress_bar(pipe, f"tgate_fx: {doing}"):
        for _ in range(_TRIES):
            pipe(**call, num_inference_steps=steps, gate_step=gate, full_steps=())
            if all(wanted <= set(run.examples) for run in gated.runs):
                return
            steps *= 2
    raise StateError(
        f"A generation of {steps // 2} steps{f' at strength={strength}' if strength < 1 else ''} did not reach every "
        f"phase: expected {len(wanted)} of them. Call it with inputs that run more steps, outside of tgate_fx.disabled."
    )


def _strength(gated: Gated, call: dict[str, Any]) -> float:
    """Return the share of the steps that a pipeline which changes an image runs."""
    parameter = gated.parameters.get("strength")
    strength = call.get("strength", getattr(parameter, "default", None))
    if "original_inference_steps" in gated.parameters:  # a share of these, LCM's, from which all steps are chosen
        return 1
    return strength if isinstance(strength, (int, float)) and 0 < strength < 1 else 1


def _prompts(pipe: Any, gated: Gated, batch_size: int | None, inputs: dict[str, Any]) -> dict[str, Any]:
    given = [name for name in ("prompt", "prompt_embeds") if inputs.get(name) is not None]
    if batch_size is not None and (given or "prompt" not in gated.parameters):
        raise ArgumentError(
            f"batch_size={batch_size} was given to a {type(pipe).__name__} "
            f"{'together with ' + given[0] if given else 'which takes no prompts'}: expected prompts to be made up "
            "that many times. Leave it out, and pass one input per image you want."
        )
    if batch_size is not None:
        batch_size = checked_count("batch_size", batch_size, least=1, unit="prompts")
    return {} if given or "prompt" not in gated.parameters else {"prompt": [""] * (batch_size or 1)}


def _shortest(schedule: Schedule) -> tuple[set[str], int, int | None]:
    """Return all phases of a schedule, the fewest steps, and the gate among them, with which they all run."""
    period = max(schedule.sp_interval, schedule.fi_interval, schedule.deep_interval or 1) + schedule.warm_up + 1
    share = isinstance(schedule.gate_step, (float, AutoGate))  # where it is will be known in a generation only
    start, stop = schedule.guidance or (0, 0)
    own = replace(schedule, gate_step=max(2 * period, stop + 2)) if share else schedule
    gate = own.gate_step if isinstance(own.gate_step, int) else 0
    most = max(gate, stop) + 2 * period
    wanted = _phases(own, most)
    return next(
        (wanted, steps, gate)
        for steps in range(1, most + 1)
        for gate in ([None] if own.gate_step is None else range(start + 1, steps))
        if wanted <= _phases(replace(own, gate_step=gate), steps)
    )


def _phases(schedule: Schedule, steps: int) -> set[str]:
    return {step.phase for step in map(schedule.at, range(steps)) if step.computed}


@contextmanager
def _progress_bar(pipe: Any, description: str) -> Iterator[None]:
    """Context manager: the pipeline's own progress bar under another name; one that was turned off stays off."""
    config = private.progress_bar_config(pipe)
    pipe.set_progress_bar_config(**{**config, "desc": description})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**config)
