"""Kinds of values that several commands take."""

from __future__ import annotations

import importlib.util
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
    """A file to write, in a folder that there is.

    Args:
        suffixes: what its name may end with; anything if there are none.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path, dir_okay=False)
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, of which it is known that it can be written: before hours are spent on what goes there."""
        path = Path(str(super().convert(value, param, ctx)))
        folder = path.absolute().parent
        if not folder.is_dir():
            self.fail(f"{value}: there is no folder {folder} to write to.", param, ctx)
        if self._suffixes and path.suffix.lower() not in self._suffixes:
            self.fail(f"{value}: expected a name that ends with {' or '.join(self._suffixes)}.", param, ctx)
        is_new = not path.exists()
        try:
            path.open("a").close()
            if is_new:
                path.unlink()
        except OSError as error:
            self.fail(f"{value} cannot be written: {error.strerror}.", param, ctx)
        return path


PLOTS = (".png", ".pdf", ".svg")  # what matplotlib writes everywhere


def check_gated(gate: int | float | None, steps: int) -> None:
    """Raise `click.UsageError` if a gate is given, and no step would be gated."""
    first = round(gate * steps) if isinstance(gate, float) else gate
    if first is not None and first >= steps:
        raise click.UsageError(f"--gate-step {gate} of --steps {steps}: expected less, for a step to be gated.")


def check_installed(*packages: str, extra: str) -> None:
    """Raise `click.UsageError` if a package that tgate_fx does not need by itself is missing."""
    missing = sorted(package for package in packages if importlib.util.find_spec(package) is None)
    if missing:
        raise click.UsageError(f"This needs {', '.join(missing)}: pip install 'tgate_fx[{extra}]'.")
