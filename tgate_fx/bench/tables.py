"""A race's results as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .contenders import LADDER
from .plots import images, what_ran


def show(results: dict[str, Any]) -> None:
    """Print a row for each contender and gate, the slowest first, and who failed."""
    workload, console = results["workload"], Console()
    made = images(workload)
    table = _table(
        f"{what_ran(workload)}, {results['machine'].get('gpu', 'CPU')}, batch {workload.get('batch', 1)}",
        ("", "gate", made, "speed-up", "pre", "post", "limit", "compile", "GiB"),
        f"seconds of {made}, and how much faster than diffusers that is; seconds of a step before and after "
        "the gate; the share reached of what the multiply-adds left out allow; seconds to compile; most memory at once",
    )
    for row in results["rows"]:
        share = row.get("share_of_limit")
        steps = [row["step_seconds"].get(phase) for phase in ("pre-gate", "post-gate")]
        table.add_row(
            row["contender"],
            str(row["gate"] or ""),
            f"{row['median']:.2f}",
            f"{row['speed_up']:.2f}x",
            *["" if seconds is None else f"{seconds:.3f}" for seconds in steps],
            "" if share is None or row["limit"] == 1 else f"{share:.0%}",
            f"{row['compile_seconds']:.0f}",
            f"{row['peak_gib']:.1f}",
        )
    console.print(table)
    console.print(f"A product of two matrices reaches {results['gemm_gflops']:.0f} GFLOP/s.")
    for name, reason in results["failed"].items():
        console.print(f"not timed: {name}: {reason}")


def _table(title: str, headings: tuple[str, ...], caption: str = "") -> Table:
    """Return a table that fits into 80 columns: the first column is text, the others are numbers."""
    table = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
        collapse_padding=True,
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def show_ladder(results: dict[str, Any]) -> None:
    """Print, for each gate, how much faster every rung of the ladder is than the one that it adds something to."""
    for gate in sorted({row["gate"] for row in results["rows"]} - {None}, reverse=True):
        rows = {row["contender"]: row for row in results["rows"] if row["gate"] in (gate, None)}
        heading = images(results["workload"])
        table = _table(f"Where the speed-up comes from: gate {gate}", ("", heading, "speed-up", "over", "in all"))
        for name, below in LADDER.items():
            if name in rows:
                speed_up = rows[name]["speed_up"]
                over = ("", "") if below not in rows else (f"{speed_up / rows[below]['speed_up']:.2f}x", below)
                table.add_row(name, f"{rows[name]['median']:.2f}", *over, f"{speed_up:.2f}x")
        Console().print(table)
