"""IP-Adapters under compiled phases: scales that change take no graph, and nobody but a graph sees them as tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback

import tgate_fx
from tests import oracle, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.zoo import noise
from tests.zoo.adapters import image_embeds, sd_with_ip_adapters
from tests.zoo.controlnet import image, inputs
from tgate_fx.compiled.image_scales import _Scale

GATE, STEPS = 3, 5
MASKS = [image(20)[:, :1], image(21)[:, :1]]


def run(pipe: Any, adapters: int = 2, **changes: Any) -> torch.Tensor:
    values = inputs(ip_adapter_image_embeds=image_embeds(adapters), height=16, width=16, num_inference_steps=STEPS)
    result: torch.Tensor = pipe(**{**values, **changes})[0]
    return result


def scales(pipe: Any) -> list[Any]:
    return [processor.scale for processor in pipe.unet.attn_processors.values() if hasattr(processor, "scale")]


def both(backend: CountingBackend | str, adapters: int = 2, **settings: Any) -> tuple[Any, Any]:
    """The same pipeline compiled, and gated without compiling."""
    pipe, eager = sd_with_ip_adapters(adapters), sd_with_ip_adapters(adapters)
    return tgate_fx.compile(pipe, GATE, backend=backend, **settings), tgate_fx.gate(eager, GATE)


@pytest.mark.parametrize("regional", tiny.slow_but((False,), (False, True)))
def test_no_scale_takes_a_graph(regional: bool, backend: CountingBackend) -> None:
    pipe, eager = both(backend, regional=regional)
    run(pipe)
    results = []
    for scale in ([1.0, 1.0], [0.3, 0.3], [0.0, 1.5], [0, 0], [{"mid": 0.2}, 0.4]):
        for each in (pipe, eager):
            each.set_ip_adapter_scale(scale)
        numbers = scales(pipe)
        results.append(run(pipe))
        assert relative_error(results[-1], run(eager)) < 1e-5
        assert scales(pipe) == numbers == scales(eager)
        assert all(type(number) in (float, int) for each in scales(pipe) for number in each)
    assert len(backend.graphs) == 2
    assert not any(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.slow
def test_scales_of_masked_images_take_no_graph_either(backend: CountingBackend) -> None:
    pipe, eager = both(backend)
    masked = {
        "ip_adapter_image_embeds": [noise(2, 2, 12, seed=10), noise(2, 1, 12, seed=11)],
        "cross_attention_kwargs": {"ip_adapter_masks": [torch.cat(MASKS, dim=1), MASKS[0]]},
    }
    results = []
    for first, second in ((0.3, 0.8), (0.0, 0.0), (1.0, 0.2)):
        for each in (pipe, eager):
            each.set_ip_adapter_scale([[first, second], 0.5])
        results.append(run(pipe, **masked))
        assert relative_error(results[-1], run(eager, **masked)) < 1e-5
    assert len(backend.graphs) == 2
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize("cutoff", tiny.slow_but((1,), (1, GATE - 1, GATE)))
def test_scales_that_end_between_steps(cutoff: int, backend: CountingBackend) -> None:
    pipe, eager = both(backend, adapters=1)
    to_the_end = run(pipe, adapters=1)
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=cutoff)
    results = [run(each, adapters=1, callback_on_step_end=callback) for each in (pipe, eager)]
    assert relative_error(*results) < 1e-5
    # After the gate, what images add is cached with the rest of the cross-attention.
    assert torch.equal(results[0], to_the_end) == (cutoff >= GATE - 1)
    assert scales(pipe) == scales(eager) == [[0.0]]
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_a_callback_and_an_error_see_numbers() -> None:
    pipe, _ = both("eager")
    expected = run(pipe)
    seen = []

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.extend(scales(pipe))
        return {}

    run(pipe, callback_on_step_end=callback)
    with pytest.raises(RuntimeError, match="in the middle"), _failing(pipe.unet.mid_block.resnets[0]):
        run(pipe)
    assert [*seen, *scales(pipe)] == [[1.0, 1.0]] * (STEPS + 1)
    assert torch.equal(run(pipe), expected)


def _failing(module: Any) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    return oracle.hooked(module.register_forward_pre_hook(fail))


def test_halves_are_scaled_as_by_a_number() -> None:
    value = torch.randn(100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(_Scale(0.3, torch.device("cpu")) * value, 0.3 * value)


def test_frozen_graphs_follow_the_scales_of_an_ip_adapter(freezing: Any) -> None:
    """Between images and between steps."""
    pipe, eager = both(freezing, adapters=1)
    callback = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    results = []
    for scale, changes in ((1.0, {}), (0.3, {}), (0.3, {"callback_on_step_end": callback})):
        for each in (pipe, eager):
            each.set_ip_adapter_scale(scale)
        results.append(run(pipe, adapters=1, **changes))
        assert relative_error(results[-1], run(eager, adapters=1, **changes)) < 1e-6
    assert relative_error(results[0], results[1]) > 1e-4
    assert relative_error(results[1], results[2]) > 1e-4
