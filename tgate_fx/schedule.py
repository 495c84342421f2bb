"""Which phase a step is in: plain Python, no tensors.

A *step* is one evaluation of the denoiser, counted from 0 within one generation. The rules are those of T-GATE (Zhang
et al., arXiv:2404.02747), of TGATE-V2's self-attention cache (upstream `tgate` 1.0.0), and of DeepCache (Ma et al.,
arXiv:2312.00858).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .auto_gate import AutoGate
from .checked import checked_gate_step, checked_steps, checked_weight, checked_window, refuse_together
from .errors import ArgumentError, checked_count, checked_order
from .roles import Kind, Role, Roles

AFTER_GATE = ("negative", "positive", "both", "guided")


class Step(NamedTuple):
    """What one step does.

    Attributes:
        phase: what the report calls it: "pre-gate" for a full step or "post-gate", and what it reuses besides.
        roles: what the sites do.
        keep: for each kind of site, whether what it captures is kept for later steps.
        gated: whether it is after the gate and not computed in full.
        computed: whether the denoiser runs at all: at the other steps its output is forecast.
        one_branch: whether one guidance branch alone is computed: after the gate, or where there is to be no guidance.
        full_at: the index of the last step up to this one that was computed in full.
        is_base: whether later outputs are forecast from this one's.
    """

    phase: str
    roles: Roles
    keep: tuple[bool, bool, bool]
    gated: bool
    computed: bool = True
    one_branch: bool = False
    full_at: int = 0
    is_base: bool = False


@dataclass(frozen=True)
class Schedule:
    """Step index → what the step does. `replace` it to override a field, `resolve` it for one generation.

    Attributes:
        gate_step: the first gated step: an int ≥ 1, a float in (0, 1) for that share of the steps, None for never, or
            an `AutoGate` until it opens; "auto" is one.
        sp_interval: before the gate, self-attention is computed at `warm_up` and later at every multiple of this, and
            its cached output used at the steps between.
        fi_interval: from the gate on, self-attention is computed at every multiple of this.
        warm_up: the first step whose self-attention is cached.
        deep_interval: the deep branch of the UNet is computed at every multiple of this, counted anew from the last
            step before the gate and from the gate, and from the step after each full one; None: always.
        deep_order: what stands in for it between: 0 for the last one, 1 for the straight line through the last two.
        after_gate: which guidance branch goes on after the gate: "negative", "positive" or "both"; "guided" is
            "positive", with the difference of the branches held; None for what `settled` says.
        cache_weight: of the conditional branch, in what is cached of both; the unconditional one has the rest.
        forecast: from the gate on the denoiser is computed at every such step, counted anew from each full one, and at
            the last one.
        guidance: the steps with guidance, from the first to before the second; at the others the conditional branch
            alone is computed. None for all.
        full_steps: those that are computed in full wherever the gate is, as the last step before it is: what they
            capture is used from there on, and their branches' difference held. Floats in (0, 1) are shares.
        last: index of the last step, of a resolved schedule; None if it is not known.
        off: nothing is taken from a cache; every step is the one that captures all that the others would reuse, so
            that no graph is compiled for it alone.
    """

    gate_step: int | float | str | AutoGate | None
    sp_interval: int = 1
    fi_interval: int = 1
    warm_up: int = 0
    deep_interval: int | None = None
    deep_order: int = 0
    after_gate: str | None = None
    cache_weight: float = 0.5
    forecast: int = 1
    guidance: tuple[int, int] | None = None
    full_steps: Sequence[int | float] = ()
    last: int | None = None
    off: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "gate_step", checked_gate_step(self.gate_step))
        for name, least in (("sp_interval", 1), ("fi_interval", 1), ("warm_up", 0), ("forecast", 1)):
            object.__setattr__(self, name, checked_count(name, getattr(self, name), least=least))
        if self.deep_interval is not None:
            object.__setattr__(self, "deep_interval", checked_count("deep_interval", self.deep_interval, least=1))
        object.__setattr__(self, "deep_order", checked_order(self.deep_order))
        object.__setattr__(self, "cache_weight", checked_weight(self.cache_weight))
        named = isinstance(self.after_gate, str) and self.after_gate in AFTER_GATE
        if self.after_gate is not None and not named:
            raise ArgumentError(
                f"after_gate={self.after_gate!r} is not one of {', '.join(map(repr, AFTER_GATE))}: expected which "
                "guidance branch goes on after the gate."
            )
        if self.guidance is not None:
            object.__setattr__(self, "guidance", checked_window(self.guidance))
        object.__setattr__(self, "full_steps", checked_steps(self.full_steps))
        self._check_together()

    def _check_together(self) -> None:
        """Raise `ArgumentError` if two of the settings do not go together."""
        intervals = f"sp_interval={self.sp_interval} and fi_interval={self.fi_interval}", self.caches_self_attention
        deepcache = "deepcache", self.deep_interval is not None
        guidance = f"guidance={self.guidance}", self.guidance is not None
        after_gate = f"after_gate={self.after_gate!r}"
        if isinstance(self.gate_step, AutoGate):
            why = "any step may be the last before the gate, for which all is computed"
            refuse_together(f"gate_step={self.gate_step!r}", (intervals, deepcache, guidance), why)
            why = "the gate opens once guidance makes no difference"
            refuse_together(f"gate_step={self.gate_step!r}", ((after_gate, self.after_gate == "both"),), why)
        if self.forecast > 1:
            why = "a step that is forecast captures nothing, and guidance would multiply its error"
            clashes = (f"fi_interval={self.fi_interval}", self.fi_interval > 1), (after_gate, self.after_gate == "both")
            refuse_together(f"forecast={self.forecast}", (*clashes, deepcache), why)
        if self.guidance is not None:
            why = "where guidance ends the conditional branch goes on, for which alone nothing is cached"
            clash = after_gate, self.after_gate not in (None, "positive")
            refuse_together(guidance[0], (intervals, deepcache, clash), why)
            gate = (
                f"gate_step={self.gate_step!r}",
                isinstance(self.gate_step, int) and self.gate_step <= self.guidance[0],
            )
            refuse_together(guidance[0], (gate,), "no step before the gate would have guidance")
        if self.deep_interval is not None:
            refuse_together("deepcache", (intervals,), "the deep branch is skipped whole")

    @property
    def caches_self_attention(self) -> bool:
        """Whether there is a step that takes self-attention from the cache."""
        return self.sp_interval > 1 or self.fi_interval > 1

    @property
    def acts(self) -> bool:
        """Whether anything is taken from a cache or left out at any step."""
        caches = self.gate_step is not None or self.caches_self_attention or self.deep_interval is not None
        return (caches or self.guidance is not None) and not self.off

    @property
    def cached_kinds(self) -> tuple[Kind, ...]:
        """The kinds of site that some step may take from the cache; cross-attention is always among them."""
        cached = (True, self.caches_self_attention, self.deep_interval is not None)
        return tuple(kind for kind in Kind if cached[kind])

    @property
    def one_branch(self) -> bool:
        """Whether gated steps see one guidance branch only."""
        return self.after_gate != "both"

    @property
    def branch(self) -> str:
        """Which branch goes on after the gate, of a settled schedule: "negative", "positive" or "both"."""
        assert self.after_gate is not None
        return "positive" if self.after_gate == "guided" else self.after_gate

    def settled(self, family: str) -> Schedule:
        """Return the schedule with a branch that goes on: by itself the family's, or the only one that is cached."""
        if self.after_gate is not None:
            return self
        conditional = self.cache_weight == 1 or self.guidance is not None
        return replace(self, after_gate="positive" if conditional else family)

    def resolve(self, steps: int | None) -> Schedule:
        """Return the schedule with the gate as a step index, for a generation of ``steps`` steps (None if unknown).

        Raises:
            ArgumentError: the gate or a full step is a share, or steps are forecast, and the number of steps is
                unknown.
        """
        given = []
        if isinstance(self.gate_step, float):
            given.append(f"gate_step={self.gate_step!r} (a share of the steps)")
        if any(isinstance(step, float) for step in self.full_steps):
            given.append(f"full_steps={self.full_steps!r} (with a share of the steps)")
        if self.forecast > 1:
            given.append(f"forecast={self.forecast}")
        if self.off or not given:
            return self
        if steps is None:
            raise ArgumentError(
                f"{given[0]} was given, but this pipeline does not say how many steps it will run, which that needs: "
                "give steps as ints, and leave forecast out."
            )
        gate = max(1, round(self.gate_step * steps)) if isinstance(self.gate_step, float) else self.gate_step
        full = [round(step * steps) if isinstance(step, float) else step for step in self.full_steps]
        return replace(self, gate_step=gate, full_steps=full, last=steps - 1)

    def begun_at(self, index: int) -> Schedule:
        """Return the resolved schedule for a network that is first called at this step: there it computes everything.

        Its gate is the step after it, if it would have been before.
        """
        if self.off or index == 0:
            return self
        gate = max(self.gate_step, index + 1) if isinstance(self.gate_step, (int, float)) else self.gate_step
        return replace(self, gate_step=gate, warm_up=max(self.warm_up, index))

    def at(self, index: int) -> Step:
        """Return the step with this index, of a resolved schedule.

        Example:
            >>> [Schedule(gate_step=2).at(index).phase for index in range(4)]
            ['pre-gate', 'pre-gate', 'post-gate', 'post-gate']
        """
        return _step(self, index)


