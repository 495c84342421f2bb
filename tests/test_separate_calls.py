"""Guidance in two calls a step: what each of them caches, what answers the second, and guidance that is turned off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanPipeline

import tgate_fx
from tests import oracle
from tests.test_compile import relative_error
from tests.zoo import wan
from tgate_fx.gated import Gated

GATE = 2
CROSS = ("blocks.0.attn2", "blocks.1.attn2")
SELF = ("blocks.0.attn1", "blocks.1.attn1")


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**wan.inputs(**changes)).frames)


class Position:
    """Which step and which of its calls a pipeline's transformer is in, by whether the pipeline guides."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._guided = False
        self.step = -1
        self.call = 0

    def advance(self, *_: Any) -> None:
        if self.call == 0 and self._guided:
            self.call = 1
            return
        self.step, self.call = self.step + 1, 0
        self._guided = self._pipe._guidance_scale > 1


def expected(
    pipe: Any,
    gate: int = GATE,
    *,
    both: bool = False,
    interval: int = 1,
    callback: Callable[..., Any] | None = None,
    **changes: Any,
) -> torch.Tensor:
    """What a gated generation gives, by hooks on the plain pipeline: every call is computed whole, then replaced."""
    position = Position(pipe)
    kept: dict[tuple[str, int], torch.Tensor] = {}
    outputs: dict[str, Any] = {}

    def value_after_gate(name: str) -> torch.Tensor:
        if both:
            return kept[name, position.call]
        if (name, 1) in kept and position.step == gate and position._guided:
            kept[name, 0] = (kept[name, 0] + kept.pop((name, 1))) / 2
        return kept[name, 0]

    def cross(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            if position.step >= gate:
                return value_after_gate(name)
            if position.call == 0:
                kept.pop((name, 1), None)
            kept[name, position.call] = output
            return output

        return hook

    def self_attention(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            gated = position.step >= gate
            due = position.step % interval == 0 or position.step == gate - 1
            if gated and not due:
                return value_after_gate(name)
            if not due:
                return kept[name, position.call]
            if gated and not both:
                if position.call == 0:
                    kept[name, 0] = output
                    kept.pop((name, 1), None)
            else:
                kept[name, position.call] = output
            return output

        return hook

    def answer(module: Any, args: Any, output: Any) -> Any:
        if position.step < gate or both:
            return output
        if position.call == 0:
            outputs["first"] = output
        return outputs["first"]

    handles = [pipe.transformer.register_forward_pre_hook(position.advance)]
    handles += [pipe.transformer.get_submodule(name).register_forward_hook(cross(name)) for name in CROSS]
    if interval > 1:
        handles += [pipe.transformer.get_submodule(name).register_forward_hook(self_attention(name)) for name in SELF]
    handles.append(pipe.transformer.register_forward_hook(answer))
    with oracle.hooked(*handles):
        return run(pipe, callback_on_step_end=callback, **changes)


def test_what_is_cached_is_the_mean_of_both_calls() -> None:
    pipe = wan.text_to_video()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in CROSS}
    handles = [
        pipe.transformer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(output.clone())
        )
        for name in CROSS
    ]
    with oracle.hooked(*handles):
        run(pipe)
    run(tgate_fx.gate(pipe, GATE))
    first = 2 * (GATE - 1)  # two calls a step
    means = [(seen[name][first] + seen[name][first + 1]) / 2 for name in CROSS]
    buffers = Gated.of(pipe).networks[0].cache.buffers()
    assert all(torch.equal(*pair) for pair in zip(buffers, means, strict=True))


# From gate 4 on self-attention is computed at once; at gate 5 what the step before captured of both calls is used.
@pytest.mark.parametrize("gate", [4, 5])
@pytest.mark.parametrize("after_gate", ["positive", "both"])
def test_self_attention_intervals_keep_a_cache_for_each_branch(gate: int, after_gate: str) -> None:
    wanted = expected(wan.text_to_video(), gate, interval=2, both=after_gate == "both", num_inference_steps=8)
    pipe = tgate_fx.gate(wan.text_to_video(), gate, sp_interval=2, fi_interval=2, after_gate=after_gate)
    got = run(pipe, num_inference_steps=8)
    assert relative_error(got, wanted) < 1e-6
    without = tgate_fx.gate(wan.text_to_video(), gate, after_gate=after_gate)
    assert relative_error(got, run(without, num_inference_steps=8)) > 1e-4


def test_both_calls_go_on_with_a_cache_each() -> None:
    wanted = expected(wan.text_to_video(), both=True)
    pipe = tgate_fx.gate(wan.text_to_video(), GATE, after_gate="both")
    for _ in range(2):
        assert relative_error(run(pipe), wanted) < 1e-6
    assert len(Gated.of(pipe).networks[0].cache.buffers()) == 2 * len(CROSS)
    assert relative_error(wanted, expected(wan.text_to_video())) > 1e-4


@pytest.mark.parametrize("door", [tgate_fx.gate, tgate_fx.compile], ids=["gate", "compile"])
def test_the_second_call_cannot_go_on_alone(door: Any) -> None:
    pipe = wan.text_to_video()
    with pytest.raises(
        tgate_fx.UnsupportedError,
        match=r"after_gate='negative' was given for a WanTransformer3DModel.*expected 'positive' .*'both'.*leave",
    ):
        door(pipe, GATE, after_gate="negative")
    assert type(pipe) is WanPipeline
    door(pipe, GATE, after_gate="positive")


