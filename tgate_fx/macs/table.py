"""T-GATE's published table of multiply-adds and parameters, and the same cells as counted here.

Published: the T-GATE page of diffusers' documentation (v0.37) and TGATE-V2's README. Their figures leave out the matrix
products within attention; the schedules that give them are not stated with all of them, and were found by counting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..schedule import Schedule
from .architectures import ARCHITECTURES
from .count import Cost, Generation, image_cost, parameters, step_costs


@dataclass(frozen=True)
class Published:
    """One line of the table: how it is generated, and the published figures (of parameters, if there is one)."""

    variant: str
    generation: Generation
    macs: float
    params: float | None


_UNGATED = Schedule(None)
_DEEPCACHE = Schedule(None, deep_interval=3)
_V2_SDXL = Schedule(10, sp_interval=5, warm_up=2)
_V2_PIXART = Schedule(15, sp_interval=3, warm_up=2)

PUBLISHED = (
    Published("ungated", Generation("sd15", 25, _UNGATED), 16.938e12, 859.520e6),
    Published("gate 5", Generation("sd15", 25, Schedule(5)), 9.875e12, 815.557e6),
    Published("ungated", Generation("sd21", 25, _UNGATED), 38.041e12, 865.785e6),
    Published("gate 5", Generation("sd21", 25, Schedule(5)), 22.208e12, 815.433e6),
    Published("ungated", Generation("sdxl", 25, _UNGATED), 149.438e12, 2.570e9),
    Published("gate 5", Generation("sdxl", 25, Schedule(5)), 84.438e12, 2.024e9),
    Published("gate 10, sp_interval 5", Generation("sdxl", 25, _V2_SDXL), 95.988e12, None),
    Published("DeepCache (3, 1)", Generation("sdxl", 25, _DEEPCACHE, branch=1), 57.888e12, None),
    Published(
        "gate 13, DeepCache (3, 1)", Generation("sdxl", 25, Schedule(13, deep_interval=3), branch=1), 43.868e12, None
    ),
    Published("ungated", Generation("pixart-alpha", 25, _UNGATED), 107.031e12, 611.350e6),
    Published("gate 8", Generation("pixart-alpha", 25, Schedule(8)), 65.318e12, 462.585e6),
    Published("gate 15, sp_interval 3", Generation("pixart-alpha", 25, _V2_PIXART), 73.971e12, None),
    Published("ungated", Generation("pixart-sigma", 25, _UNGATED), 107.766e12, None),
    Published("gate 15, sp_interval 3", Generation("pixart-sigma", 25, _V2_PIXART), 74.420e12, None),
    Published("LCM, 4 steps", Generation("sdxl-lcm", 4, _UNGATED, guided=False), 11.955e12, 2.570e9),
    Published("LCM, 4 steps, gate 1", Generation("sdxl-lcm", 4, Schedule(1), guided=False), 11.171e12, 2.024e9),
    Published("LCM, 4 steps", Generation("pixart-alpha", 4, _UNGATED, guided=False), 8.563e12, 611.350e6),
    Published("LCM, 4 steps, gate 1", Generation("pixart-alpha", 4, Schedule(1), guided=False), 7.623e12, 462.585e6),
)


def published_rows() -> list[dict[str, Any]]:
    """Every line of the table, counted and as published; see `row`."""
    return [
        row(line.variant, line.generation) | {"page_macs": line.macs, "page_params": line.params} for line in PUBLISHED
    ]


def row(variant: str, generation: Generation) -> dict[str, Any]:
    """Return the costs of one image.

    Returns:
        ``macs`` of convolutions and linear layers, ``macs_with_attention``, ``params`` that the gated steps read (all
        if none is gated), and ``limit``: the multiply-adds of the same run with nothing cached over these, attention
        included, and so the most that it can be faster.
    """
    cost = image_cost(generation)
    total, without = parameters(generation.arch)
    schedule = generation.schedule.resolve(generation.steps)
    gated = any(schedule.at(index).gated for index in range(generation.steps))
    return {
        "model": ARCHITECTURES[generation.arch].title,
        "variant": variant,
        "macs": cost.layers,
        "params": without if gated else total,
        "macs_with_attention": cost.total,
        "limit": image_cost(generation.plain).total / cost.total,
        "page_macs": None,
        "page_params": None,
    }


def schedule_rows(generation: Generation) -> list[dict[str, Any]]:
    """One step of each phase of a schedule, and the whole image; ``steps`` is how many there are of it."""
    schedule = generation.schedule.resolve(generation.steps)
    phases: dict[tuple[str, bool], list[Cost]] = {}
    for index, cost in enumerate(step_costs(generation)):
        step = schedule.at(index)
        phases.setdefault((step.phase, step.gated), []).append(cost)
    title = ARCHITECTURES[generation.arch].title
    total, without = parameters(generation.arch)
    rows = [
        {
            "model": title,
            "variant": f"a step: {phase}",
            "steps": len(costs),
            "macs": costs[0].layers,
            "params": without if gated else total,
            "macs_with_attention": costs[0].total,
            "page_macs": None,
            "page_params": None,
        }
        for (phase, gated), costs in phases.items()
    ]
    whole = [row("the image, nothing cached", generation.plain), row("the image", generation)]
    return [*rows, *[each | {"steps": generation.steps} for each in whole]]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table of 80 columns, under a line for each model; columns that no row has are left out."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, collapse_padding=True)
    shown = [(key, heading, cell) for key, heading, cell in _COLUMNS if any(row.get(key) for row in rows)]
    for key, heading, _ in shown:
        table.add_column(heading, justify="left" if key == "variant" else "right", no_wrap=True)
    model = None
    for row in rows:
        if row["model"] != model:
            model = row["model"]
            table.add_row(f"[bold]{model}[/bold]")
        table.add_row(*[cell(row[key]) if row.get(key) else "" for key, _, cell in shown])
    Console().print(table)


def _multiply_adds(value: float) -> str:
    return f"{value / 1e12:.3f}T" if value >= 1e10 else f"{value / 1e9:.3f}G"


def _parameters(value: float) -> str:
    return f"{value / 1e6:.3f}M" if value < 1e9 else f"{value / 1e9:.3f}G"


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("variant", "", lambda variant: f"  {variant}"),
    ("steps", "steps", str),
    ("macs", "MACs", _multiply_adds),
    ("page_macs", "publ.", _multiply_adds),
    ("params", "params", _parameters),
    ("page_params", "publ.", _parameters),
    ("macs_with_attention", "+ attn.", _multiply_adds),
    ("limit", "limit", lambda limit: f"{limit:.3f}x"),
)
