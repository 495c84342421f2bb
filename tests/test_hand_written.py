"""Loops written by hand around a gated pipeline's denoiser."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says
from tests.zoo import entry_of, noise, wan
from tgate_fx.gated import gated_of

STEPS = 5
GATE = 2
KWARGS = {**tiny.inputs("sd-small"), "num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 4.0}


@torch.no_grad()
def texts(pipe: Any) -> torch.Tensor:
    cond, uncond = pipe.encode_prompt(KWARGS["prompt"], torch.device("cpu"), 1, True)
    return torch.cat([uncond, cond])


def start(pipe: Any) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def loop(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    """As diffusers' guide takes a pipeline apart."""
    text, latents = texts(pipe), start(pipe)
    pipe.scheduler.set_timesteps(steps)
    for t in pipe.scheduler.timesteps:
        uncond, cond = pipe.unet(torch.cat([latents, latents]), t, encoder_hidden_states=text).sample.chunk(2)
        latents = pipe.scheduler.step(uncond + 4.0 * (cond - uncond), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("gate", [GATE, 0.4])
def test_it_is_gated_as_the_pipelines_own_loop(gate: float, backend: CountingBackend) -> None:
    expected = tgate_fx.gate(tiny.make("sd-small"), gate)(**KWARGS, latents=start(None)).images
    for put in (tgate_fx.gate, lambda *given: tgate_fx.compile(*given, backend=backend)):
        pipe = put(tiny.make("sd-small"), gate)
        for _ in range(2):
            with tgate_fx.generation(pipe, STEPS, guided=True):
                assert torch.equal(loop(pipe), expected)
        report = tgate_fx.report(pipe)
        assert report.gate == GATE
        assert [step.batch for step in report.steps] == [2, 2, 1, 1, 1]
    assert len(backend.graphs) == 2


@torch.no_grad()
def video_loop(pipe: Any) -> torch.Tensor:
    given = wan.inputs()
    latents = torch.randn(1, 16, 2, 2, 2, generator=given["generator"])
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:
        timestep = t.expand(1)
        cond, uncond = (
            pipe.transformer(latents, timestep, given[f"{name}prompt_embeds"], return_dict=False)[0]
            for name in ("", "negative_")
        )
        latents = pipe.scheduler.step(uncond + 4.0 * (cond - uncond), t, latents, return_dict=False)[0]
    return latents


def test_separate_calls_of_a_step_have_the_same_timestep() -> None:
    expected = tgate_fx.gate(wan.text_to_video(), GATE)(**wan.inputs()).frames
    pipe = tgate_fx.gate(wan.text_to_video(), GATE)
    with tgate_fx.generation(pipe, 4, guided=True):
        assert torch.equal(video_loop(pipe), expected)
    assert [step.calls for step in tgate_fx.report(pipe).steps] == [2, 2, 1, 1]


def test_without_guidance() -> None:
    @torch.no_grad()
    def generate(pipe: Any) -> torch.Tensor:
        latents, text = start(pipe), texts(pipe)[1:]
        pipe.scheduler.set_timesteps(STEPS)
        for t in pipe.scheduler.timesteps:
            latents = pipe.scheduler.step(pipe.unet(latents, t, text).sample, t, latents).prev_sample
        return latents

    expected = tgate_fx.gate(tiny.make("sd-small"), GATE)(**{**KWARGS, "guidance_scale": 1.0}, latents=start(None))
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    with tgate_fx.generation(pipe, STEPS, guided=False):
        assert torch.equal(generate(pipe), expected.images)


def test_disabled_it_is_the_plain_loop() -> None:
    expected = loop(tiny.make("sd-small"))
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    with tgate_fx.disabled(pipe), tgate_fx.generation(pipe, STEPS, guided=True):
        assert torch.equal(loop(pipe), expected)


def test_what_it_refuses() -> None:
    pipe = tiny.make("sd-small")
    with pytest.raises(tgate_fx.StateError, match=says("is not gated", "tgate_fx.gate")), _generation(pipe):
        pass
    tgate_fx.gate(pipe, GATE)
    expected = pipe(**KWARGS, latents=start(pipe)).images
    for steps in (0, True, 2.0):
        with (
            pytest.raises(tgate_fx.ArgumentError, match=says(f"steps={steps!r}", "an int ≥ 1")),
            _generation(pipe, steps),
        ):
            pass
    with (
        pytest.raises(tgate_fx.ArgumentError, match=says("guided=7.5", "expected True")),
        _generation(pipe, guided=7.5),
    ):
        pass
    with pytest.raises(tgate_fx.StateError, match=says("without a call of pipe.unet")), _generation(pipe):
        pass
    with pytest.raises(tgate_fx.UnsupportedError, match="began step 3 of a loop of 3"), _generation(pipe, 3):
        loop(pipe)
    tgate_fx.restore(pipe)
    tgate_fx.gate(pipe, GATE / STEPS)
    with pytest.raises(tgate_fx.UnsupportedError, match="ended a loop of 9 steps after 5"), _generation(pipe, 9):
        loop(pipe)
    with pytest.raises(tgate_fx.StateError, match="in the middle of a generation"), _generation(pipe):
        pipe(**KWARGS)
    with pytest.raises(RuntimeError, match="of the loop's own"), _generation(pipe):
        raise RuntimeError("of the loop's own")
    assert torch.equal(pipe(**KWARGS, latents=start(pipe)).images, expected)


def _generation(pipe: Any, steps: Any = STEPS, guided: Any = True) -> Any:
    return tgate_fx.generation(pipe, steps, guided=guided)


def test_a_call_outside_of_a_generation_is_said_once() -> None:
    expected = loop(tiny.make("sd-small"))
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    with pytest.warns(UserWarning, match=says("UNet2DConditionModel", "ran ungated", "tgate_fx.generation")) as said:
        assert torch.equal(loop(pipe), expected)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert torch.equal(loop(pipe), expected)
    tgate_fx.restore(pipe)
    assert torch.equal(loop(pipe), expected)


def test_other_pipelines_may_share_the_denoiser() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(other(**KWARGS).images).all()


def test_a_loop_that_keeps_gradients_leaves_none_in_the_cache() -> None:
    """Without torch.no_grad(), under which diffusers' own loops run."""
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    for guided in (True, False):
        rows = torch.cat([start(pipe)] * 2) if guided else start(pipe)
        text = texts(pipe) if guided else texts(pipe)[1:]
        pipe.scheduler.set_timesteps(STEPS)
        with tgate_fx.generation(pipe, STEPS, guided=guided):
            outputs = [pipe.unet(rows, t, text).sample for t in pipe.scheduler.timesteps]
        with torch.no_grad(), tgate_fx.generation(pipe, STEPS, guided=guided):
            expected = [pipe.unet(rows, t, text).sample for t in pipe.scheduler.timesteps]
        assert outputs[0].requires_grad
        assert all(map(torch.equal, outputs, expected))
        assert not any(buffer.requires_grad for each in gated_of(pipe).networks for buffer in each.cache.buffers())


def test_an_interrupted_call_before_it_does_not_hide_that_nothing_was_gated() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)

    def interrupt(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    pipe(**KWARGS, callback_on_step_end=interrupt)
    assert pipe.interrupt
    with pytest.raises(tgate_fx.StateError, match=says("without a call of pipe.unet")), _generation(pipe):
        pass


@pytest.mark.parametrize("rule", [{}, {"forecast": 2}, {"after_gate": "guided"}], ids=str)
@pytest.mark.parametrize("how", ["after both", "between"])
def test_a_loop_may_write_to_what_it_is_given(rule: dict[str, Any], how: str) -> None:
    """Guidance over two calls in place, as ungated: neither call's output is the other's, or kept."""
    entry = entry_of("WanPipeline")
    inputs = entry.inputs()
    given = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
    results = []
    for in_place in (False, True):
        pipe = tgate_fx.gate(entry.make(), 2, **rule)
        pipe.scheduler.set_timesteps(6)
        latents = noise(1, 16, 2, 2, 2)
        with torch.no_grad(), tgate_fx.generation(pipe, 6, guided=True):
            for t in pipe.scheduler.timesteps:
                timestep = t.expand(1)

                def call(text: torch.Tensor, pipe: Any = pipe, x: Any = latents, timestep: Any = timestep) -> Any:
                    return pipe.transformer(x, timestep, text, return_dict=False)[0]

                cond = call(given[0])
                if in_place and how == "between":
                    scaled = cond.mul_(4.0)
                    guided = scaled.add_(call(given[1]), alpha=-3.0)
                elif in_place:
                    uncond = call(given[1])
                    guided = cond.sub_(uncond).mul_(4.0).add_(uncond)
                else:
                    guided = 4.0 * cond - 3.0 * call(given[1])
                latents = pipe.scheduler.step(guided, t, latents).prev_sample
        results.append(latents)
    assert relative_error(results[1], results[0]) < 1e-5


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("forecast", [2, 4])
def test_no_output_that_a_loop_was_given_is_read_again(guided: bool, forecast: int) -> None:
    results = []
    for spoils in (False, True):
        pipe = tgate_fx.gate(tiny.make("sd-small"), GATE, forecast=forecast)
        x, text = start(pipe), texts(pipe)
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad(), tgate_fx.generation(pipe, 8, guided=guided):
            for t in pipe.scheduler.timesteps:
                rows, said = (torch.cat([x, x]), text) if guided else (x, text[1:])
                output = pipe.unet(rows, t, said).sample
                x = pipe.scheduler.step(output[-1:] + 3.0 * (output[-1:] - output[:1]), t, x).prev_sample
                if spoils:
                    output.fill_(float("nan"))
        results.append(x)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("forecast", [2, 4])
def test_no_output_of_separate_calls_is_read_again(guided: bool, forecast: int) -> None:
    entry = entry_of("WanPipeline")
    inputs = entry.inputs()
    results = []
    for spoils in (False, True):
        pipe = tgate_fx.gate(entry.make(), GATE, forecast=forecast)
        x = noise(1, 16, 2, 2, 2)
        said = [inputs["prompt_embeds"], inputs["negative_prompt_embeds"]][: 1 + guided]
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad(), tgate_fx.generation(pipe, 8, guided=guided):
            for t in pipe.scheduler.timesteps:
                timestep = t.expand(1)
                outputs = [pipe.transformer(x, timestep, text, return_dict=False)[0] for text in said]
                x = pipe.scheduler.step(outputs[0] + 3.0 * (outputs[0] - outputs[-1]), t, x).prev_sample
                for output in outputs if spoils else ():
                    output.fill_(float("nan"))
        results.append(x)
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


def test_a_loop_may_write_to_its_timesteps() -> None:
    """The level of noise at the last full step is that of the timestep as it was then."""
    results = []
    for writes in (False, True):
        pipe = tiny.make("sd-small")
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
        tgate_fx.gate(pipe, 2, after_gate="guided")
        pipe.scheduler.set_timesteps(5)
        latents, text, buffer = noise(1, 4, 16, 16), noise(2, 77, 32), torch.zeros(1, dtype=torch.long)
        with torch.no_grad(), tgate_fx.generation(pipe, 5, guided=True):
            for t in pipe.scheduler.timesteps:
                timestep = (buffer.fill_(t) if writes else t).expand(2)
                uncond, cond = pipe.unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
                latents = pipe.scheduler.step(uncond + 7.5 * (cond - uncond), t, latents).prev_sample
        results.append(latents)
    assert torch.equal(*results)
