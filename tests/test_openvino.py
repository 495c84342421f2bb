"""``backend="openvino"``: phases computed by OpenVINO."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tgate_fx
from tests import tiny
from tests.test_compile import relative_error
from tests.test_refusals import says
from tgate_fx.compiled import openvino
from tgate_fx.compiled.settings import CompileSettings


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("pixart-small", {"sp_interval": 2, "fi_interval": 2}, marks=pytest.mark.slow),
        pytest.param("sd-small", {"deepcache": tgate_fx.DeepCache(2, 0)}, marks=pytest.mark.slow),
    ],
)
def test_it_gives_the_eager_result(family: str, settings: dict[str, Any]) -> None:
    pipe = tgate_fx.compile(tiny.make(family), gate_step=3, backend="openvino", **settings)
    eager = tgate_fx.gate(tiny.make(family), gate_step=3, **settings)
    for round_, steps in enumerate((6, 8)):
        kwargs = {**tiny.inputs(family), "num_inference_steps": steps, "seed": round_}
        with torch.compiler.set_stance("fail_on_recompile" if round_ else "default"):
            got = tiny.latents(pipe, **kwargs)
        assert relative_error(got, tiny.latents(eager, **kwargs)) < 1e-4
    assert tgate_fx.report(pipe).recompiles == 0


@pytest.mark.slow
def test_changed_weights_are_noticed() -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=None, backend="openvino")
    eager = tiny.make("sd-small")
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 2}
    before = tiny.latents(pipe, **kwargs)
    for each in (pipe, eager):
        each.unet.conv_out.weight.data.mul_(1.5)
    after = tiny.latents(pipe, **kwargs)
    assert relative_error(after, before) > 1e-2
    assert relative_error(after, tiny.latents(eager, **kwargs)) < 1e-4


def small(dtype: torch.dtype) -> tuple[torch.fx.GraphModule, torch.Tensor]:
    """A graph that holds weights and returns two tensors, and its input."""
    torch.manual_seed(0)

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8, dtype=dtype)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x), (x * 2).float()

    return torch.fx.symbolic_trace(Small()), torch.randn(2, 8, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_outputs_have_their_dtype_and_memory_of_their_own(dtype: torch.dtype, tolerance: float) -> None:
    graph, x = small(dtype)
    run = openvino.compile_graph(graph, [x], {})
    first, other = run(x), run(-3 * x)
    expected = graph(x)
    assert [value.dtype for value in first] == [dtype, torch.float32]
    for got, wanted in zip(first, expected, strict=True):
        assert relative_error(got, wanted.detach()) < tolerance
    assert {value.data_ptr() for value in first}.isdisjoint({value.data_ptr() for value in other})
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    assert all(torch.equal(got, wanted) for got, wanted in zip(run(strided), first, strict=True))


@pytest.mark.slow
def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"mode": "max-autotune"}, {"dynamic": True}, {"regional": True}):
        with pytest.raises(tgate_fx.UnsupportedError, match=says(*settings, "whole phases of one shape")):
            tgate_fx.compile(tiny.sd(), backend="openvino", **settings)
    graph, _ = small(torch.float32)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("input on meta", "expected tensors on the CPU")):
        openvino.compile_graph(graph, [torch.empty(2, 8, device="meta")], {})
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend="openvino", options={"NO_SUCH": "property"})
    with pytest.raises(tgate_fx.CompileError, match="NO_SUCH"):
        tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=3)
    tgate_fx.restore(pipe)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(tgate_fx.UnsupportedError, match=says("OpenVINO is not installed")):
            tgate_fx.compile(pipe, backend="openvino")
    tgate_fx.gate(pipe)  # as usable as before
    assert CompileSettings(backend="openvino").freezes(torch.device("cpu"))
