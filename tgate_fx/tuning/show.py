"""The plot of what `tgate_fx.tune` has measured."""

from __future__ import annotations

from pathlib import Path

from .result import Tuning, words


def plot(tuning: Tuning, path: str | Path) -> None:
    """Draw seconds against likeness to the ungated images, and the floor, as a PNG."""
    import matplotlib.pyplot as plt

    trials = [each for each in tuning.trials[1:] if not each.refused]
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for axis, name, label, floor in (
        (axes[0], "psnr", "PSNR to ungated, dB", tuning.psnr),
        (axes[1], "ssim", "SSIM to ungated", tuning.ssim),
    ):
        for rule in dict.fromkeys(_rule(each.setting) for each in trials):
            of_rule = [each for each in trials if _rule(each.setting) == rule]
            axis.plot([each.seconds for each in of_rule], [getattr(each, name) for each in of_rule], "o-", label=rule)
            for each in of_rule:
                at = each.seconds, getattr(each, name)
                axis.annotate(str(each.setting.get("gate_step", "")), at, textcoords="offset points", xytext=(4, 4))
        axis.axhline(floor, color="gray", linestyle=":")
        axis.axvline(tuning.trials[0].seconds, color="black", linestyle=":", label="ungated")
        axis.set(xlabel="seconds a prompt", ylabel=label)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _rule(setting: dict[str, object]) -> str:
    return words({key: value for key, value in setting.items() if key != "gate_step"}) or "gate"
