"""Kinds of site, and the role that each kind plays in a phase: plain Python, no tensors."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.IntEnum):
    """What a site is. Sequences with one item for each kind use this order."""

    CROSS_ATTENTION = 0
    SELF_ATTENTION = 1
    DEEP_BRANCH = 2

    @property
    def title(self) -> str:
        """What people call it."""
        return _TITLES[self]


_TITLES = ("cross-attention", "self-attention", "deep branch")


class Role(enum.Enum):
    """What a site does in a phase."""

    LIVE = "live"  # compute
    CAPTURE = "capture"  # compute, and hand the value out
    REUSE = "reuse"  # return the cached value; compute nothing
    SKIP = "skip"  # compute nothing: the value is not used


class Roles(NamedTuple):
    """A role for every kind of site."""

    cross_attention: Role = Role.LIVE
    self_attention: Role = Role.LIVE
    deep_branch: Role = Role.LIVE

    def capturing(self) -> Roles:
        """Return the roles that capture what these reuse, everything else being LIVE."""
        return Roles(*[Role.CAPTURE if role is Role.REUSE else Role.LIVE for role in self])
