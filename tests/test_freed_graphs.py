"""What compiled graphs hold is freed when nothing can run them any more."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tgate_fx
from tests import tiny
from tgate_fx.compiled.frozen_weights import FrozenWeights
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.compiled.variant import Variant

KWARGS = {**tiny.inputs("pixart-small"), "num_inference_steps": 3}


def collect() -> None:
    """Twice, since what the first collection finds lets go of more."""
    gc.collect()
    gc.collect()


class WeakBackend:
    """Runs graphs with copies of the weights, as inductor's frozen ones do, and does not keep them itself."""

    def __init__(self) -> None:
        self.graphs: list[weakref.ref[torch.fx.GraphModule]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        held = copy.deepcopy(graph)
        self.graphs.append(weakref.ref(held))
        return lambda *args: held.forward(*args)

    def alive(self) -> int:
        collect()
        return sum(graph() is not None for graph in self.graphs)


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> WeakBackend:
    monkeypatch.setattr(CompileSettings, "freezes", lambda *_: True)
    return WeakBackend()


@pytest.mark.slow
def test_graphs_are_freed_when_weights_change_and_all_else_when_the_pipeline_is_restored(freezing: WeakBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("pixart-small"), gate_step=1, backend=freezing)
    for graphs in (2, 4):
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.1)
        tiny.latents(pipe, **KWARGS)
        assert len(freezing.graphs) == graphs
        assert freezing.alive() == 2
    denoiser = weakref.ref(pipe.transformer)
    buffers = [weakref.ref(buffer) for buffer in pipe._tgate.networks[0].cache.buffers()]
    assert buffers
    tgate_fx.restore(pipe)
    assert freezing.alive() == 0
    assert all(buffer() is None for buffer in buffers)
    del pipe
    collect()
    assert denoiser() is None


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="weights are packed by oneDNN")  # type: ignore[no-untyped-call]
@torch.no_grad()
def test_frozen_graphs_share_the_packed_weights_that_are_equal() -> None:
    codecache = pytest.importorskip("torch._inductor.codecache")
    layers = [nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)]
    layer = nn.Sequential(*layers).requires_grad_(False)
    other = copy.deepcopy(layer)
    other[0].weight[0, 0, 0, 0] += 1  # the second weight stays as it is
    before = len(codecache.PyCodeCache.modules)

    def packed() -> list[torch.Tensor]:
        collect()
        made = codecache.PyCodeCache.modules[before:]
        values = [value for module in made for value in vars(module).values()]
        return [value for value in values if isinstance(value, torch.Tensor) and value.is_mkldnn]

    values = torch.randn(1, 8, 16, 16)
    variants = []
    for computed, expected in ((layer, 2), (layer, 2), (other, 3)):

        def run(values: torch.Tensor, layer: nn.Module = computed) -> torch.Tensor:
            result: torch.Tensor = layer(values)
            return result

        variants.append(Variant(run, "phase", CompileSettings(), values.device, FrozenWeights(computed)))
        for _ in range(2):
            torch.testing.assert_close(variants[-1](values), computed(values))
        assert len({id(value) for value in packed()}) == expected
        assert len(packed()) == 2 * len(variants)
    held = [weakref.ref(value) for value in packed()]
    del variants[0]
    torch.testing.assert_close(variants[0](values), layer(values))
    variants.clear()
    collect()
    assert all(value() is None for value in held)


@pytest.mark.slow
@pytest.mark.inductor
def test_inductors_modules_of_frozen_graphs_give_up_the_weights() -> None:
    codecache = pytest.importorskip("torch._inductor.codecache")
    layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    held = FrozenWeights(layer)
    before = len(codecache.PyCodeCache.modules)

    def run(values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(values)
        return result

    def tensors() -> int:
        collect()
        made = codecache.PyCodeCache.modules[before:]
        return sum(isinstance(value, torch.Tensor) for module in made for value in vars(module).values())

    values = torch.randn(3, 64)
    variants = [Variant(run, name, CompileSettings(), values.device, held) for name in ("first", "second")]
    with torch.no_grad():
        for variant in variants:
            torch.testing.assert_close(variant(values), layer(values))
    each = tensors() // 2
    assert each >= 2
    variant = variants.pop()
    del variants
    assert tensors() == each
    with torch.no_grad():
        torch.testing.assert_close(variant(values), layer(values))
