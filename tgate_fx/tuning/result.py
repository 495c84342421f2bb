"""What `tgate_fx.tune` has found: trials, the one that it recommends, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..gated_class import KEYWORDS
from ..schedule import Schedule

# Keywords that change nothing. The default settings have them all, so that the pipeline's own rules do not count; what
# is cached, each of them names itself.
NEUTRAL: Mapping[str, Any] = {
    field.name: field.default
    for field in fields(Schedule)
    if field.name in KEYWORDS and field.name not in ("gate_step", "cache_weight")
}


@dataclass(frozen=True)
class Trial:
    """One setting of the gate.

    Attributes:
        setting: keywords of the pipeline's call; empty for the ungated one.
        seconds: median of a prompt, the whole call of the pipeline.
        speed_up: over the ungated one, median of the prompts.
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
        return words(self.setting) if self.setting else "ungated"

    def as_json(self) -> dict[str, Any]:
        """Return what there is of it: of a setting that was refused, why."""
        return {"setting": self.setting, "refused": self.refused} if self.refused else asdict(self)


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


def words(setting: Mapping[str, Any]) -> str:
    """Return keywords of a call as one writes them, without those that change nothing, if there are others."""
    said = {key: value for key, value in setting.items() if key not in NEUTRAL or value != NEUTRAL[key]}
    return ", ".join(f"{key}={value}" for key, value in (said or setting).items())
