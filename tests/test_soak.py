"""A short run of the soak that benchmarks/soak.py runs for long; and a soak of what people add to a pipeline."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import tgate_fx
from benchmarks.soak import soak
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_lora import lora
from tests.zoo import adapters, controlnet, generator


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
def test_nothing_recompiles_moves_grows_or_differs() -> None:
    def make() -> Any:
        return tiny.make("sd-small")

    measured = soak(make, 24, warm=6, tolerance=0, sizes=(16, 24), backend="eager")
    assert measured["recompiles"] == 0
    assert not measured["caches_moved"]
    assert measured["largest_difference"] == 0
    assert measured["errors_thrown"] > 0
    assert measured["graphs"] == 6  # two sizes: with guidance and without it before the gate, and one after it
    assert measured["traced_growth_bytes"] < 50_000


@dataclass(frozen=True)
class Case:
    """One generation with what people add: which LoRA, all scales, and the step at which a first try fails."""

    lora: int
    weight: float
    image_scales: list[float]
    call: dict[str, Any]
    throw_at: int | None


def draw(rng: random.Random) -> Case:
    steps = rng.randint(4, 7)
    start = rng.choice([0.0, 0.0, 0.3])
    call: dict[str, Any] = {
        **controlnet.inputs(image=controlnet.image(rng.randrange(9)), height=16, width=16),
        "num_inference_steps": steps,
        "guidance_scale": rng.uniform(2, 12),
        "ip_adapter_image_embeds": adapters.image_embeds(),
        "controlnet_conditioning_scale": rng.choice([0.0, 0.4, 1.0, rng.random()]),
        "control_guidance_start": start,
        "control_guidance_end": rng.choice([1.0, 1.0, 0.6, 0.8]),
        "cross_attention_kwargs": rng.choice([None, {"scale": rng.random()}]),
        "gate_step": rng.randint(2, steps),
        "generator": rng.randrange(100),
    }
    return Case(
        lora=rng.randint(1, 3),
        weight=rng.choice([0.0, 1.0, rng.uniform(-1, 1)]),
        image_scales=[rng.choice([0.0, 1.0, rng.random()]) for _ in range(2)],
        call=call,
        throw_at=rng.randrange(steps - 1) if rng.random() < 0.2 else None,
    )


def with_everything() -> Any:
    unet = adapters.sd_with_ip_adapters().unet
    parts = {"unet": unet, "controlnet": controlnet.controlnet(), "text_encoder": tiny.text_encoder()}
    pipe = controlnet.sd("StableDiffusionControlNetPipeline", **parts)
    pipe.enable_lora_hotswap(target_rank=4)
    return pipe


def generate(pipe: Any, case: Case, **changes: Any) -> torch.Tensor:
    pipe.load_lora_weights(dict(lora(case.lora)), adapter_name="one", hotswap=hasattr(pipe.unet, "peft_config"))
    pipe.set_adapters(["one"], [case.weight])
    pipe.set_ip_adapter_scale(case.image_scales)
    latents = pipe(**{**case.call, "generator": generator(case.call["generator"]), **changes}).images
    assert torch.isfinite(latents).all()
    result: torch.Tensor = latents
    return result


def fail(pipe: Any, case: Case) -> None:
    def throw(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == case.throw_at:
            raise RuntimeError("in the middle")
        return {}

    with pytest.raises(RuntimeError, match="in the middle"):
        generate(pipe, case, callback_on_step_end=throw)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_hundred_generations_with_everything_that_people_add(backend: CountingBackend) -> None:
    rng = random.Random(0)
    pipe = tgate_fx.compile(with_everything(), 2, backend=backend)
    warm, cases = [draw(rng) for _ in range(12)], [draw(rng) for _ in range(100)]
    for case in warm:
        generate(pipe, case)
    graphs = len(backend.graphs)
    for case in cases:
        if case.throw_at is not None:
            fail(pipe, case)
        expected = generate(tgate_fx.gate(with_everything(), 2), case)
        assert relative_error(generate(pipe, case), expected) < 1e-5
    assert len(backend.graphs) == graphs
    assert sum(case.throw_at is not None for case in cases) > 10
