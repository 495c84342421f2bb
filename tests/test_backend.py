"""Dead code is taken out of graphs, and nothing that has an effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.conftest import CountingBackend
from tgate_fx.compiled.backend import PrunedBackend


def in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.mul_(2)
    return x + 1


def item_assignment(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y[0] = 2
    return x + 1


def augmented(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y += 2
    return x + 1


def inplace_argument(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    functional.relu(y, True)
    functional.silu(y, inplace=True)
    return x + 1


def out_argument(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    torch.add(x, 1, out=y)
    return x + 1


def batch_statistics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    functional.batch_norm(x, y[0], y[1], training=True)
    return x + 1


def instance_statistics(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    functional.instance_norm(x.t()[None], y[0], y[1], use_input_stats=True)
    return x + 1


def statistics_without_a_layer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    torch.batch_norm(x, None, None, y[0], y[1], True, 0.1, 1e-5, False)
    torch.instance_norm(x.t()[None], None, None, y[2], y[3], True, 0.1, 1e-5, False)
    return x + 1


def renormalized_embedding(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    functional.embedding(torch.tensor([0, 1]), y, max_norm=0.1)
    return x + 1


def condition(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    def write() -> torch.Tensor:
        y.add_(1)
        return y.clone()

    torch.cond(x.sum() > -1e9, write, lambda: y.clone())
    return x + 1


EFFECTS = [
    in_place,
    item_assignment,
    augmented,
    inplace_argument,
    out_argument,
    batch_statistics,
    instance_statistics,
    statistics_without_a_layer,
    renormalized_embedding,
    pytest.param(condition, marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo itself refuses it")),
]


@pytest.mark.parametrize("function", EFFECTS)
@torch.no_grad()
def test_what_writes_is_kept(function: Callable[..., torch.Tensor], backend: CountingBackend) -> None:
    compiled = torch.compile(function, backend=PrunedBackend(backend), fullgraph=True)
    x = torch.randn(4, 3)
    written = torch.randn(4, 3).abs() - 0.5
    before = written.clone()
    expected = written.clone()
    assert torch.equal(compiled(x, written), function(x, expected))
    assert torch.equal(written, expected)
    assert not torch.equal(written, before)


@torch.no_grad()
def test_the_choice_of_attention_kernels_is_kept(backend: CountingBackend) -> None:
    def attend(x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(x, x, x)

    compiled = torch.compile(attend, backend=PrunedBackend(backend), fullgraph=True)
    x = torch.randn(1, 2, 8, 4)
    assert torch.equal(compiled(x, x), attend(x, x))
    names = [getattr(node.target, "__name__", "") for node in backend.graphs[0].graph.nodes]
    assert sum("sdpa_kernel" in name for name in names) == 2


@torch.no_grad()
def test_assertions_are_kept(backend: CountingBackend) -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        torch._assert_async((x > 0).all())
        return x + 1

    compiled = torch.compile(positive, backend=PrunedBackend(backend), fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    with pytest.raises(RuntimeError, match="nonzero"):
        compiled(torch.zeros(3))


@torch.no_grad()
def test_random_numbers_are_still_drawn(backend: CountingBackend) -> None:
    def draw(x: torch.Tensor) -> torch.Tensor:
        functional.dropout(x, 0.5)
        functional.dropout(x, p=0.5, training=True)
        functional.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], dropout_p=0.5)
        torch.rand_like(x)
        x.bernoulli(0.5)
        return torch.rand_like(x)

    compiled = torch.compile(draw, backend=PrunedBackend(backend), fullgraph=True)
    x = torch.full((8, 8), 0.5)
    torch.manual_seed(1)
    got = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(got, draw(x))


class Projected(nn.Module):
    """A text projection of which nothing is used."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(3, 3), nn.GELU("tanh"), nn.Linear(3, 3), nn.SiLU(), nn.LayerNorm(3), nn.RMSNorm(3)
        )

    def forward(self, sample: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> Any:
        torch._C._log_api_usage_once("tests.projected")
        text = self.project(text).view(2, -1, 1).transpose(1, 2).float()
        bias = (1 - mask.to(sample.dtype)) * -10000.0
        _ = text.repeat_interleave(2, dim=0) + bias[:, None]
        deep = functional.interpolate(torch.cat([text, text]).chunk(2)[0], scale_factor=2.0)
        _ = functional.dropout(functional.scaled_dot_product_attention(deep, deep, deep), 0.5, training=False)
        return sample + 1


@torch.no_grad()
def test_what_only_computes_is_taken_out_with_its_inputs(backend: CountingBackend) -> None:
    compiled = torch.compile(Projected(), backend=PrunedBackend(backend), fullgraph=True)
    sample = torch.randn(2, 3)
    assert torch.equal(compiled(sample, torch.randn(2, 3), torch.ones(4, 3)), sample + 1)
    (graph,) = backend.graphs
    assert len(graph.graph.find_nodes(op="placeholder")) == 1
    assert len(graph.graph.nodes) == 3
