"""Which phase a step is in: plain Python, no tensors.

A *step* is one evaluation of the denoiser, counted from 0 within one generation.
The rules are those of T-GATE (Zhang et al., arXiv:2404.02747): steps before ``gate_step`` are ordinary; the last of
them leaves the cross-attention outputs behind; from ``gate_step`` on they are constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .errors import ArgumentError
from .sites import Role

AFTER_GATE = ("negative", "positive", "both")


class Roles(NamedTuple):
    """A role for every kind of site."""

    cross_attention: Role


class Phase(NamedTuple):
    """A role for every kind of site, plus a batch rule.

    Attributes:
        name: what the report calls it.
        roles: what the sites do.
        one_branch: whether a classifier-free-guidance batch is cut down to one of its branches.
    """

    name: str
    roles: Roles
    one_branch: bool


PRE_GATE = Phase("pre-gate", Roles(Role.CAPTURE), one_branch=False)
POST_GATE = Phase("post-gate", Roles(Role.REUSE), one_branch=True)
POST_GATE_BOTH = POST_GATE._replace(one_branch=False)


class Step(NamedTuple):
    """What one step does: its phase, and whether what it captures is kept for later steps."""

    phase: Phase
    keep: bool


@dataclass(frozen=True)
class Schedule:
    """Step index → phase, for one generation whose gate is known.

    Attributes:
        gate: index of the first gated step (≥ 1), or None for a generation that is never gated.
        after_gate: which guidance branch goes on after the gate: "negative", "positive" or "both".
    """

    gate: int | None
    after_gate: str = "negative"

    @property
    def one_branch(self) -> bool:
        """Whether gated steps see one guidance branch only."""
        return self.after_gate != "both"

    def at(self, index: int) -> Step:
        """The step with this index."""
        if self.gate is None or index < self.gate - 1:
            return Step(PRE_GATE, keep=False)
        if index == self.gate - 1:
            return Step(PRE_GATE, keep=True)
        return Step(POST_GATE if self.one_branch else POST_GATE_BOTH, keep=False)


def check_gate_step(value: object) -> int | float | None:
    """Return ``value`` if it is a valid ``gate_step``.

    Raises:
        ArgumentError: it is not an int ≥ 1, a float in (0, 1), or None.
    """
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    raise ArgumentError(
        f"gate_step={value!r} ({type(value).__name__}) is not a gate step: expected an int ≥ 1 (the index of the first "
        "gated step), a float between 0 and 1 (that share of the steps), or None (never gated)."
    )


def check_after_gate(value: object) -> str:
    """Return ``value`` if it is a valid ``after_gate``; raise `ArgumentError` otherwise."""
    if isinstance(value, str) and value in AFTER_GATE:
        return value
    raise ArgumentError(f"after_gate={value!r} is not one of {', '.join(map(repr, AFTER_GATE))}.")


def resolve_gate(gate_step: int | float | None, steps: int | None) -> int | None:
    """The index of the first gated step in a generation of ``steps`` steps; None where no step would be gated.

    Args:
        gate_step: as `check_gate_step` allows.
        steps: how many steps the generation has, or None if that is unknown.

    Raises:
        ArgumentError: ``gate_step`` is a share and the number of steps is unknown.
    """
    if gate_step is None:
        return None
    if isinstance(gate_step, float):
        if steps is None:
            raise ArgumentError(
                f"gate_step={gate_step!r} is a share of the steps, but this pipeline does not say how many steps it "
                "will run: give gate_step as an int."
            )
        gate_step = max(1, round(gate_step * steps))
    return None if steps is not None and gate_step >= steps else gate_step
