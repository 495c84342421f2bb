"""Pipelines with several denoising loops in one call: each loop is gated anew, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, WanPipeline

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.zoo import loops, wan

CALL = {name: value for name, value in tiny.inputs("sd").items() if name not in ("height", "width")}
CALL["num_inference_steps"] = 4


def larger(latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(latents, scale_factor=2.0)


class HighResolutionFix(StableDiffusionPipeline):
    """Generates a small image, then another one of twice the size from it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sizes = {"height": 16, "width": 16}
        small = super().__call__(*args, **sizes, **kwargs)[0]
        sizes = {name: 2 * size for name, size in sizes.items()}
        return super().__call__(*args, **sizes, **{**kwargs, "latents": larger(small), "num_inference_steps": 5})


class RepeatedLoop(StableDiffusionPipeline):
    """Runs over the same timesteps twice, without setting them anew; the second time from ``begin`` on."""

    @torch.no_grad()
    def __call__(self, begin: int = 0) -> torch.Tensor:
        latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 7, tiny.TEXT_WIDTH)
        self.scheduler.set_timesteps(4)
        for timesteps in (self.scheduler.timesteps, self.scheduler.timesteps[begin:]):
            for t in timesteps:
                latents = latents - 0.1 * self.unet(latents, t, encoder_hidden_states=text).sample
        return latents


class Windows(RepeatedLoop):
    """Sets the timesteps anew for each loop, which leaves the last of them out, and says how many are left or not."""

    says_so = True

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        latents, texts = torch.ones(1, 4, 8, 8), torch.randn(2, 1, 7, tiny.TEXT_WIDTH)
        for text in texts:
            self.scheduler.set_timesteps(5)
            self._num_timesteps = 4 if self.says_so else 5
            for t in self.scheduler.timesteps[:-1]:
                latents = latents - 0.1 * self.unet(latents, t, encoder_hidden_states=text).sample
        return latents


@pytest.mark.parametrize("gate", tiny.slow_but((), (2, 0.5)))
def test_each_loop_is_gated_anew(gate: float, backend: CountingBackend) -> None:
    one = tgate_fx.gate(tiny.make("sd-small"), gate_step=gate)
    small = tiny.latents(one, **CALL, height=16, width=16)
    call = {**CALL, "num_inference_steps": 5}
    expected = tiny.latents(one, **call, height=32, width=32, latents=larger(small))
    for put in (tgate_fx.gate, lambda *args: tgate_fx.compile(*args, backend=backend)):
        pipe = put(HighResolutionFix(**tiny.make("sd-small").components, requires_safety_checker=False), gate)
        pipe.set_progress_bar_config(disable=True)
        for _ in range(2):
            assert torch.equal(tiny.latents(pipe, **CALL), expected)
        phases = [step.phase for step in tgate_fx.report(pipe).steps]
        assert phases == ["pre-gate"] * 2 + ["post-gate"] * 2 + ["pre-gate"] * 2 + ["post-gate"] * 3
        assert [step.index for step in tgate_fx.report(pipe).steps] == list(range(9))
    assert len(backend.graphs) == 4  # two phases of two sizes


class TwiceTheSame(StableDiffusionPipeline):
    """Goes on from an image with another of its size."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = super().__call__(*args, **kwargs)[0]
        return super().__call__(*args, **{**kwargs, "latents": latents})


RULES: dict[str, dict[str, Any]] = {
    "forecast": {"forecast": 2},
    "guided": {"after_gate": "guided", "cache_weight": 1.0, "forecast": 2},
    "full steps": {"gate_step": 1, "full_steps": (3,)},
    "window": {"gate_step": None, "guidance": (0, 2)},
    "deep branch in a straight line": {"deepcache": tgate_fx.DeepCache(2, 0, order=1)},
    "auto": {"gate_step": tgate_fx.AutoGate(0.999)},
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_begins_anew_in_each_loop(rule: str) -> None:
    settings = {"gate_step": 2, **RULES[rule]}
    call = {**CALL, "num_inference_steps": 6, "height": 16, "width": 16}
    one = tgate_fx.gate(tiny.sd(), **settings)
    first = tiny.latents(one, **call)
    opened = [tgate_fx.report(one).gate]
    expected = tiny.latents(one, **call, latents=first)
    opened.append(tgate_fx.report(one).gate)
    assert rule != "auto" or opened[0] != opened[1]
    pipe = TwiceTheSame(**tiny.sd().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tgate_fx.gate(pipe, **settings)
    assert torch.equal(tiny.latents(pipe, **call), expected)
    assert not torch.equal(tiny.latents(pipe, **call, gate_step=None, guidance=None), expected)


class LargerVideo(WanPipeline):
    """Generates a small video, then another one of twice the size from it; each guides in separate calls."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        small = super().__call__(*args, **kwargs).frames
        return super().__call__(*args, **{**kwargs, **from_small(small)})


