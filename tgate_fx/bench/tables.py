"""A race's results as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .contenders import LADDER
from .plots import label


def show(results: dict[str, Any]) -> None:
    """Print a row for each contender and gate, the slowest first, and who failed."""
    workload, console = results["workload"], Console()
    table = Table(
        title=f"{workload['model']}, latents {workload['latents'][1]}×{workload['latents'][2]}, "
        f"{workload['steps']} steps, {workload['dtype']}; matrix product {results['gemm_gflops']:.0f} GFLOP/s"
    )
    table.add_column("")
    for heading in ("s an image", "speed-up", "pre-gate step", "post-gate step", "of the limit", "compile", "memory"):
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        share = row.get("share_of_limit")
        table.add_row(
            label(row),
            f"{row['median']:.2f}",
            f"{row['speed_up']:.2f}x",
            *[_step(row, phase) for phase in ("pre-gate", "post-gate")],
            "" if share is None or row["limit"] == 1 else f"{share:.1%}",
            f"{row['compile_seconds']:.0f} s",
            f"{row['peak_gib']:.1f} GiB",
        )
    console.print(table)
    for name, reason in results["failed"].items():
        console.print(f"not timed: {name}: {reason}")


def _step(row: dict[str, Any], phase: str) -> str:
    seconds = row["step_seconds"].get(phase)
    if seconds is None:
        return ""
    rate = row["gflops"].get(phase)
    return f"{seconds:.3f} s" + (f", {rate:.0f} GFLOP/s" if rate is not None else "")


def show_ladder(results: dict[str, Any]) -> None:
    """Print, for each gate, what every rung of the ladder gains over the one before it."""
    for gate in sorted({row["gate"] for row in results["rows"]} - {None}, reverse=True):
        table = Table(title=f"Where the gain comes from: gate {gate}")
        table.add_column("")
        for heading in ("s an image", "over the one before", "in all"):
            table.add_column(heading, justify="right")
        before = None
        for row in _rungs(results["rows"], gate):
            step = "" if before is None else f"{row['speed_up'] / before:.2f}x"
            table.add_row(row["title"], f"{row['median']:.2f}", step, f"{row['speed_up']:.2f}x")
            before = row["speed_up"]
        Console().print(table)


def _rungs(rows: list[dict[str, Any]], gate: int) -> list[dict[str, Any]]:
    by_name = {row["contender"]: row for row in rows if row["gate"] in (gate, None)}
    return [by_name[name] for name in LADDER if name in by_name]
