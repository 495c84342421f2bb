"""The classes of other packages, known by their names: diffusers takes seconds to import."""

from __future__ import annotations


def class_names(cls: type) -> frozenset[str]:
    """Return the names of a class and of all that it inherits from."""
    return frozenset(base.__name__ for base in cls.__mro__)
