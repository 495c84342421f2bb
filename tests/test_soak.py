"""A short run of the soak that benchmarks/soak.py runs for long."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.soak import soak
from tests import tiny


@pytest.mark.slow
def test_nothing_recompiles_moves_grows_or_differs() -> None:
    def make() -> Any:
        return tiny.make("sd")

    measured = soak(make, 24, warm=6, tolerance=0, sizes=(16, 24), backend="eager")
    assert measured["recompiles"] == 0
    assert not measured["caches_moved"]
    assert measured["largest_difference"] == 0
    assert measured["errors_thrown"] > 0
    assert measured["graphs"] == 6  # two sizes: with guidance and without it before the gate, and one after it
    assert measured["traced_growth_bytes"] < 50_000