# A generation asks for its steps one by one, and the next one often asks for the same.
@functools.lru_cache(maxsize=4096)
def _step(schedule: Schedule, index: int) -> Step:
    gated = _is_gated(schedule, index)
    roles, following = _roles(schedule, index), _roles(schedule, index + 1)
    # A captured value is kept if the next step uses it: a value is reused from the very next step or never.
    auto = schedule.gate_step if isinstance(schedule.gate_step, AutoGate) and not schedule.off else None
    keep = tuple(now is Role.CAPTURE and then is Role.REUSE for now, then in zip(roles, following, strict=True))
    if auto is not None:  # any step may be the last before the gate
        keep = (index + 1 >= auto.earliest, False, False)
    phase = "post-gate" if gated else "pre-gate"
    if roles.self_attention is Role.REUSE:
        phase += ", self-attention reused"
    if roles.deep_branch is Role.REUSE:
        phase += ", shallow"
    full_at = _full_at(schedule, index)
    counted_from = max(full_at, _number(schedule.gate_step))
    computed = not gated or (index - counted_from) % schedule.forecast == 0 or index == schedule.last
    is_base = schedule.forecast > 1 and _is_past_gate(schedule, index) and computed
    start, stop = schedule.guidance or (0, math.inf)
    guided = schedule.off or start <= index < stop
    if not computed:
        phase = "forecast"
    elif not (guided or gated):
        phase += ", unguided"
    one_branch = not guided or (gated and schedule.one_branch)
    return Step(phase, roles, (keep[0], keep[1], keep[2]), gated, computed, one_branch, full_at, is_base)


