"""The phases as graphs: that they run, are what they claim, and that a graph which is not is found out."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import tgate_fx
from tests import tiny
from tests.test_refusals import says
from tgate_fx.gated import Gated


def generated(family: str, **settings: Any) -> Any:
    """A gated pipeline after a generation of eight steps."""
    pipe = tgate_fx.gate(tiny.make(family), **{"gate_step": 2, **settings})
    tiny.latents(pipe, **tiny.inputs(family), num_inference_steps=8)
    return pipe


@torch.no_grad()
def check_against_eager(pipe: Any, graph: tgate_fx.PhaseGraph) -> None:
    """A graph computes what its phase computes eagerly, for random values of the form that the phase was run with."""
    gated = Gated.of(pipe)
    roles = next(each.roles for each in gated.runs[0].examples.values() if each.name == graph.name)
    arguments = graph.arguments()
    assert not any(leaf.any() for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
    cache, inputs = tree_map_only(torch.Tensor, lambda zeros: torch.rand(zeros.shape), arguments)
    expected = gated.networks[0].network.function(roles)(cache, (), inputs)
    leaves = [tree_leaves(each) for each in (graph.module(cache, inputs), expected)]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for one, other in zip(*leaves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", tiny.slow_but(("sd", "pixart-alpha"), [family for family in tiny.DISTINCT if family != "svd"])
)
def test_graphs_run_and_are_what_they_claim(family: str) -> None:
    pipe = generated(family)
    graphs = tgate_fx.graphs(pipe)
    assert list(graphs) == ["pre-gate", "post-gate"]
    pre, post = graphs.values()
    sites = tgate_fx.sites(pipe)
    assert (pre.reused, pre.captured) == ((), sites)
    assert (post.reused, post.captured) == (sites, ())
    for graph in (pre, post):
        graph.check()
        check_against_eager(pipe, graph)
    assert "inputs_encoder_hidden_states" in pre.inputs
    assert any("attn2" in name for name in pre.parameters)
    assert not {"inputs_encoder_hidden_states", "inputs_encoder_attention_mask"} & set(post.inputs)
    assert not any("attn2" in name or "caption_projection" in name for name in post.parameters)
    assert len([name for name in post.inputs if name.startswith("cache")]) == len(sites)


def test_every_phase_of_intervals_has_a_graph() -> None:
    pipe = generated("sd-small", gate_step=4, sp_interval=2, fi_interval=2)
    graphs = tgate_fx.graphs(pipe)
    names = ["pre-gate", "pre-gate, self-attention reused", "post-gate", "post-gate, self-attention reused"]
    assert list(graphs) == names
    for graph in graphs.values():
        graph.check()
        check_against_eager(pipe, graph)
    assert not any("attn1" in name or "attn2" in name for name in graphs[names[3]].parameters)


@pytest.mark.slow
def test_a_shallow_phase_has_nothing_of_the_deep_branch() -> None:
    pipe = generated("sd", gate_step=4, deepcache=tgate_fx.DeepCache(2, 0))
    graphs = tgate_fx.graphs(pipe)
    shallow = graphs["post-gate, shallow"]
    shallow.check()
    check_against_eager(pipe, shallow)
    assert "mid_block" in {site.name for site in shallow.skipped}
    assert not any(name.startswith(("mid_block", "down_blocks.1")) for name in shallow.parameters)
    assert any(name.startswith("mid_block") for name in graphs["post-gate"].parameters)


def test_reading_a_graph() -> None:
    pre, post = tgate_fx.graphs(generated("sd")).values()
    said = str(post)
    assert said.startswith("post-gate: ")
    assert "4 sites reused, 0 captured" in said
    assert "reads inputs_sample, inputs_timestep\n" in said
    for depth in (1, 2, None):
        calls = [node for node in post.module.graph.nodes if node.op == "call_function"]
        assert sum(post.operations(depth).values()) == len(calls)
    assert post.operations(1)["conv_in"] == 1
    # What the phases differ in is cross-attention and the norm before it, which nothing else reads.
    changed = pre.difference(post)
    assert {name.split("transformer_blocks.0.")[1].split(".")[0] for name in changed} == {"attn2", "norm2"}
    assert all(after == 0 for _, after in changed.values())
    assert post.difference(post) == {}
    assert "torch.ops.aten" in post.module.code


def test_parameters_are_the_denoiser_s_own() -> None:
    pipe = generated("sd")
    post = tgate_fx.graphs(pipe)["post-gate"]
    for name, parameter in post.module.denoiser.named_parameters():
        assert parameter is pipe.unet.get_parameter(name)


@pytest.mark.slow
def test_a_graph_that_is_not_what_it_claims_is_found_out() -> None:
    pre, post = tgate_fx.graphs(generated("sd")).values()
    lying = dataclasses.replace(pre, reused=post.reused)
    with pytest.raises(tgate_fx.StateError, match=r"pre-gate graph reads or computes .*expected nothing of the sites"):
        lying.check()
    # The text alone is enough to be found out.
    elsewhere = (tgate_fx.SiteInfo("nowhere", "cross-attention"),)
    with pytest.raises(tgate_fx.StateError, match="computes inputs_encoder_hidden_states: expected"):
        dataclasses.replace(pre, reused=elsewhere).check()
    skipping = dataclasses.replace(post, skipped=(tgate_fx.SiteInfo("mid_block", "deep branch"),))
    with pytest.raises(tgate_fx.StateError, match="post-gate graph reads or computes"):
        skipping.check()


def test_graphs_of_a_compiled_pipeline_and_what_leaves_it_as_it_was() -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), 2, backend="eager")
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    tgate_fx.graphs(pipe)["post-gate"].check()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_two_threads_trace_in_turns() -> None:
    """What tracers of torch keep is the whole process's."""
    pipes = [tgate_fx.gate(tiny.sd(**tiny.ONE_BLOCK), gate_step=1) for _ in range(2)]
    for pipe in pipes:
        tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=2)
    with ThreadPoolExecutor(2) as pool:
        for graphs in pool.map(tgate_fx.graphs, pipes):
            assert list(graphs) == ["pre-gate", "post-gate"]


def test_what_cannot_be_traced_is_refused() -> None:
    with torch.inference_mode():
        pipe = tgate_fx.gate(tiny.sd(**tiny.ONE_BLOCK), gate_step=1)
        before = tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=2)
        with pytest.raises(tgate_fx.CompileError, match=says("pre-gate phase", "inference", "do without the graph")):
            tgate_fx.graphs(pipe)
        assert torch.equal(tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=2), before)


def test_without_a_generation_there_are_no_graphs() -> None:
    pipe = tgate_fx.gate(tiny.make("sd"))
    with pytest.raises(tgate_fx.StateError, match=r"No generation has run.*expected one.*Generate an image first"):
        tgate_fx.graphs(pipe)
    with pytest.raises(tgate_fx.StateError, match="is not gated"):
        tgate_fx.graphs(tiny.make("sd"))
