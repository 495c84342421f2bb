"""Plots of what `benchmarks.embedded.quality` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NAMES = {
    "mean": "mean of both branches cached (T-GATE)",
    "conditional": "conditional branch cached",
    "guided": "the same, and guidance goes on",
    "guided, forecast 2": "the same, every second step forecast",
    "guided, forecast 3": "the same, two of three steps forecast",
    "guided, fewer steps 2": "the same, every second step left out",
    "guided, full steps, forecast 4": "guidance goes on, full steps between, forecast after them",
    "cutoff": "guidance dropped, nothing cached",
    "both": "both branches go on",
}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw what is right, and how near pictures are to the ungated ones, over rows a step."""
    import matplotlib.pyplot as plt

    main = [row for row in result["points"] if (row["scheduler"], row["guidance_scale"]) == ("DPM-Solver++", 7.5)]
    ungated = next(row for row in main if row["rule"] == "ungated")
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.6), constrained_layout=True)
    for rule, label in _NAMES.items():
        rows = [row for row in main if row["rule"] == rule and isinstance(row["gate"], int)]
        if not rows:
            continue
        rows.sort(key=lambda row: row["gate"])
        costs = [row["rows"] for row in rows]
        wrong = [1 - row["accuracy"] for row in rows]
        errors = [row["standard_error"] for row in rows]
        (line, *_) = axes[0].errorbar(costs, wrong, errors, fmt="o-", label=label)
        axes[1].plot(costs, [row["psnr"] for row in rows], "o-", color=line.get_color())
        for row in rows if rule == "guided" else ():
            for axis, value in ((axes[0], 1 - row["accuracy"]), (axes[1], row["psnr"])):
                axis.annotate(str(row["gate"]), (row["rows"], value), textcoords="offset points", xytext=(4, 4))
    fewer = sorted((row for row in main if row["rule"].startswith("ungated")), key=lambda row: row["rows"])
    axes[0].plot([row["rows"] for row in fewer], [1 - row["accuracy"] for row in fewer], "k:", label="fewer steps")
    axes[1].plot([row["rows"] for row in fewer if row["psnr"]], [row["psnr"] for row in fewer if row["psnr"]], "k:")
    axes[0].plot([ungated["rows"]], [1 - ungated["accuracy"]], "k*", markersize=12, label="ungated")
    axes[0].set(ylabel="attributes wrong", yscale="symlog")
    axes[0].set_yscale("symlog", linthresh=1e-3)
    axes[1].set(ylabel="dB to the ungated picture")
    for axis in axes:
        axis.set(xlabel="rows of the denoiser's batch a step")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)
