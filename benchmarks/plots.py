"""Draw the plots of the committed results again: all rows of each benchmark, and the short one of README.

    python -m benchmarks.plots

Reads benchmarks/results/bench-*.json and writes a PNG beside each, and benchmarks/results/headline.png.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tgate_fx.bench import plots

RESULTS = Path(__file__).parent / "results"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=RESULTS,
    help="A folder for the plots; benchmarks/results if left out.",
)
def main(out: Path) -> None:
    for file in sorted(RESULTS.glob("bench-*.json")):
        plots.plot(json.loads(file.read_text()), out / f"{file.stem}.png")
    plots.plot_headline(json.loads((RESULTS / "bench-sd15.json").read_text()), out / "headline.png")


if __name__ == "__main__":
    main()