def from_small(small: torch.Tensor) -> dict[str, Any]:
    latents = torch.nn.functional.interpolate(small, scale_factor=(1, 2, 2))
    return {"height": 32, "width": 32, "latents": latents, "num_inference_steps": 5}


@pytest.mark.parametrize("after_gate", ["positive", "both"])
def test_each_loop_of_separate_calls_is_gated_anew(after_gate: str) -> None:
    one = tgate_fx.gate(wan.text_to_video(), 2, after_gate=after_gate)
    expected = one(**wan.inputs(**from_small(one(**wan.inputs()).frames))).frames
    pipe = LargerVideo(**wan.text_to_video().components)
    pipe.set_progress_bar_config(disable=True)
    tgate_fx.gate(pipe, 2, after_gate=after_gate)
    for _ in range(2):
        assert torch.equal(pipe(**wan.inputs()).frames, expected)
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases == ["pre-gate"] * 2 + ["post-gate"] * 2 + ["pre-gate"] * 2 + ["post-gate"] * 3


def test_loops_of_different_lengths() -> None:
    """FreeInit's fast sampling has fewer steps in its first loops: a half of the steps is another step in each."""
    pipe = loops.free_init()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    tgate_fx.gate(pipe, gate_step=0.5)
    pipe(**loops.animate.text_to_video())
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases == ["pre-gate", "post-gate"] + ["pre-gate"] * 2 + ["post-gate"] * 2


@pytest.mark.parametrize("gate", [2, 0.4])
def test_a_loop_begins_when_timesteps_are_set_anew(gate: float) -> None:
    pipe = tgate_fx.gate(Windows(**tiny.make("sd-small").components, requires_safety_checker=False), gate_step=gate)
    pipe()
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases == (["pre-gate"] * 2 + ["post-gate"] * 2) * 2


def test_a_loop_with_fewer_steps_than_were_said_is_refused_where_it_matters() -> None:
    pipe = Windows(**tiny.make("sd-small").components, requires_safety_checker=False)
    pipe.says_so = False
    torch.manual_seed(0)
    plain = pipe()
    tgate_fx.gate(pipe, gate_step=2)
    pipe()
    for rule in ({"gate_step": 0.4}, {"full_steps": (0.6,)}, {"forecast": 2}):
        with pytest.raises(tgate_fx.UnsupportedError, match="Windows ended a loop of 5 steps after 4: expected"):
            pipe(**rule)
        assert tgate_fx.report(pipe).steps[-1].index == 3  # before the second loop
    torch.manual_seed(0)
    assert torch.equal(pipe(gate_step=None), plain)
    pipe.says_so = True
    pipe(gate_step=0.4)


@pytest.mark.slow
def test_steps_that_are_counted_for_all_loops_together() -> None:
    ltx2_refined = pytest.importorskip("tests.zoo.ltx2_refined", exc_type=ImportError)
    pipe = tgate_fx.gate(ltx2_refined.refine(), gate_step=0.4, forecast=5)  # the last step of each is computed
    pipe(**ltx2_refined.refined())
    assert pipe.num_timesteps == 8
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases == (["pre-gate"] * 2 + ["post-gate"] * 2) * 2


def test_a_loop_over_the_same_timesteps_begins_with_the_first_of_them() -> None:
    pipe = tgate_fx.gate(RepeatedLoop(**tiny.make("sd-small").components, requires_safety_checker=False), gate_step=2)
    pipe()
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases == (["pre-gate"] * 2 + ["post-gate"] * 2) * 2


def test_a_loop_whose_begin_cannot_be_told_is_refused() -> None:
    pipe = RepeatedLoop(**tiny.make("sd-small").components, requires_safety_checker=False)
    expected = pipe(begin=1)
    tgate_fx.gate(pipe, gate_step=2)
    with pytest.raises(tgate_fx.UnsupportedError, match="began step 4 of a loop of 4: expected as many steps"):
        pipe(begin=1)
    assert torch.equal(pipe(begin=1, gate_step=None), expected)
