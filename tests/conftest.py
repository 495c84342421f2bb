from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.zoo import IS_OLD
from tgate_fx import commands
from tgate_fx.compiled.settings import CompileSettings

collect_ignore = ["test_settings.py"] if IS_OLD else []  # of pipelines that an older diffusers lacks

# Tiny tensors gain nothing from threads, and the tests run in several processes.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, which it would go through again and again while torch compiles."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.fixture(autouse=True)
def _seeded_and_fresh() -> Iterator[None]:
    """Each test begins with the same random state and leaves no compiled graph behind."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class CountingBackend:
    """A torch.compile backend that runs graphs as they are, keeps them, and counts their runs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.ran = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        self.graphs.append(graph)

        def run(*args: object) -> object:
            self.ran += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run ``tgate-fx`` with these arguments on a wide terminal; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tgate-fx", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    try:
        commands.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def check_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], message: str, *arguments: object
) -> None:
    """See that ``tgate-fx`` ends with exit code 2 and says this in one line."""
    assert run(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.fixture
def freezing(backend: CountingBackend, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend whose graphs hold weights: Dynamo takes these as constants, and it copies them as inductor does."""
    monkeypatch.setattr(CompileSettings, "freezes", lambda *_: True)
    return lambda graph, inputs: backend(copy.deepcopy(graph), inputs)
