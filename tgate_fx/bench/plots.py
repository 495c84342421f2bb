"""Pictures of a race's results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The variants of the short plot, each at one gate.
HEADLINE = (
    "diffusers",
    "diffusers-compiled",
    "ungated-compiled",
    "cutoff-frozen",
    "tgate",
    "gated",
    "gated-compiled",
    "gated-deepcache-compiled",
    "diffusers-graphs",
    "cutoff-graphs",
    "gated-graphs",
    "gated-forecast-graphs",
)

_DPI = 90
_OURS, _OTHERS = "tab:blue", "tab:gray"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the seconds of an image as bars, and against the memory that they take, into one picture."""
    pyplot = _pyplot()
    rows = results["rows"]
    figure, (bars, pareto) = pyplot.subplots(
        1, 2, figsize=(15, 1.5 + 0.32 * max(len(rows), 10)), dpi=_DPI, layout="constrained"
    )
    colours = [_colour(row) for row in rows]
    medians = [row["median"] for row in rows]
    spread = [[row["median"] - row["spread"][0] for row in rows], [row["spread"][1] - row["median"] for row in rows]]
    bars.barh(range(len(rows)), medians, xerr=spread, color=colours, capsize=2)
    bars.bar_label(bars.containers[-1], [f"{row['speed_up']:.2f}x" for row in rows], padding=4)
    bars.set(
        xlabel=f"seconds of {images(results['workload'])} (median, least, most)",
        title="at the bars: speed-up over the eager pipeline of the same group",
        xlim=(0, 1.15 * max(row["spread"][1] for row in rows)),
        ylim=(-1, len(rows)),
    )
    bars.set_yticks(range(len(rows)), [f"{label(row)}  ({number})" for number, row in enumerate(rows, 1)])
    points = [(row["median"], row["peak_gib"]) for row in rows]
    pareto.scatter(*zip(*points, strict=True), color=colours)
    best = _frontier(rows)
    pareto.step([row["median"] for row in best], [row["peak_gib"] for row in best], where="post", color=_OURS)
    pareto.set(xlabel=f"seconds of {images(results['workload'])}", ylabel="most memory at once, GiB")
    pareto.set_title("on the line: none better in both")
    pareto.margins(0.1)
    figure.suptitle(_title(results))
    _number(pareto, points)
    figure.savefig(path)
    pyplot.close(figure)


def plot_headline(results: dict[str, Any], path: Path) -> None:
    """Draw the speed-ups of the few variants that are worth comparing first."""
    pyplot = _pyplot()
    rows = headline(results)
    eager = [row["median"] for row in results["rows"] if row["contender"] == "diffusers"]
    figure, bars = pyplot.subplots(figsize=(10, 1.5 + 0.35 * len(rows)), dpi=_DPI, layout="constrained")
    drawn = bars.barh(
        [_name(row) for row in rows], [row["speed_up"] for row in rows], color=[_colour(row) for row in rows]
    )
    seconds = [
        f"{min(eager):.1f} to {max(eager):.1f} s"
        if row["contender"] == "diffusers" and min(eager) < max(eager)
        else f"{row['median']:.1f} s"
        for row in rows
    ]
    bars.bar_label(
        drawn, [f"{row['speed_up']:.2f}x, {text}" for row, text in zip(rows, seconds, strict=True)], padding=4
    )
    bars.invert_yaxis()
    bars.set(
        xlabel=f"speed-up over the eager pipeline, and seconds of {images(results['workload'])}",
        xlim=(0, 1.3 * max(row["speed_up"] for row in rows)),
    )
    figure.suptitle(_title(results), fontsize="medium")
    figure.savefig(path)
    pyplot.close(figure)


def headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each variant of `HEADLINE` that was run, at the latest gate, in that order."""
    gate = max((row["gate"] for row in results["rows"] if row["gate"] is not None), default=None)
    rows = {row["contender"]: row for row in results["rows"] if row["gate"] in (gate, None)}
    return [rows[name] for name in HEADLINE if name in rows]


def label(row: dict[str, Any]) -> str:
    """Return the name of a row; no other row has the same.

    Every group has a row of the eager pipeline, so these are called by their group.
    """
    return f"{_name(row)}, group {row['group'] + 1}" if row["contender"] == "diffusers" else _name(row)


def _name(row: dict[str, Any]) -> str:
    title = f"{row['title']}, eager" if row["contender"] == "diffusers" else str(row["title"])
    return title if row["gate"] is None else f"{title}, gate {row['gate']}"


def _title(results: dict[str, Any]) -> str:
    workload, machine = results["workload"], results["machine"]
    return f"{what_ran(workload)}: {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads"


def what_ran(workload: dict[str, Any]) -> str:
    """Return what a workload, as results have it, is called in titles."""
    size = "×".join(map(str, workload["latents"][1:]))
    return f"{workload['model']}, latents {size}, {workload['steps']} steps, {workload['dtype']}"


def images(workload: dict[str, Any]) -> str:
    """Return what a call makes."""
    batch = workload.get("batch", 1)
    return "an image" if batch == 1 else f"{batch} images"


def _colour(row: dict[str, Any]) -> str:
    return _OURS if row["contender"].startswith("gated") else _OTHERS


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _number(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """Write the number of every point beside it, not over a point or another number."""
    from matplotlib.transforms import Bbox

    axes.figure.canvas.draw()  # lays out the figure, so that the places of the points are known
    axes.figure.set_layout_engine("none")
    places = axes.transData.transform(points)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in places]
    for number, (point, (x, y)) in enumerate(zip(points, places, strict=True), 1):
        width, height = 8 * len(str(number)) + 4, 15
        for distance, angle in itertools.product((13, *range(25, 200, 6)), range(45, 405, 15)):
            right, up = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            box = Bbox.from_bounds(x + right - width / 2, y + up - height / 2, width, height)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "color": "black", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            str(number),
            point,
            (right, up),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            arrowprops=line if distance > 13 else None,
        )


def _frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that none other beats in both seconds and memory, the fastest first."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["median"], row["peak_gib"])):
        if not best or row["peak_gib"] < best[-1]["peak_gib"]:
            best.append(row)
    return best
