"""`tgate_fx.tune`: seconds against likeness to the ungated pictures, for settings of the gate on one's own pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..artifact.fingerprint import digest
from ..errors import ArgumentError, StateError, UnsupportedError, as_float, as_int
from ..gated import gated_of
from ..inspection import report
from ..pipeline import disabled
from .kept import Kept, described_pipeline
from .likeness import likeness
from .result import NEUTRAL, Trial, Tuning

# What is tried by default: gates as shares of the steps, and what is kept after them.
_GATES = (0.2, 0.3, 0.4, 0.6)
_RULES: tuple[dict[str, Any], ...] = (
    {"cache_weight": 0.5},
    {"cache_weight": 1.0},
    {"cache_weight": 1.0, "after_gate": "guided"},
    {"cache_weight": 1.0, "forecast": 2},
    {"cache_weight": 1.0, "forecast": 3},
    {"cache_weight": 1.0, "after_gate": "guided", "forecast": 2},
)
# An early gate, and every second step in full until the half of them.
_EARLY = {**_RULES[-1], "gate_step": _GATES[0], "forecast": 4, "full_steps": (0.28, 0.36, 0.44, 0.52)}
_OURS = ("prompt", "generator", "output_type", "return_dict")  # keywords of the pipeline's call
_TRIES = 4  # at an image in which nothing is compiled
_SMALLEST = 11  # pixels, which the structural similarity takes at once


def tune(
    pipe: Any,
    prompts: Iterable[str],
    *,
    settings: Iterable[Mapping[str, Any]] | None = None,
    psnr: float = 28.0,
    ssim: float = 0.95,
    seed: int = 0,
    work: str | Path | None = None,
    **call: Any,
) -> Tuning:
    """Measure what settings of the gate cost and gain on a pipeline of your own, and recommend one.

    For every prompt an image is generated ungated, and one with each setting, from the same noise. The floor's default
    is what serving frameworks hold their caches to.

    Args:
        pipe: a pipeline under `gate` or `compile`. Settings that need graphs of their own compile them.
        prompts: what to generate; a few dozen that are like those you serve.
        settings: what to try, as keywords of the pipeline's call such as ``{"gate_step": 8, "cache_weight": 1.0}``;
            they go before those of ``call``, and what they do not name is as ``pipe`` was gated. None tries gates at
            20% to 60% of the steps, each with the mean and the conditional branch cached, guidance that goes on, and
            forecasts, and an early gate with full steps after it, whatever rules ``pipe`` was gated with.
        psnr, ssim: the floor that the recommended setting reaches on average, in dB and from 0 to 1.
        seed: of the first image; the following ones have the numbers after it.
        work: a directory to keep measurements in, from which a call with the same arguments goes on, on the same
            pipeline and machine. Code is told apart by name only, such as that of a callback.
        call: what the pipeline's call needs besides, such as ``num_inference_steps``.

    Returns:
        The trials and the recommended one. `print` it for a table; `tgate_fx.tuning.show.plot` draws it.

    Raises:
        ArgumentError: there is no prompt, a setting is none or has a keyword that is not to be set, the floor or seed
            is no number, or ``work`` cannot be used or is of something else.
        StateError: the pipeline is not gated, or its gate is disabled.
        UnsupportedError: torchmetrics is not installed, the pipeline takes no prompt, or it makes no images of 11×11
            pixels or more, or images of one colour.
    """
    from rich.progress import track  # takes a tenth of a second to import

    gated = gated_of(pipe)
    if gated.disabled:
        raise StateError(
            "tune was called within tgate_fx.disabled, where nothing is gated: expected a pipeline whose gate is on. "
            "Call it outside of that."
        )
    if "prompt" not in gated.parameters:
        raise UnsupportedError(
            f"{type(pipe).__name__} takes no prompt, and tune generates one image or video for each: expected a "
            "pipeline with text. Compare its results with those under tgate_fx.disabled by yourself."
        )
    asked = _checked_prompts(prompts)
    least_psnr, least_ssim = _checked_floor("psnr", psnr, most=100), _checked_floor("ssim", ssim, most=1)
    first = as_int(seed)
    if first is None or first < 0:
        raise ArgumentError(f"seed={seed!r} ({type(seed).__name__}) is no seed: expected an int ≥ 0.")
    if work is not None and not isinstance(work, (str, Path)):
        raise ArgumentError(f"work={work!r} ({type(work).__name__}) is no directory: expected a path, or None.")
    _check_not_ours("the call", call)
    given = [{}, *(_default_settings() if settings is None else _checked_settings(settings))]
    what = {"prompts": digest(asked), "seed": str(first), "call": digest(call), **described_pipeline(pipe, gated)}
    kept = Kept(None if work is None else Path(work), what)
    for index, prompt in enumerate(track(asked, "tgate_fx: tuning", transient=True)):
        _try_all(pipe, given, {**call, "prompt": prompt}, index, first + index, kept)
    ungated, *others = (_trial(setting, kept) for setting in given)
    others.sort(key=lambda each: (each.refused is not None, -each.speed_up))
    return Tuning((ungated, *others), least_psnr, least_ssim)


def _checked_prompts(prompts: Any) -> list[Any]:
    """Return prompts as a list; raise `ArgumentError` if there is none."""
    found = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes)) else []
    if not found:
        raise ArgumentError(f"prompts={prompts!r} has no prompt to generate: expected a list of at least one.")
    return found


def _checked_floor(name: str, value: Any, *, most: float) -> float:
    """Return a likeness; raise `ArgumentError` if pictures cannot have it."""
    number = as_float(value)
    if number is None or not -most <= number <= most:
        raise ArgumentError(
            f"{name}={value!r} ({type(value).__name__}) is no floor: expected a number up to {most}, which equal "
            "pictures have."
        )
    return number


def _checked_settings(settings: Any) -> list[dict[str, Any]]:
    """Return what is to be tried as a list; raise `ArgumentError` if something in it cannot be."""
    if not isinstance(settings, Iterable):
        raise ArgumentError(f"settings={settings!r} are no settings: expected a list of them, or None.")
    return [_checked_setting(setting) for setting in settings]


def _checked_setting(setting: Any) -> dict[str, Any]:
    """Return what is to be tried as a dict; raise `ArgumentError` if it cannot be."""
    if not isinstance(setting, Mapping) or not setting or not all(isinstance(key, str) for key in setting):
        raise ArgumentError(
            f"{setting!r} is no setting to try: expected keywords of the pipeline's call, such as {{'gate_step': 8}}. "
            "The ungated pipeline is measured in any case."
        )
    _check_not_ours(f"the setting {dict(setting)}", setting)
    return dict(setting)


def _check_not_ours(whose: str, keywords: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` for a keyword of the pipeline's call that `tune` gives itself."""
    ours = [name for name in _OURS if name in keywords]
    if ours:
        raise ArgumentError(
            f"{', '.join(ours)} was given in {whose}: expected other keywords, for tune gives {', '.join(_OURS)} "
            "itself. Leave it out, and give prompts and seed to tune."
        )


