"""Pictures of a race's results."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the seconds of an image as bars, and against the memory that they take, into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    figure, (bars, pareto) = pyplot.subplots(
        1, 2, figsize=(15, 1.5 + 0.32 * max(len(rows), 10)), constrained_layout=True
    )
    labels = [label(row) for row in rows]
    colours = ["tab:blue" if row["contender"].startswith("gated") else "tab:gray" for row in rows]
    medians = [row["median"] for row in rows]
    spread = [[row["median"] - row["spread"][0] for row in rows], [row["spread"][1] - row["median"] for row in rows]]
    # By number: there is an eager row for every group, all with the same label.
    bars.barh(range(len(rows)), medians, xerr=spread, color=colours, capsize=2)
    bars.bar_label(bars.containers[-1], [f"{row['speed_up']:.2f}x" for row in rows], padding=4)
    bars.set(xlabel="seconds an image (median, least, most)", xlim=(0, 1.15 * max(row["spread"][1] for row in rows)))
    pareto.scatter(medians, [row["peak_gib"] for row in rows], color=colours)
    best = _frontier(rows)
    pareto.step([row["median"] for row in best], [row["peak_gib"] for row in best], where="post", color="tab:blue")
    for number, row in enumerate(rows, 1):
        pareto.annotate(str(number), (row["median"], row["peak_gib"]), textcoords="offset points", xytext=(4, 4))
    bars.set_yticks(range(len(rows)), [f"{text}  ({number})" for number, text in enumerate(labels, 1)])
    pareto.set(xlabel="seconds an image", ylabel="most memory at once, GiB", title="on the line: none better in both")
    workload = results["workload"]
    figure.suptitle(
        f"{workload['model']}, latents {workload['latents'][1]}×{workload['latents'][2]}, {workload['steps']} steps, "
        f"{workload['dtype']}: {results['machine']['cpu']}, {results['machine']['threads']} threads"
    )
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def label(row: dict[str, Any]) -> str:
    """What a row is called."""
    return str(row["title"]) if row["gate"] is None else f"{row['title']}, gate {row['gate']}"


def _frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that none other beats in both seconds and memory, the fastest first."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["median"], row["peak_gib"])):
        if not best or row["peak_gib"] < best[-1]["peak_gib"]:
            best.append(row)
    return best
