"""What the pages of docs show is what happens."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.slow
def test_the_page_on_graphs() -> None:
    with torch.no_grad():
        result = doctest.testfile(str(DOCS / "graphs.md"), module_relative=False, encoding="utf-8")
    assert result.attempted > 15
    assert result.failed == 0


@pytest.mark.slow
@pytest.mark.skipif(
    diffusers.__version__ not in (DOCS / "pipelines.md").read_text(), reason="the page is of another diffusers"
)
def test_the_page_on_pipelines_is_what_its_command_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.pipelines", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, cwd=DOCS.parent)
    assert (tmp_path / "page.md").read_text() == (DOCS / "pipelines.md").read_text()