def _default_settings() -> list[dict[str, Any]]:
    rules = [*({"gate_step": gate, **rule} for gate in _GATES for rule in _RULES), _EARLY]
    return [{**rule, **{key: value for key, value in NEUTRAL.items() if key not in rule}} for rule in rules]


def _try_all(
    pipe: Any,
    settings: Sequence[dict[str, Any]],
    call: dict[str, Any],
    index: int,
    seed: int,
    kept: Kept,
) -> None:
    """Generate one prompt with the settings that it was not yet, in turns, and ungated before them to compare with."""
    missing = [setting for setting in settings if not kept.has(setting, index)]
    if not missing:
        return
    if not kept.begun:
        _generate(pipe, {}, call, seed)  # the first generation of a process takes longer
        kept.begun = True
    ungated, ungated_seconds = _generate(pipe, {}, call, seed)
    if ungated.min() == ungated.max() or not ungated.isfinite().all():
        raise UnsupportedError(
            f"The ungated picture of {call['prompt']!r} is of one colour, or has values that are no numbers: expected "
            "one to compare with. Take out the safety checker, another prompt, or another dtype."
        )
    for setting in missing:
        try:
            images, seconds = _generate(pipe, setting, call, seed) if setting else (ungated, ungated_seconds)
            if images.shape != ungated.shape:
                raise ArgumentError(
                    f"the pictures {list(images.shape)} are not of the ungated ones' shape: expected "
                    f"{list(ungated.shape)}, to compare them"
                )
        except (ArgumentError, UnsupportedError) as error:
            kept.refuse(setting, str(error))
            continue
        kept.add(setting, index, seconds, ungated_seconds, likeness(images, ungated))


def _generate(pipe: Any, setting: dict[str, Any], call: dict[str, Any], seed: int) -> tuple[torch.Tensor, float]:
    """Return images [N, 3, H, W] in [0, 1], and the seconds of the call, once nothing is compiled any more."""
    for _ in range(_TRIES):
        generator = torch.Generator().manual_seed(seed)
        started = time.perf_counter()
        with nullcontext() if setting else disabled(pipe):
            ours = {"generator": generator, "output_type": "np", "return_dict": False}
            result = pipe(**{**call, **setting, **ours})[0]
        seconds = time.perf_counter() - started
        if not any(step.compiled for step in report(pipe).steps):
            break
    return _as_images(result), seconds


def _as_images(result: Any) -> torch.Tensor:
    """Return images or the frames of videos, which come with their channels last."""
    images = torch.as_tensor(result, device="cpu")
    if images.ndim not in (4, 5) or images.shape[-1] not in (1, 3) or min(images.shape[-3:-1]) < _SMALLEST:
        raise UnsupportedError(
            f"The pipeline made something of shape {list(images.shape)}: expected images or videos of {_SMALLEST}×"
            f"{_SMALLEST} pixels or more, whose likeness can be measured. Compare others by yourself."
        )
    return images.flatten(0, -4).movedim(-1, 1).float()


def _trial(setting: dict[str, Any], kept: Kept) -> Trial:
    """Return what was measured of a setting, over all prompts."""
    why = kept.refused(setting)
    if why is not None:
        return Trial(setting, refused=why)
    rows = kept.rows(setting)
    distances = [row["perceptual"] for row in rows if row["perceptual"] is not None]
    return Trial(
        setting,
        seconds=statistics.median(row["seconds"] for row in rows),
        speed_up=statistics.median(row["ungated_seconds"] / row["seconds"] for row in rows),
        psnr=statistics.fmean(row["psnr"] for row in rows),
        ssim=statistics.fmean(row["ssim"] for row in rows),
        perceptual=statistics.fmean(distances) if distances else None,
        lowest_psnr=min(row["psnr"] for row in rows),
    )