def turn_guidance_off(at: int) -> Callable[..., Any]:
    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            pipe._guidance_scale = 1.0
        return {}

    return callback


@pytest.mark.parametrize("gate", [1, 3])
@pytest.mark.parametrize("at", [0, 1, 2, 3], ids="after step {}".format)
def test_a_callback_turns_guidance_off(gate: int, at: int) -> None:
    callback = turn_guidance_off(at)
    wanted = expected(wan.text_to_video(), gate, callback=callback, num_inference_steps=5)
    pipe = tgate_fx.gate(wan.text_to_video(), gate)
    for _ in range(2):
        assert relative_error(run(pipe, callback_on_step_end=callback, num_inference_steps=5), wanted) < 1e-6
    # Guidance over two equal predictions is none: once gated, it makes no difference that it is turned off.
    always = run(pipe, num_inference_steps=5)
    assert (relative_error(always, wanted) < 1e-5) == (at >= gate)


def test_two_generations_of_other_prompts() -> None:
    pipe = tgate_fx.gate(wan.text_to_video(), GATE)
    other = {"prompt_embeds": wan.noise(1, 16, 32, seed=11), "negative_prompt_embeds": wan.noise(1, 16, 32, seed=12)}
    for changes in ({}, other, {}):
        assert relative_error(run(pipe, **changes), expected(wan.text_to_video(), **changes)) < 1e-6


@pytest.mark.parametrize("step", range(GATE))
def test_an_error_in_the_second_call_leaves_the_pipeline_usable(step: int) -> None:
    pipe = tgate_fx.gate(wan.text_to_video(), GATE)
    wanted = run(pipe)
    position = Position(pipe)

    def fail(*_: Any) -> None:
        if (position.step, position.call) == (step, 1):
            raise KeyboardInterrupt

    handles = [
        pipe.transformer.register_forward_pre_hook(position.advance),
        pipe.transformer.blocks[1].attn2.register_forward_pre_hook(fail),
    ]
    with oracle.hooked(*handles), pytest.raises(KeyboardInterrupt):
        run(pipe)
    assert torch.equal(run(pipe), wanted)
    tgate_fx.restore(pipe)
    assert torch.equal(run(pipe), run(wan.text_to_video()))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("off_at", [None, 0, 1, 2])
def test_calls_may_be_given_timesteps_of_their_own(off_at: int | None) -> None:
    """Kandinsky 5 casts the timestep for each call, and guides by the scale that it has just then."""

    kandinsky5 = pytest.importorskip("tests.zoo.kandinsky5", exc_type=ImportError)

    def generate(pipe: Any) -> torch.Tensor:
        callback = None if off_at is None else turn_guidance_off(off_at)
        return torch.as_tensor(pipe(**kandinsky5.inputs(num_frames=5, callback_on_step_end=callback)).frames)

    pipe = kandinsky5.pipeline(diffusers.Kandinsky5T2VPipeline, kandinsky5.video_vae(), dtype=torch.bfloat16)
    timesteps: list[int] = []
    calls = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: timesteps.append(id(kwargs["timestep"])), with_kwargs=True
    )
    with oracle.hooked(calls):
        plain = generate(pipe)
    guided = 4 if off_at is None else off_at + 1
    assert len(timesteps) == guided + 4
    got = generate(tgate_fx.gate(pipe, GATE))
    steps = tgate_fx.report(pipe).steps
    assert [step.phase for step in steps] == ["pre-gate"] * GATE + ["post-gate"] * 2
    assert [step.calls for step in steps] == [2 if index < min(guided, GATE) else 1 for index in range(4)]
    assert torch.isfinite(got).all()
    assert relative_error(got, plain) > 1e-3


class OneCall(WanPipeline):
    """Guides in one batch, as no pipeline of this denoiser does."""

    def __call__(self, num_inference_steps: int = 4, guidance_scale: float = 4.0) -> Any:
        self._guidance_scale = guidance_scale
        self.scheduler.set_timesteps(num_inference_steps)
        latents = wan.noise(1, 16, 2, 2, 2, seed=5)
        text = torch.cat([wan.noise(1, 16, 32, seed=2), wan.noise(1, 16, 32, seed=1)])
        for timestep in self.scheduler.timesteps:
            both = torch.cat([latents, latents])
            output = self.transformer(both, timestep.expand(2), text, return_dict=False)[0]
            negative, positive = output.chunk(2)
            output = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
        return latents


@torch.no_grad()
def test_guidance_in_one_call_is_refused_before_the_gate() -> None:
    plain = wan.text_to_video()
    pipe = OneCall(**plain.components)
    expected = pipe()
    for gate in (1, 2):
        tgate_fx.gate(pipe, gate)
        with pytest.raises(tgate_fx.UnsupportedError, match=r"called once in the first step: expected one call for"):
            pipe()
        assert len(tgate_fx.report(pipe).steps) == 1
        tgate_fx.restore(pipe)
    tgate_fx.gate(pipe, GATE, after_gate="both")
    assert relative_error(pipe(), expected) > 1e-4
    with tgate_fx.disabled(pipe):
        assert torch.equal(pipe(), expected)
