"""Quantized denoisers: gated and compiled, at what the quantized model itself computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tgate_fx
from tests import oracle, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says

torchao = pytest.importorskip("torchao.quantization")
quanto = pytest.importorskip("optimum.quanto")

GATE = 2


def by_torchao(config: Any) -> Callable[[nn.Module], None]:
    return lambda module: torchao.quantize_(module, config)


def by_quanto(module: nn.Module) -> None:
    quanto.quantize(module, weights=quanto.qint8)
    quanto.freeze(module)


HOW: dict[str, Callable[[nn.Module], None]] = {
    "torchao int8": by_torchao(torchao.Int8WeightOnlyConfig()),
    "torchao int8 dynamic": by_torchao(torchao.Int8DynamicActivationInt8WeightConfig()),
    "quanto int8": by_quanto,
}
# Activations that are a bit off are sometimes rounded to another of 256 values: the model itself is 1e-2 off the dense.
TOLERANCE = {"torchao int8": 1e-5, "torchao int8 dynamic": 1e-3, "quanto int8": 1e-5}


def kwargs(family: str) -> dict[str, Any]:
    return {**tiny.inputs(family), "num_inference_steps": 4}


@pytest.mark.parametrize("how", tiny.slow_but(("torchao int8",), HOW))
@pytest.mark.parametrize("family", tiny.slow_but(("pixart-small",), ("sd-small", "pixart-small")))
@pytest.mark.parametrize("before", [True, False])
def test_gated(how: str, family: str, before: bool, backend: CountingBackend) -> None:
    plain, pipe, compiled = (tiny.make(family) for _ in range(3))
    sites = [name for name, _ in tgate_fx.sites(plain)]
    HOW[how](tiny.denoiser(plain))
    network = oracle.Network(tiny.denoiser(plain), sites)
    expected = oracle.gated([network], lambda: tiny.latents(plain, **kwargs(family)), GATE, "batch", keep="negative")
    dense = tiny.latents(tgate_fx.gate(tiny.make(family), GATE), **kwargs(family))
    for each in (pipe, compiled):
        if before:
            HOW[how](tiny.denoiser(each))
    tgate_fx.gate(pipe, GATE)
    tgate_fx.compile(compiled, GATE, backend=backend)
    for each in (pipe, compiled):
        if not before:
            HOW[how](tiny.denoiser(each))
        for _ in range(2):
            assert relative_error(tiny.latents(each, **kwargs(family)), expected) < TOLERANCE[how]
    assert not torch.equal(expected, dense)
    assert len(backend.graphs) == 2


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_does_not_freeze_quantized_weights() -> None:
    pipe, eager = tiny.make("pixart-small"), tiny.make("pixart-small")
    tgate_fx.compile(pipe, GATE)
    for each in (pipe, eager):
        HOW["torchao int8"](each.transformer)
    tgate_fx.gate(eager, GATE)
    results = [tiny.latents(each, **kwargs("pixart-small")) for each in (pipe, eager)]
    assert relative_error(*results) < 1e-3
    assert "freezing=False" in tgate_fx.report(pipe).compiler


@pytest.mark.slow
def test_freezing_of_quantized_weights_is_refused_if_asked_for() -> None:
    pipe = tiny.make("pixart-small")
    by_quanto(pipe.transformer)
    tgate_fx.compile(pipe, GATE, options={"freezing": True})
    with pytest.raises(tgate_fx.UnsupportedError, match=says("WeightQBytesTensor", "cannot be read", "freezing")):
        tiny.latents(pipe, **kwargs("pixart-small"))


@pytest.mark.parametrize("how", HOW)
def test_packages_of_quantized_weights_are_refused(how: str, tmp_path: Path) -> None:
    """Packages would hold them by names of their own, where nothing compares them."""
    pipe = tiny.make("sd-small")
    HOW[how](pipe.unet)
    tgate_fx.compile(pipe, GATE)
    message = says("of pipe.unet is quantized", "expected dense ones", "tgate_fx.warmup in every process")
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        tgate_fx.save(pipe, tmp_path / "artifact", height=16, width=16)
    assert list(tmp_path.iterdir()) == []
