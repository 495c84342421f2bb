"""The errors of tgate_fx: each says what was given, what was expected and what to do."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


class TGateError(Exception):
    """Base of every error that tgate_fx raises."""


class ArgumentError(TGateError, ValueError):
    """An argument has the wrong type or value, or does not exist."""


class UnsupportedError(TGateError, ValueError):
    """The pipeline, the denoiser or an input of it is one that tgate_fx cannot gate exactly."""


class StateError(TGateError, RuntimeError):
    """The call does not fit what was done to the pipeline before, or the pipeline was changed since."""


class CompileError(TGateError, RuntimeError):
    """torch could not trace or compile a phase as one graph."""


def checked_count(name: str, value: object, *, least: int, unit: str = "steps") -> int:
    """Return ``value``, an integer of any package's, as an int; raise `ArgumentError` unless it is one ≥ ``least``."""
    number = as_int(value)
    if number is None or number < least:
        raise ArgumentError(
            f"{name}={value!r} ({type(value).__name__}) is not a number of {unit}: expected an int ≥ {least}."
        )
    return number


def checked_order(value: object) -> int:
    """Return the order of an extrapolation, 0 or 1; raise `ArgumentError` if it is none."""
    number = as_int(value)
    if number not in (0, 1):
        raise ArgumentError(
            f"order={value!r} ({type(value).__name__}) is no order of DeepCache: expected 0 (the last output is held) "
            "or 1 (it goes on in a straight line)."
        )
    return number


def as_int(value: Any) -> int | None:
    """Return an integer of any package's, such as numpy's, as an int; None if it is no integer."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """Return a real number of any package's as a float; None if it is none, or too large for one."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    except OverflowError:
        return None
