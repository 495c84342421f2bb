"""Regional compilation: few graphs for all blocks, and the same results."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_refusals import says
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.forward_patch import ForwardPatch

blocks_share_graphs = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="torch 2.9 ties a graph to each bound method, and so to each block"
)

_FIRST = ("sd", "sdxl", "pixart-alpha")
SETTINGS = [
    *[pytest.param(family, {}, marks=pytest.mark.slow if family not in _FIRST else ()) for family in tiny.DISTINCT],
    pytest.param("sd", {"sp_interval": 2, "fi_interval": 2}, marks=pytest.mark.slow),
    ("sd", {"deepcache": tgate_fx.DeepCache(interval=2, branch=0)}),
    pytest.param("sdxl", {"after_gate": "both"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_every_pipeline_gives_the_eager_result(family: str, settings: dict[str, Any], backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make(family), gate_step=2, backend=backend, regional=True, **settings)
    eager = tgate_fx.gate(tiny.make(family), gate_step=2, **settings)
    for round_, steps in enumerate((6, 8)):
        kwargs = {**tiny.inputs(family), "num_inference_steps": steps, "seed": round_}
        with torch.compiler.set_stance("fail_on_recompile" if round_ else "default"):
            got = tiny.latents(pipe, **kwargs)
        assert torch.equal(got, tiny.latents(eager, **kwargs))
    report = tgate_fx.report(pipe)
    assert report.recompiles == 0
    assert report.compiled_graphs == len(backend.graphs)


@blocks_share_graphs
def test_blocks_that_are_alike_share_a_graph(backend: CountingBackend) -> None:
    pipe = tiny.make("pixart-alpha-256")
    blocks = len(pipe.transformer.transformer_blocks)
    tgate_fx.compile(pipe, gate_step=2, backend=backend, regional=True)
    tiny.latents(pipe, **tiny.inputs("pixart-alpha-256"), num_inference_steps=4)
    assert blocks > 1
    assert len(backend.graphs) == 2
    assert backend.ran == 4 * blocks
    names = {node.name for node in backend.graphs[1].graph.nodes}
    assert not [name for name in names if "attn2" in name]


@pytest.mark.slow
def test_a_pipeline_that_shares_the_denoiser_is_compiled_whole(backend: CountingBackend) -> None:
    """Regions are there for both pipelines, and used by one."""
    first, eager = tiny.make("sd-small"), tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    second = type(first)(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    whole = CountingBackend()
    tgate_fx.compile(first, gate_step=2, backend=backend, regional=True)
    tgate_fx.compile(second, gate_step=2, backend=whole)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    for pipe in (first, second, first, second):
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(whole.graphs) == 2
    ran = backend.ran
    with torch.no_grad(), pytest.warns(UserWarning, match="outside of a generation"):
        first.unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 3, tiny.TEXT_WIDTH))
    assert backend.ran == ran  # outside of a generation nothing is compiled
    tgate_fx.restore(first)
    tgate_fx.restore(second)
    assert not [module for module in first.unet.modules() if "forward" in vars(module)]


def test_a_copied_block_is_a_plain_module(backend: CountingBackend) -> None:
    """As a copied site is: the copy has nothing to do with the denoiser any more."""
    pipe = tgate_fx.compile(tiny.make("sd"), gate_step=2, backend=backend, regional=True)
    block = pipe.unet.mid_block
    twin = copy.deepcopy(block)
    assert not [module for module in twin.modules() if isinstance(vars(module).get("forward"), ForwardPatch)]
    hidden, embedding, text = torch.randn(1, 32, 4, 4), torch.randn(1, 64), torch.randn(1, 3, tiny.TEXT_WIDTH)
    expected = block(hidden, embedding, encoder_hidden_states=text)
    assert torch.equal(twin(hidden, embedding, encoder_hidden_states=text), expected)


@blocks_share_graphs
def test_dynamic_shapes_need_no_graph_of_their_own(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("pixart-alpha-256"), gate_step=2, backend=backend, regional=True, dynamic=True)
    eager = tgate_fx.gate(tiny.make("pixart-alpha-256"), gate_step=2)
    for side in (64, 96, 128):
        kwargs = {**tiny.inputs("pixart-alpha-256"), "num_inference_steps": 4, "height": side, "width": side}
        kwargs["use_resolution_binning"] = False
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert len(backend.graphs) == 2


def test_freezing_is_off() -> None:
    settings = CompileSettings(regional=True)
    assert settings.options_for(torch.device("cpu")) is None
    assert settings.describe(torch.device("cpu")) == "torch.compile (inductor, regional)"


def test_freezing_is_refused() -> None:
    with pytest.raises(tgate_fx.UnsupportedError, match=says("regional=True", "freezing", "Leave regional out")):
        tgate_fx.compile(tiny.make("sd"), regional=True, options={"freezing": True})


def test_what_is_put_on_a_block_before_the_first_generation_is_outside_of_its_graph(backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    tgate_fx.compile(pipe, gate_step=2, backend=backend, regional=True)
    tgate_fx.gate(eager, gate_step=2)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    region = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()  # no graph could be whole with this in it
        return region(*args, **kwargs)

    block.forward = forward
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert tgate_fx.report(pipe).compiled_graphs > 0


@pytest.mark.parametrize("regional", [False, True])
def test_a_mode_reaches_the_backend(regional: bool) -> None:
    modes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], mode: str | None = None) -> Any:
        modes.append(mode)
        return graph.forward

    mode = "max-autotune-no-cudagraphs"
    pipe = tgate_fx.compile(tiny.make("sd-small"), 2, backend=backend, regional=regional, mode=mode)
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(tgate_fx.gate(tiny.make("sd-small"), 2), **kwargs))
    assert set(modes) == {mode}


@blocks_share_graphs
def test_blocks_whose_sites_are_wrapped_have_graphs_of_their_own(backend: CountingBackend) -> None:
    """More of them than one function of torch.compile may have graphs: none is compiled again."""
    pipe = tiny.pixart(num_layers=10)
    tgate_fx.compile(pipe, 2, regional=True, backend=backend)
    for name, module in pipe.transformer.named_modules():
        if name.endswith("attn2"):
            module.forward = functools.partial(module.forward)
    kwargs = {**tiny.inputs("pixart-alpha-256"), "num_inference_steps": 4}
    for _ in range(2):
        tiny.latents(pipe, **kwargs)
    assert len(backend.graphs) == 20
    assert tgate_fx.report(pipe).recompiles == 0
