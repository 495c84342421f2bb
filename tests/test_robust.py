"""Errors in the middle of a generation, threads, and generations within generations."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch

import tgate_fx
from tests import reference, tiny

KWARGS = {**tiny.inputs("sd", 2), "num_inference_steps": 6}
HOW: dict[str, dict[str, Any]] = {"gate": {}, "compile": {"backend": "eager"}}


def failing_callback(at: int, error: type[BaseException]) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            raise error("stop")
        return {}

    return callback


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("error", tiny.slow_but((KeyboardInterrupt,), (RuntimeError, KeyboardInterrupt)))
def test_an_error_in_a_callback_leaves_nothing_behind(how: str, error: type[BaseException]) -> None:
    pipe = getattr(tgate_fx, how)(tiny.make("sd-small"), gate_step=3, **HOW[how])
    expected = tiny.latents(reference.gate(tiny.make("sd-small"), 3, guided=True), **KWARGS)
    for at in (0, 2, 3, 4):
        with pytest.raises(error, match="stop"):
            pipe(**KWARGS, callback_on_step_end=failing_callback(at, error))
        assert len(tgate_fx.report(pipe).steps) == at + 1
        assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_error_in_the_scheduler_or_the_denoiser_leaves_nothing_behind(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    ungated = tiny.latents(tiny.make("sd-small"), **KWARGS)
    expected = tiny.latents(reference.gate(tiny.make("sd-small"), 3, guided=True), **KWARGS)

    for owner, name in ((pipe.scheduler, "scale_model_input"), (pipe.unet.conv_out, "forward")):
        calls = 0
        inner = getattr(owner, name)

        def fail(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise ArithmeticError("stop")
            return inner(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(ArithmeticError):
                pipe(**KWARGS)
        with tgate_fx.disabled(pipe):
            assert torch.equal(tiny.latents(pipe, **KWARGS), ungated)
        assert torch.equal(tiny.latents(pipe, **KWARGS), expected)
        assert pipe.guidance_rescale == 0.0
        assert pipe.num_timesteps == 6


@pytest.mark.parametrize("fails", [False, True])
def test_guidance_rescale_is_the_pipelines_own_between_generations(fails: bool) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 2)

    def after_a_gated_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if fails and index == 3:
            raise ArithmeticError("stop")
        return {}

    with pytest.raises(ArithmeticError) if fails else nullcontext():
        tiny.latents(pipe, **KWARGS, guidance_rescale=0.7, callback_on_step_end=after_a_gated_step)
    assert pipe.guidance_rescale == 0.7


def test_the_gate_is_off_until_the_last_disabled_ends_and_after_an_error_on() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 2)
    ungated, gated = tiny.latents(pipe, **KWARGS, gate_step=None), tiny.latents(pipe, **KWARGS)
    assert not torch.equal(ungated, gated)
    with pytest.raises(ArithmeticError), tgate_fx.disabled(pipe):
        raise ArithmeticError("stop")
    assert torch.equal(tiny.latents(pipe, **KWARGS), gated)
    with tgate_fx.disabled(pipe):
        with tgate_fx.disabled(pipe):
            pass
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(tiny.latents, pipe, **KWARGS).result(), ungated)
    assert torch.equal(tiny.latents(pipe, **KWARGS), gated)


@pytest.mark.parametrize("how", tiny.slow_but(("gate",), HOW))
def test_generations_from_two_threads_follow_one_another(how: str) -> None:
    pipe = getattr(tgate_fx, how)(tiny.make("sd-small"), gate_step=3, **HOW[how])
    seeds = range(6)
    expected = [tiny.latents(pipe, **KWARGS, seed=seed) for seed in seeds]
    running, most = 0, 0
    plain = pipe.scheduler.scale_model_input

    def slow(*args: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        running -= 1
        return plain(*args)

    pipe.scheduler.scale_model_input = slow
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda seed: tiny.latents(pipe, **KWARGS, seed=seed), seeds))
    assert most == 1
    assert all(map(torch.equal, results, expected))


def test_pipelines_that_share_a_denoiser_may_run_in_two_threads() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    sibling = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sibling.scheduler = tiny.scheduler()
    sibling.set_progress_bar_config(disable=True)
    gated, plain = tiny.latents(pipe, **KWARGS), tiny.latents(sibling, **KWARGS)
    assert not torch.equal(gated, plain)
    turns = threading.Barrier(2)

    def in_turns(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        turns.wait(10)
        return {}

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(tiny.latents, each, **KWARGS, callback_on_step_end=in_turns) for each in (pipe, sibling)]
        results = [future.result(30) for future in futures]
    assert torch.equal(results[0], gated)
    assert torch.equal(results[1], plain)


@pytest.mark.parametrize(("at", "steps"), [(0, 1), (1, 2), (5, 6)])
def test_a_plain_pipeline_within_a_callback_stays_plain(at: int, steps: int) -> None:
    """It shares the denoiser, and has a scheduler of its own: a preview, say."""
    pipe = tiny.make("sd-small")
    other = diffusers.StableDiffusionPipeline(
        **{**pipe.components, "scheduler": tiny.scheduler()}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    its_own = {**KWARGS, "num_inference_steps": steps, "prompt": "two dogs"}
    expected = tiny.latents(other, **its_own)
    tgate_fx.gate(pipe, 3)
    alone = tiny.latents(pipe, **KWARGS)
    given = []

    def preview(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            given.append(tiny.latents(other, **its_own))
        return {}

    assert torch.equal(tiny.latents(pipe, **KWARGS, callback_on_step_end=preview), alone)
    assert torch.equal(given[0], expected)
    assert len(tgate_fx.report(pipe).steps) == 6


def test_a_pipeline_within_its_own_callback_is_refused() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    expected = tiny.latents(pipe, **KWARGS)

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe(**KWARGS)
        return {}

    with pytest.raises(tgate_fx.StateError, match=r"in the middle of a generation.*from its own callback"):
        pipe(**KWARGS, callback_on_step_end=callback)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


def test_a_sibling_within_a_callback_is_refused() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    sibling = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    sibling.set_progress_bar_config(disable=True)
    tgate_fx.gate(sibling)

    def callback(*_: Any) -> dict[str, Any]:
        sibling(**KWARGS)
        return {}

    with pytest.raises(tgate_fx.StateError, match="The denoiser is in the middle of a generation"):
        pipe(**KWARGS, callback_on_step_end=callback)


def test_restoring_within_a_generation_is_refused() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        tgate_fx.restore(pipe)
        return {}

    with pytest.raises(tgate_fx.StateError, match="in the middle of a generation"):
        pipe(**KWARGS, callback_on_step_end=callback)
    tgate_fx.restore(pipe)


def test_the_cache_is_not_shared_between_generations_of_two_pipelines() -> None:
    first, second = (tgate_fx.gate(tiny.make("sd-small"), gate_step=2) for _ in range(2))
    other = {**KWARGS, "prompt": ["two dogs", "a cat"]}
    expected = [tiny.latents(first, **KWARGS), tiny.latents(second, **other)]

    def in_between(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            assert torch.equal(tiny.latents(second, **other), expected[1])
        return {}

    assert torch.equal(tiny.latents(first, **KWARGS, callback_on_step_end=in_between), expected[0])


@pytest.mark.parametrize("how", tiny.slow_but(("gate",), HOW))
def test_inference_mode_and_plain_mode_alternate(how: str) -> None:
    pipe = getattr(tgate_fx, how)(tiny.make("sd-small"), gate_step=3, **HOW[how])
    with torch.inference_mode():
        first = tiny.latents(pipe, **KWARGS)
    assert torch.equal(tiny.latents(pipe, **KWARGS), first)
    with torch.inference_mode():
        assert torch.equal(tiny.latents(pipe, **KWARGS), first)


def test_a_generation_may_end_before_its_first_step() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3)
    encode = pipe.encode_prompt

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        pipe._interrupt = True
        return encode(*args, **kwargs)

    pipe.encode_prompt = interrupted
    tiny.latents(pipe, **KWARGS)
    assert tgate_fx.report(pipe).steps == ()


def test_nothing_is_made_on_the_default_device() -> None:
    """A script may set it before it imports tgate_fx; "meta" stands for a GPU here, on which nothing can be read."""
    script = """
import torch
torch.set_default_device("meta")
import tgate_fx
from tgate_fx.auto_gate import AutoGate, Watch
from tgate_fx.compiled.checksum import checksum
from tgate_fx.compiled.frozen_weights import FrozenWeights
from tgate_fx.compiled.image_scales import _Scale
from tgate_fx.inputs import canonical
cpu = torch.device("cpu")
latents = torch.ones(2, 4, 8, 8, device=cpu)
assert checksum(latents) != 0
weights = FrozenWeights(torch.nn.Linear(2, 2, device=cpu))
assert not weights.changed()
assert _Scale(0.5, cpu).tensor.item() == 0.5
inputs, _ = canonical({"sample": latents, "timestep": 3, "conditioning_scale": 0.5})
assert {value.device.type for value in inputs.values()} == {"cpu"}
watch = Watch(AutoGate())
watch.note(0, latents, latents)
assert watch.opens_at(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
