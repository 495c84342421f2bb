"""What the pages of docs show is what happens."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_on_graphs() -> None:
    with torch.no_grad():
        result = doctest.testfile(str(DOCS / "graphs.md"), module_relative=False, encoding="utf-8")
    assert result.attempted > 15
    assert result.failed == 0
