"""`tgate-fx demo`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import GateStep, OutFile, check_gated

PROMPTS = (
    "a large red star in the centre on a striped white background",
    "a small blue circle left of a large yellow triangle on a plain grey background",
    "a large green cross above a small purple square on a checkered pink background",
    "a small black star, a large red circle and a small blue cross in a row on a plain cyan background",
)


@click.command()
@click.option("--prompt", "prompts", multiple=True, default=PROMPTS, help="What to draw; repeat it for more rows.")
@click.option(
    "--gate-step",
    "gates",
    type=GateStep(),
    multiple=True,
    default=(10, 5),
    show_default=True,
    help="First gated step, or a share of the steps such as 0.4; repeat it for more columns.",
)
@click.option("--steps", type=click.IntRange(min=2), default=25, show_default=True, help="Inference steps.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first row.")
@click.option(
    "--out", type=OutFile(".png"), default="tgate-demo.png", show_default=True, help="Where the picture goes."
)
@click.option("--compile/--no-compile", "compiled", default=False, help="Run both phases through torch.compile.")
def demo(
    prompts: tuple[str, ...], gates: tuple[int | float | None, ...], steps: int, seed: int, out: Path, compiled: bool
) -> None:
    """Generate pictures with and without the gate, side by side, on the embedded pipeline."""
    for gate in gates:
        if gate is None:
            raise click.UsageError("--gate-step none: expected a step, for the ungated pictures are there anyway.")
        check_gated(gate, steps)
    from ..demo.compare import compare

    compare(prompts, gates, steps=steps, seed=seed, out=out, compiled=compiled)
