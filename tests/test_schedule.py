"""The schedule, as literal step tables, and against upstream's own scheduler function."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tgate.tgate_utils import tgate_scheduler

import tgate_fx
from tgate_fx.checked import checked_gate_step
from tgate_fx.roles import Role
from tgate_fx.schedule import Schedule

ROLE = {Role.LIVE: "L", Role.CAPTURE: "C", Role.REUSE: "R"}


def table(schedule: Schedule, kind: str, steps: int) -> str:
    """The roles of one kind of site, step by step: Live, Capture (K where it is kept), Reuse."""
    letters = ""
    for index in range(steps):
        step = schedule.at(index)
        position = step.roles._fields.index(kind)
        letters += "K" if step.keep[position] else ROLE[step.roles[position]]
    return letters


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (None, "CCCCCC"),
        (1, "KRRRRR"),
        (2, "CKRRRR"),
        (3, "CCKRRR"),
        (5, "CCCCKR"),
        (6, "CCCCCK"),
        (9, "CCCCCC"),
    ],
)
def test_cross_attention(gate: int | None, expected: str) -> None:
    schedule = Schedule(gate)
    assert table(schedule, "cross_attention", 6) == expected
    assert table(schedule, "self_attention", 6) == "LLLLLL"
    assert table(schedule, "deep_branch", 6) == "LLLLLL"
    assert [schedule.at(index).gated for index in range(6)] == [letter == "R" for letter in expected]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"gate_step": 10, "sp_interval": 5, "warm_up": 2}, "CCKRRKRRRCLLLL"),
        ({"gate_step": 9, "sp_interval": 3, "warm_up": 2}, "CCCKRRKRCLLL"),
        ({"gate_step": 5, "sp_interval": 2, "fi_interval": 2, "warm_up": 1}, "CCKRKRKRKR"),
        ({"gate_step": 4, "fi_interval": 3}, "CCCKRRKRRKRR"),
        ({"gate_step": 6, "fi_interval": 3}, "CCCCCCKRRKRR"),
        ({"gate_step": 1, "sp_interval": 4, "fi_interval": 2}, "KRKRKRKR"),
        ({"gate_step": None, "sp_interval": 3}, "KRRKRRKRR"),
        ({"gate_step": None, "sp_interval": 3, "warm_up": 4}, "CCCCKRKRRK"),
        ({"gate_step": 7, "sp_interval": 5, "warm_up": 9}, "CCCCCCCLLL"),
        ({"gate_step": 4, "sp_interval": 2, "warm_up": 0}, "KRCCLL"),
    ],
)
def test_self_attention(settings: dict[str, Any], expected: str) -> None:
    assert table(Schedule(**settings), "self_attention", len(expected)) == expected


@pytest.mark.parametrize(
    ("gate", "interval", "expected"),
    [
        (None, 3, "KRRKRRKRR"),
        (5, 3, "KRRCCKRRKRRK"),  # full at gate - 1 and at the gate, and counted from there
        (6, 3, "KRRKRCKRRKRR"),
        (1, 2, "CKRKRKRK"),
        (4, 1, "CCCCCCCC"),
        (2, 5, "CCKRRRRK"),
    ],
)
def test_deep_branch(gate: int | None, interval: int, expected: str) -> None:
    assert table(Schedule(gate, deep_interval=interval), "deep_branch", len(expected)) == expected


@given(
    gate=st.integers(1, 30),
    sp_interval=st.integers(1, 30),
    fi_interval=st.integers(1, 30),
    warm_up=st.integers(0, 30),
)
def test_agrees_with_upstreams_scheduler(gate: int, sp_interval: int, fi_interval: int, warm_up: int) -> None:
    schedule = Schedule(gate, sp_interval, fi_interval, warm_up)
    intervals = {"sp_interval": sp_interval, "fi_interval": fi_interval, "warm_up": warm_up}
    for index in range(30):
        cross, self_, keep_shape = tgate_scheduler(index, gate, **intervals)
        step = schedule.at(index)
        assert (step.roles.cross_attention is Role.REUSE) == cross["reuse"]
        assert (step.roles.self_attention is Role.REUSE) == self_["reuse"]
        assert step.gated == (index >= gate)
        assert keep_shape == (index != gate - 1)
        if cross["cache"]:
            assert step.keep[0]
            assert step.roles.self_attention is not Role.REUSE
        # Upstream caches wherever it may; what a later step reads must have been kept.
        if schedule.at(index + 1).roles.self_attention is Role.REUSE and not self_["reuse"]:
            assert self_["cache"]
            assert step.keep[1]


@given(gate=st.integers(1, 30), settings=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)))
def test_as_few_kinds_of_step_as_the_readme_says(gate: int, settings: tuple[int, int, int]) -> None:
    """Each set of roles is a graph: two, one more for each self-attention interval, one more a phase for DeepCache."""
    sp_interval, fi_interval, _ = settings
    graphs = {Schedule(gate, *settings).at(index).roles for index in range(60)}
    assert len(graphs) <= 2 + (sp_interval > 1) + (fi_interval > 1)
    assert len({Schedule(gate, deep_interval=sp_interval).at(index).roles for index in range(60)}) <= (
        4 if sp_interval > 1 else 2
    )


@pytest.mark.parametrize(
    ("gate_step", "steps", "gate"),
    [
        (None, 10, None),
        (None, None, None),
        (1, 10, 1),
        (11, 10, 11),
        (7, None, 7),
        (0.4, 25, 10),
        (0.5, 9, 4),  # round(4.5) is 4: Python rounds halves to even
        (0.01, 10, 1),
        (0.99, 10, 10),
        (0.9, 10, 9),
    ],
)
def test_resolve(gate_step: int | float | None, steps: int | None, gate: int | None) -> None:
    assert Schedule(gate_step).resolve(steps).gate_step == gate


def test_a_share_of_an_unknown_number_of_steps_is_refused() -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=r"gate_step=0\.4 \(a share.*give steps as ints"):
        Schedule(0.4).resolve(None)


@pytest.mark.parametrize("value", [1, 25, 0.01, 0.5, 0.99, None])
def test_valid_gate_steps(value: Any) -> None:
    assert Schedule(value).gate_step == value


@pytest.mark.parametrize("value", [0, -1, True, False, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, "10", [10], 3j])
def test_invalid_gate_steps(value: object) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match="expected an int ≥ 1") as error:
        checked_gate_step(value)
    assert repr(value) in str(error.value)
    assert type(value).__name__ in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("sp_interval", "fi_interval") for value in (0, -2, 1.5, True, None, "3")]
    + [("warm_up", value) for value in (-1, 0.5, True, None)],
)
def test_invalid_intervals(name: str, value: Any) -> None:
    least = 0 if name == "warm_up" else 1
    with pytest.raises(tgate_fx.ArgumentError, match=f"{name}={value!r}.*expected an int ≥ {least}"):
        Schedule(5, **{name: value})


def test_intervals_and_deepcache_together_are_refused() -> None:
    for intervals in ({"sp_interval": 2}, {"fi_interval": 3}):
        with pytest.raises(tgate_fx.ArgumentError, match=r"deepcache was given with sp_interval=.*Leave one out"):
            Schedule(5, deep_interval=3, **intervals)


@pytest.mark.parametrize("value", ["neg", "", 1])
def test_invalid_after_gate(value: Any) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match="'negative', 'positive', 'both', 'guided'"):
        Schedule(5, after_gate=value)


@pytest.mark.parametrize("settings", [{}, {"sp_interval": 2, "warm_up": 1}, {"fi_interval": 3}, {"deep_interval": 2}])
def test_off_captures_what_the_others_reuse_and_keeps_nothing(settings: dict[str, Any]) -> None:
    schedule = Schedule(0.5, **settings, off=True).resolve(None)
    assert not schedule.acts
    expected = Schedule(3, **settings).at(0).roles  # the step that captures everything
    for index in range(8):
        step = schedule.at(index)
        assert step.roles == expected
        assert step.keep == (False, False, False)
        assert step.phase == "pre-gate"
        assert not step.gated


def test_numbers_of_numpy_are_numbers() -> None:
    half = numpy.float32(0.5)
    schedule = Schedule(gate_step=half, cache_weight=half, full_steps=(half, numpy.int64(3)))
    assert schedule == Schedule(gate_step=0.5, cache_weight=0.5, full_steps=(0.5, 3))
    assert {type(value) for value in (schedule.gate_step, schedule.cache_weight, schedule.full_steps[0])} == {float}
    assert tgate_fx.AutoGate(half) == tgate_fx.AutoGate(0.5)


@pytest.mark.parametrize("name", ["gate_step", "cache_weight", "after_gate", "full_steps", "guidance"])
@pytest.mark.parametrize("value", ["0.7", b"\x01", bytearray(b"\x01"), numpy.array([1, 2]), {}, object()])
def test_what_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=f"^{name}="):
        Schedule(**{"gate_step": 5, name: value})


@pytest.mark.parametrize("name", ["gate_step", "cache_weight", "full_steps"])
def test_numbers_too_large(name: str) -> None:
    huge = 10**400
    given: dict[str, Any] = {"gate_step": 5, name: (huge,) if name == "full_steps" else huge}
    if name == "cache_weight":
        with pytest.raises(tgate_fx.ArgumentError, match="is not a weight"):
            Schedule(**given)
    else:
        assert Schedule(**given).at(3).phase == "pre-gate"


def test_integers_of_numpy_are_integers() -> None:
    schedule = Schedule(gate_step=numpy.int64(3), sp_interval=numpy.int32(2), warm_up=numpy.uint8(1))
    assert schedule == Schedule(gate_step=3, sp_interval=2, warm_up=1)
    assert {type(value) for value in (schedule.gate_step, schedule.sp_interval, schedule.warm_up)} == {int}
    assert tgate_fx.DeepCache(numpy.int64(2), numpy.int64(1)) == tgate_fx.DeepCache(2, 1)
    with pytest.raises(tgate_fx.ArgumentError, match="expected an int"):
        Schedule(gate_step=numpy.bool_(True))
