"""`tgate_fx.tune`: seconds against likeness to the ungated pictures, for settings of the gate on one's own pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, StateError, UnsupportedError
from ..gated import gated_of
from ..inspection import report
from ..pipeline import disabled
from .kept import Kept, described, described_pipeline
from .likeness import likeness

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


@dataclass(frozen=True)
class Trial:
    """One setting of the gate.

    Attributes:
        setting: keywords of the pipeline's call; empty for the ungated one.
        seconds: median of an image, the whole call of the pipeline.
        speed_up: over the ungated one.
        psnr, ssim, perceptual: likeness to the ungated images, on average; see `tgate_fx.tuning.likeness`.
        lowest_psnr: of all images.
        refused: why the pipeline cannot be gated so; None if it can.
    """

    setting: dict[str, Any]
    seconds: float = 0.0
    speed_up: float = 1.0
    psnr: float = 100.0
    ssim: float = 1.0
    perceptual: float | None = None
    lowest_psnr: float = 100.0
    refused: str | None = None

    @property
    def name(self) -> str:
        """The setting in words."""
        return ", ".join(f"{key}={value}" for key, value in self.setting.items()) or "ungated"


@dataclass(frozen=True)
class Tuning:
    """What `tune` has measured. `print` it for a table.

    Attributes:
        trials: the ungated pipeline first, then the settings from the fastest on, and last what was refused.
        psnr, ssim: the floor that was asked for.
    """

    trials: tuple[Trial, ...]
    psnr: float
    ssim: float

    @property
    def recommended(self) -> Trial:
        """The fastest setting at or above the floor; the ungated one if there is none."""
        ungated, *others = self.trials
        good = [each for each in others if not each.refused and each.psnr >= self.psnr and each.ssim >= self.ssim]
        return max((ungated, *good), key=lambda each: each.speed_up)

    def __str__(self) -> str:
        width = max(len(each.name) for each in self.trials)
        lines = [f"{'setting':<{width}}  {'seconds':>8}  {'speed-up':>8}  {'dB':>5}  {'SSIM':>5}  {'perceptual':>10}"]
        for each in self.trials:
            if each.refused:
                lines.append(f"{each.name:<{width}}  refused: {each.refused.partition(': expected')[0]}")
                continue
            distance = "" if each.perceptual is None else f"{each.perceptual:.4f}"
            lines.append(
                f"{each.name:<{width}}  {each.seconds:>8.3f}  {each.speed_up:>7.2f}x  {each.psnr:>5.1f}  "
                f"{each.ssim:>5.3f}  {distance:>10}"
            )
        lines.append(f"for {self.psnr:g} dB and SSIM {self.ssim:g}: {self.recommended.name}")
        return "\n".join(lines)


def tune(
    pipe: Any,
    prompts: Sequence[str],
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
            they go before those of ``call``. None tries gates at 20% to 60% of the steps, each with the mean and the
            conditional branch cached, guidance that goes on, and forecasts, and an early gate with full steps after it.
        psnr, ssim: the floor that the recommended setting reaches on average, in dB and from 0 to 1.
        seed: of the first image; the following ones have the numbers after it.
        work: a directory to keep measurements in, from which a call with the same arguments goes on.
        call: what the pipeline's call needs besides, such as ``num_inference_steps``.

    Returns:
        The trials and the recommended one. `print` it for a table; `tgate_fx.tuning.show.plot` draws it.

    Raises:
        ArgumentError: there is no prompt, or a setting is none or has a keyword that is not to be set.
        StateError: the pipeline is not gated, or its gate is disabled.
        UnsupportedError: torchmetrics is not installed, or the pipeline makes no images of 11×11 pixels or more.
    """
    from rich.progress import track  # takes a tenth of a second to import

    gated = gated_of(pipe)
    if isinstance(prompts, str) or not prompts:
        raise ArgumentError(f"prompts={prompts!r} has no prompt to generate: expected a list of at least one.")
    if gated.disabled:
        raise StateError(
            "tune was called within tgate_fx.disabled, where nothing is gated: expected a pipeline whose gate is on. "
            "Call it outside of that."
        )
    _check_not_ours("the call", call)
    given = [{}, *(_default_settings() if settings is None else map(_checked_setting, settings))]
    what = {
        "prompts": list(prompts),
        "seed": seed,
        "call": described(call),
        "pipeline": described_pipeline(pipe, gated),
    }
    kept = Kept(None if work is None else Path(work), what)
    for index, prompt in enumerate(track(prompts, "tgate_fx: tuning", transient=True)):
        _try_all(pipe, given, {**call, "prompt": prompt}, index, seed + index, kept)
    ungated = _trial({}, kept, None)
    trials = [_trial(setting, kept, ungated.seconds) for setting in given[1:]]
    return Tuning((ungated, *sorted(trials, key=lambda each: (each.refused is not None, each.seconds))), psnr, ssim)


def _checked_setting(setting: Any) -> dict[str, Any]:
    """Return what is to be tried as a dict; raise `ArgumentError` if it cannot be."""
    if not isinstance(setting, Mapping) or not setting:
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
    return [*({"gate_step": gate, **rule} for gate in _GATES for rule in _RULES), _EARLY]


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
    ungated, seconds = _generate(pipe, {}, call, seed)
    for setting in missing:
        try:
            images, seconds = _generate(pipe, setting, call, seed) if setting else (ungated, seconds)
        except (ArgumentError, UnsupportedError) as error:
            kept.refuse(setting, str(error))
            continue
        kept.add(setting, index, seconds, likeness(images, ungated))


def _generate(pipe: Any, setting: dict[str, Any], call: dict[str, Any], seed: int) -> tuple[torch.Tensor, float]:
    """Return images [N, 3, H, W] in [0, 1], and the seconds they took, once nothing is compiled any more."""
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


def _trial(setting: dict[str, Any], kept: Kept, ungated: float | None) -> Trial:
    """Return what was measured of a setting, over all prompts."""
    why = kept.refused(setting)
    if why is not None:
        return Trial(setting, refused=why)
    rows = kept.rows(setting)
    distances = [row["perceptual"] for row in rows if row["perceptual"] is not None]
    seconds = statistics.median(row["seconds"] for row in rows)
    return Trial(
        setting,
        seconds,
        1.0 if ungated is None else ungated / seconds,
        psnr=statistics.fmean(row["psnr"] for row in rows),
        ssim=statistics.fmean(row["ssim"] for row in rows),
        perceptual=statistics.fmean(distances) if distances else None,
        lowest_psnr=min(row["psnr"] for row in rows),
    )
