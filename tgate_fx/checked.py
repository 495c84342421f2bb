"""What the settings of a schedule may be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .auto_gate import AutoGate
from .errors import ArgumentError, as_float, as_int

_TEXT = (str, bytes, bytearray)


def checked_gate_step(value: object) -> int | float | AutoGate | None:
    """Return a gate step as an int ≥ 1, a float in (0, 1), None or an `AutoGate`.

    Raises:
        ArgumentError: it is none of these, nor "auto".
    """
    if isinstance(value, str) and value == "auto":
        return AutoGate()
    if value is None or isinstance(value, AutoGate):
        return value
    share, number = as_float(value), as_int(value)
    if share is not None and 0.0 < share < 1.0:
        return share
    if number is not None and number >= 1:
        return number
    whole = share is not None and share >= 1 and share.is_integer()
    raise ArgumentError(
        f"gate_step={value!r} ({type(value).__name__}) is not a gate step: expected an int ≥ 1 (the index of the first "
        "gated step), a float between 0 and 1 (that share of the steps), None (never gated), or 'auto'."
        + (f" Write {share:.0f} for that step." if whole else "")
    )


def checked_weight(value: object) -> float:
    """Return a weight of the conditional branch from 0 to 1; raise `ArgumentError` if it is none."""
    weight = as_float(value)
    if weight is None or not 0.0 <= weight <= 1.0:
        raise ArgumentError(
            f"cache_weight={value!r} ({type(value).__name__}) is not a weight: expected a number from 0 (the "
            "unconditional branch is cached) to 1 (the conditional one), 0.5 for the mean of both."
        )
    return weight


def checked_window(value: object) -> tuple[int, int]:
    """Return a first step and one to stop before as two ints; raise `ArgumentError` if it is no such pair."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        start, stop = map(as_int, value)
        if start is not None and stop is not None and 0 <= start < stop:
            return start, stop
    raise ArgumentError(
        f"guidance={value!r} is no span of steps: expected (start, stop), two ints with 0 ≤ start < stop: the first "
        "step with guidance, and the first one without it again; or None for guidance at every step."
    )


def checked_steps(value: object) -> tuple[int | float, ...]:
    """Return steps as ints ≥ 0 and floats in (0, 1); raise `ArgumentError` if a value is no sequence of these."""
    given = tuple(value) if isinstance(value, Sequence) and not isinstance(value, _TEXT) else (None,)
    shares = [as_float(step) for step in given]
    steps = [
        share if share is not None and 0.0 < share < 1.0 else as_int(step)
        for share, step in zip(shares, given, strict=True)
    ]
    if any(step is None or step < 0 for step in steps):
        raise ArgumentError(
            f"full_steps={value!r} are no steps: expected indices of steps (ints ≥ 0) or shares of all steps (floats "
            "between 0 and 1) in a tuple, such as (7, 10)."
        )
    return tuple(step for step in steps if step is not None)


def refuse_together(setting: str, others: Iterable[tuple[str, bool]], why: str) -> None:
    """Raise `ArgumentError` for the first of the other settings that is given together with this one."""
    for given, clashes in others:
        if clashes:
            raise ArgumentError(
                f"{setting} was given with {given}: expected one or the other, since {why}. Leave one out."
            )
