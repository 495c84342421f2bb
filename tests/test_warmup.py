"""`tgate_fx.warmup`: every phase is compiled before the first generation that counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_refusals import says
from tests.zoo import entry_of

SETTINGS = [
    pytest.param("sd-small", {"gate_step": 0.4}, marks=pytest.mark.slow),
    ("sd-small", {"gate_step": 0.97, "fi_interval": 2}),
    pytest.param("sd-small", {"gate_step": None}, marks=pytest.mark.slow),
    pytest.param("sd-small", {"sp_interval": 3, "fi_interval": 2, "warm_up": 2}, marks=pytest.mark.slow),
    pytest.param("sd-small", {"deepcache": tgate_fx.DeepCache(interval=3, branch=0)}, marks=pytest.mark.slow),
    pytest.param(
        "sd-small", {"gate_step": None, "deepcache": tgate_fx.DeepCache(interval=3, branch=0)}, marks=pytest.mark.slow
    ),
    pytest.param("sd-small", {"gate_step": 2, "full_steps": range(20)}, marks=pytest.mark.slow),
    pytest.param("sd-img2img-small", {}, marks=pytest.mark.slow),
    pytest.param("sdxl-small", {"after_gate": "both"}, marks=pytest.mark.slow),
    ("pixart-alpha-256", {}),
]


@pytest.mark.parametrize(("family", "settings"), SETTINGS)
def test_nothing_is_compiled_afterwards(family: str, settings: dict[str, Any], backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make(family), backend=backend, **{"gate_step": 7, **settings})
    kwargs = tiny.inputs(family)
    report = tgate_fx.warmup(pipe, **kwargs)
    assert report.compiled_graphs == len(backend.graphs) > 0
    assert len(report.steps) < 10
    with torch.compiler.set_stance("fail_on_recompile"):
        tiny.latents(pipe, **kwargs, num_inference_steps=25)
    assert len(backend.graphs) == report.compiled_graphs


@pytest.mark.parametrize("family", tiny.slow_but(("sd-inpaint-small",), ("sd-inpaint-small", "sd-img2img-small")))
def test_as_many_steps_as_a_low_strength_takes(family: str, backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make(family), gate_step=3, backend=backend)
    report = tgate_fx.warmup(pipe, **{**tiny.inputs(family), "strength": 0.1})
    assert len(report.steps) == 2
    assert report.compiled_graphs == len(backend.graphs) == 2


@pytest.mark.slow
def test_both_denoisers_are_reached(backend: CountingBackend) -> None:
    entry = entry_of("WanPipeline 2.2 14B")
    pipe = tgate_fx.compile(entry.make(), gate_step=0.5, backend=backend)
    call = entry.inputs()
    del call["num_inference_steps"]
    assert tgate_fx.warmup(pipe, **call).compiled_graphs == len(backend.graphs) == 4
    with torch.compiler.set_stance("fail_on_recompile"):
        entry.run(pipe)


def test_the_size_and_the_batch_can_be_given(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=3, backend=backend)
    report = tgate_fx.warmup(pipe, height=16, width=24, batch_size=2)
    assert {step.batch for step in report.steps} == {4, 2}
    with torch.compiler.set_stance("fail_on_recompile"):
        pipe(["a cat", "a dog"], height=16, width=24, num_inference_steps=6)


def test_the_global_random_state_stays(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=None, backend=backend)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tgate_fx.warmup(pipe, height=16, width=16)
    assert torch.equal(torch.rand(3), expected)


def test_it_shows_a_progress_bar(backend: CountingBackend, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=3, backend=backend)
    tgate_fx.warmup(pipe, height=16, width=16)
    assert capsys.readouterr().err == ""  # the pipeline's bar was turned off
    pipe.set_progress_bar_config()
    tgate_fx.warmup(pipe, height=16, width=16)
    assert "tgate_fx: compiling: 100%" in capsys.readouterr().err
    pipe("a cat", height=16, width=16, num_inference_steps=4)
    assert "tgate_fx" not in capsys.readouterr().err


def test_what_it_refuses(backend: CountingBackend) -> None:
    eager = tgate_fx.gate(tiny.make("sd-small"))
    with pytest.raises(tgate_fx.StateError, match=says("StableDiffusionPipeline", "not compiled", "tgate_fx.compile")):
        tgate_fx.warmup(eager)
    pipe = tgate_fx.compile(tiny.make("sd-small"), backend=backend)
    with pytest.raises(tgate_fx.ArgumentError, match=says("batch_size=0", "an int ≥ 1")):
        tgate_fx.warmup(pipe, batch_size=0)
    with pytest.raises(tgate_fx.ArgumentError, match=says("batch_size=2", "together with prompt", "Leave it out")):
        tgate_fx.warmup(pipe, batch_size=2, prompt="a cat")
    for name in ("num_inference_steps", "gate_step", "sizes"):
        with pytest.raises(tgate_fx.ArgumentError, match=says(f"{name} was given", "Leave it out")):
            tgate_fx.warmup(pipe, **{name: 3})
    with pytest.raises(tgate_fx.ArgumentError, match=says("height was given for a StableDiffusionImg2ImgPipeline")):
        tgate_fx.warmup(tgate_fx.compile(tiny.make("sd-img2img-small"), backend=backend), height=16)
    video = tgate_fx.compile(tiny.make("svd"), backend=backend)
    with pytest.raises(tgate_fx.ArgumentError, match=says("batch_size=2", "takes no prompts")):
        tgate_fx.warmup(video, batch_size=2, **tiny.inputs("svd"))
    with tgate_fx.disabled(pipe), pytest.raises(tgate_fx.StateError, match=says("did not reach", "tgate_fx.disabled")):
        tgate_fx.warmup(pipe, height=16, width=16)
    pipe = tgate_fx.compile(tiny.make("sd-img2img-small"), backend=backend)
    with tgate_fx.disabled(pipe), pytest.raises(tgate_fx.StateError, match=says("32 steps at strength=0.5 did not")):
        tgate_fx.warmup(pipe, **{**tiny.inputs("sd-img2img-small"), "strength": 0.5})
