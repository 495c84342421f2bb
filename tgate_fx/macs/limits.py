"""The most that a gate can gain with every model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..roles import Role, Roles
from ..schedule import Schedule
from .architectures import ARCHITECTURES
from .count import Generation, image_cost, parameters, phase_cost

STEPS = 25
GATE = 0.4


def limits(archs: Iterable[str]) -> dict[str, Any]:
    """Return the most that a gate at 40% of the steps can gain, for each of some architectures.

    Returns:
        ``versions`` of what was counted with, ``gate``, ``steps``, and ``models``: one row for each, see `limit_row`.
    """
    names = ("torch", "diffusers", "tgate_fx")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "gate": GATE,
        "steps": STEPS,
        "models": [limit_row(arch) for arch in archs],
    }


def limit_row(arch: str) -> dict[str, Any]:
    """Return what one architecture can gain.

    Returns:
        ``parameters``; ``step_macs``, what one branch takes in a step before the gate; ``cross_attention``, the share
        of it that gated steps leave out; and ``limit``: the multiply-adds of a generation with nothing cached over
        those of the same one gated. Gated steps still project the text that they do not read, where a model does so.
    """
    architecture = ARCHITECTURES[arch]
    gated = Generation(arch, STEPS, Schedule(GATE), architecture.guided)
    live, cached = (phase_cost(arch, Roles(role), None, 1).total for role in (Role.CAPTURE, Role.REUSE))
    return {
        "arch": arch,
        "model": architecture.title,
        "denoiser": architecture.cls,
        "guided": architecture.guided,
        "parameters": parameters(arch)[0],
        "step_macs": live,
        "cross_attention": (live - cached) / live,
        "limit": image_cost(gated.plain).total / image_cost(gated).total,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, a line each; where it is narrow, the longest names of classes are cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, collapse_padding=True)
    console = Console()
    table.add_column(no_wrap=True)
    table.add_column("denoiser", no_wrap=True, max_width=max(console.width - _OTHERS, 10))
    for heading in ("params", "cross", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["model"] + ("" if row["guided"] else " *"),
            row["denoiser"],
            f"{row['parameters'] / 1e9:.2f}G",
            f"{row['cross_attention']:.1%}",
            f"{row['limit']:.3f}x",
        )
    console.print(table)
    console.print("cross: the share of a step that cross-attention takes", highlight=False)
    if not all(row["guided"] for row in rows):
        console.print("*: without guidance, which its pipeline does not use unless it is told to", highlight=False)


_OTHERS = 54  # what the other columns take at most