def _is_past_gate(schedule: Schedule, index: int) -> bool:
    return not schedule.off and isinstance(schedule.gate_step, (int, float)) and index >= schedule.gate_step


def _is_gated(schedule: Schedule, index: int) -> bool:
    return _full_at(schedule, index) < index


def _full_at(schedule: Schedule, index: int) -> int:
    """Return the index of the last step up to this one that is computed in full."""
    if not _is_past_gate(schedule, index):
        return index
    gate = _number(schedule.gate_step)
    full = (step for step in schedule.full_steps if isinstance(step, int) and gate <= step <= index)
    return max(full, default=gate - 1)


def _roles(schedule: Schedule, index: int) -> Roles:
    if schedule.off:
        return Roles(
            Role.CAPTURE,
            Role.CAPTURE if schedule.caches_self_attention else Role.LIVE,
            Role.LIVE if schedule.deep_interval is None else Role.CAPTURE,
        )
    gated = _is_gated(schedule, index)
    # The last step before the gate, and every full one after it, have to serve those that follow.
    serves_all = not gated and _is_past_gate(schedule, index + 1)
    self_attention = Role.LIVE
    if schedule.caches_self_attention and not (gated and schedule.fi_interval == 1):
        # Where it is computed it is also captured, so that one graph serves both.
        interval = schedule.fi_interval if gated else schedule.sp_interval
        due = index % interval == 0 or serves_all or (not gated and index <= schedule.warm_up)
        self_attention = Role.CAPTURE if due else Role.REUSE
    deep_branch = Role.LIVE
    if schedule.deep_interval is not None:
        start = _full_at(schedule, index) + 1 if gated else 0
        due = serves_all or (index - start) % schedule.deep_interval == 0
        deep_branch = Role.CAPTURE if due else Role.REUSE
    if gated:
        cross_attention = Role.REUSE
    else:
        # A step that reuses something serves no later one with its cross-attention.
        reuses = Role.REUSE in (self_attention, deep_branch)
        cross_attention = Role.LIVE if reuses else Role.CAPTURE
    return Roles(cross_attention, self_attention, deep_branch)


def _number(gate_step: object) -> int:
    return gate_step if isinstance(gate_step, int) else 0
