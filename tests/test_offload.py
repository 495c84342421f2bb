"""Weights that rest elsewhere or in another dtype, and what hooks keep out of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import tgate_fx
from tests import oracle, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says
from tests.test_regional import blocks_share_graphs

GATE = 2
CPU = torch.device("cpu")
FAMILY = "pixart-alpha"
KWARGS = {**tiny.inputs(FAMILY), "num_inference_steps": 4}


def sequential(pipe: Any) -> None:
    """As enable_sequential_cpu_offload does, which takes no CPU to compute on."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            accelerate.cpu_offload(model, execution_device=CPU)


def by_groups(level: str, **settings: Any) -> Callable[[Any], None]:
    def offload(pipe: Any) -> None:
        try:
            pipe.transformer.enable_group_offload(CPU, CPU, offload_type=level, **settings)
        except AttributeError:
            if torch.accelerator.current_accelerator() is None and diffusers.__version__ < "0.36":
                pytest.skip("this diffusers offloads groups on a machine with an accelerator only")
            raise

    return offload


def mapped(pipe: Any) -> None:
    """As from_pretrained(..., device_map="balanced") does."""
    for model in pipe.components.values():
        if isinstance(model, nn.Module):
            accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    pipe.hf_device_map = dict.fromkeys(pipe.components, "cpu")


def casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


HOW: dict[str, Callable[[Any], None]] = {
    "sequential": sequential,
    "leaf": by_groups("leaf_level"),
    "block": by_groups("block_level", num_blocks_per_group=1),
    "casting": casting,
    "mapped": mapped,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("before", [True, False])
def test_gated_eagerly(how: str, before: bool) -> None:
    plain = tiny.make(FAMILY)
    HOW[how](plain)

    def generate() -> torch.Tensor:
        return tiny.latents(plain, **KWARGS)

    sites = [name for name, _ in tgate_fx.sites(tiny.make(FAMILY))]
    network = oracle.Network(plain.transformer, sites)
    expected = oracle.gated([network], generate, GATE, "batch", keep="negative")
    pipe = tiny.make(FAMILY)
    if before:
        HOW[how](pipe)
    tgate_fx.gate(pipe, GATE)
    if not before:
        HOW[how](pipe)
    for _ in range(2):
        assert relative_error(tiny.latents(pipe, **KWARGS), expected) < 1e-5
    assert tgate_fx.report(pipe).gate == GATE


@blocks_share_graphs
def test_blocks_are_compiled_beneath_group_offloading(backend: CountingBackend) -> None:
    expected = tiny.latents(tgate_fx.gate(tiny.make(FAMILY), GATE), **KWARGS)
    pipe = tgate_fx.compile(tiny.make(FAMILY), GATE, regional=True, backend=backend)
    HOW["block"](pipe)
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, **KWARGS), expected)
    assert tgate_fx.report(pipe).recompiles == 0
    assert len(backend.graphs) == 2


SAYS = {
    "sequential": ("enable_sequential_cpu_offload", "Call enable_model_cpu_offload instead", "tgate_fx.gate"),
    "leaf": ("group offloading", "regional=True", "only then", 'offload_type="block_level"', "tgate_fx.gate"),
    "block": ("group offloading", "regional=True", "only then", 'offload_type="block_level"', "tgate_fx.gate"),
    "casting": ("layerwise casting", "Quantize the weights", "tgate_fx.gate"),
    "mapped": ("a device map", "pipe.reset_device_map()", "tgate_fx.gate"),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("regional", [False, True])
def test_what_cannot_be_compiled_is_refused(how: str, before: bool, regional: bool, backend: CountingBackend) -> None:
    if how == "block" and regional and not before:
        pytest.skip("works: see above")
    pipe = tiny.make(FAMILY)
    if before:
        HOW[how](pipe)
    tgate_fx.compile(pipe, GATE, regional=regional, backend=backend)
    if not before:
        HOW[how](pipe)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pipe.transformer", *SAYS[how])):
        pipe(**KWARGS)
    assert backend.graphs == []
    tgate_fx.restore(pipe)
    tgate_fx.gate(pipe, GATE)
    assert torch.isfinite(tiny.latents(pipe, **KWARGS)).all()


def test_a_device_map_is_left_as_the_refusal_says(backend: CountingBackend) -> None:
    expected = tiny.latents(tgate_fx.gate(tiny.make(FAMILY), GATE), **KWARGS)
    pipe = tiny.make(FAMILY)
    mapped(pipe)
    tgate_fx.compile(pipe, GATE, backend=backend)
    with pytest.raises(tgate_fx.UnsupportedError, match="reset_device_map"):
        pipe(**KWARGS)
    pipe.reset_device_map()
    pipe.to("cpu")
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_merged_tokens_are_refused_when_compiled(backend: CountingBackend) -> None:
    """tomesd puts a class of its own in place of each block's, which makes random generators as it runs."""
    pipe = tiny.make("sd-small")
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    expected = tiny.latents(tgate_fx.gate(tiny.make("sd-small"), GATE), **kwargs)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    plain = type(block)
    block.__class__ = type("ToMeBlock", (plain,), {})
    tgate_fx.compile(pipe, GATE, backend=backend)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("token merging", "tomesd.remove_patch", "tgate_fx.gate")):
        pipe(**kwargs)
    block.__class__ = plain
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
