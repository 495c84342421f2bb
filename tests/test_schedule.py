"""The schedule, as literal step tables."""

from __future__ import annotations

import math

import pytest

import tgate_fx
from tgate_fx.schedule import Schedule, check_after_gate, check_gate_step, resolve_gate

# L: pre-gate; K: pre-gate, and what it captures is kept; g: post-gate
TABLES = {
    None: "LLLLLL",
    1: "Kggggg",
    2: "LKgggg",
    3: "LLKggg",
    5: "LLLLKg",
    6: "LLLLLK",
    9: "LLLLLL",
}


def letters(schedule: Schedule, steps: int) -> str:
    table = ""
    for index in range(steps):
        phase, keep = schedule.at(index)
        table += "g" if phase.name == "post-gate" else "K" if keep else "L"
    return table


@pytest.mark.parametrize(("gate", "table"), TABLES.items())
def test_step_table(gate: int | None, table: str) -> None:
    assert letters(Schedule(gate), 6) == table


@pytest.mark.parametrize(("after_gate", "one_branch"), [("negative", True), ("positive", True), ("both", False)])
def test_batch_rule(after_gate: str, one_branch: bool) -> None:
    schedule = Schedule(2, after_gate)
    assert not schedule.at(1).phase.one_branch
    assert schedule.at(2).phase.one_branch is one_branch


@pytest.mark.parametrize(
    ("gate_step", "steps", "gate"),
    [
        (None, 10, None),
        (None, None, None),
        (1, 10, 1),
        (9, 10, 9),
        (10, 10, None),
        (11, 10, None),
        (7, None, 7),
        (0.4, 25, 10),
        (0.5, 9, 4),  # round(4.5) is 4: Python rounds halves to even
        (0.01, 10, 1),
        (0.99, 10, None),
        (0.9, 10, 9),
    ],
)
def test_resolve(gate_step: int | float | None, steps: int | None, gate: int | None) -> None:
    assert resolve_gate(gate_step, steps) == gate


def test_a_share_of_an_unknown_number_of_steps_is_refused() -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=r"gate_step=0\.4 is a share.*give gate_step as an int"):
        resolve_gate(0.4, None)


@pytest.mark.parametrize("value", [1, 25, 0.01, 0.5, 0.99, None])
def test_valid_gate_steps(value: object) -> None:
    assert check_gate_step(value) == value


@pytest.mark.parametrize("value", [0, -1, True, False, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, "10", [10], 3j])
def test_invalid_gate_steps(value: object) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match="expected an int ≥ 1") as error:
        check_gate_step(value)
    assert repr(value) in str(error.value)
    assert type(value).__name__ in str(error.value)


@pytest.mark.parametrize("value", ["neg", "", None, 1, ["negative"]])
def test_invalid_after_gate(value: object) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match="'negative', 'positive', 'both'"):
        check_after_gate(value)
