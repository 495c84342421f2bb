"""Kinds of values that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..checked import checked_gate_step
from ..errors import ArgumentError


class GateStep(click.ParamType):  # type: ignore[type-arg]
    """A gate step: an int, a share of the steps, or "none"."""

    name = "step"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float | None:
        """Return the value of ``gate_step`` that the text says."""
        if value == "none":
            return None
        try:
            gate = float(value) if "." in str(value) else int(value)
        except ValueError:
            self.fail(f"{value!r}: expected a step such as 10, a share of the steps such as 0.4, or none.", param, ctx)
        try:
            checked_gate_step(gate)
        except ArgumentError as error:
            self.fail(str(error), param, ctx)
        return gate


class OutFile(click.Path):
    """A file to write, in a folder that there is."""

    def __init__(self) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        path = Path(str(super().convert(value, param, ctx)))
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f"{value}: there is no folder {folder} to write to.", param, ctx)
        return path


def check_gated(gate: int | float | None, steps: int) -> None:
    """Raise `click.UsageError` if no step would be gated."""
    if isinstance(gate, int) and gate >= steps:
        raise click.UsageError(f"--gate-step {gate} of --steps {steps}: expected less, for a step to be gated.")
