"""Unknown keywords as errors of tgate_fx, under signatures that editors and type checkers can read."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from .errors import ArgumentError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise `ArgumentError` if a keyword is given that is not known."""
    unknown = [name for name in given if name not in known]
    if unknown:
        meant = difflib.get_close_matches(unknown[0], known, n=1)
        raise ArgumentError(
            f"Unknown keyword {', '.join(unknown)}: expected one of {', '.join(known)}."
            + (f" Did you mean {meant[0]}?" if meant else "")
        )


def check_not_misspelt(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise `ArgumentError` if a keyword is given that is not known, and was very likely meant to be one that is."""
    check_known([name for name in given if difflib.get_close_matches(name, known, n=1, cutoff=0.8)], known)


def refuse_unknown(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function to raise `ArgumentError`, not Python's ``TypeError``, for a keyword that it does not take."""
    parameters = inspect.signature(function).parameters
    known = tuple(name for name, each in parameters.items() if each.default is not each.empty)

    @functools.wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        check_known([name for name in kwargs if name not in parameters], known)
        return function(*args, **kwargs)

    return checked
