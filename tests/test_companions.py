"""ControlNets beside the denoiser: scales, windows and guess mode; what is left out; what undoes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline

import tgate_fx
from tests import oracle
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says
from tests.zoo import controlnet, noise, stable_diffusion
from tests.zoo.controlnet import SD, UNION, XL, image, inputs, pooled

GATE = 2


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**inputs(image=image()), **changes}).images)


def make(**parts: Any) -> Any:
    return controlnet.sd(f"{SD}Pipeline", **{"controlnet": controlnet.controlnet(), **parts})


def two() -> Any:
    return make(controlnet=[controlnet.controlnet(), controlnet.controlnet()])


def network_of(module: Any, generate: Callable[[], Any]) -> oracle.Network:
    sites = oracle.find_sites(module, generate, ("sample", "controlnet_cond"), ("encoder_hidden_states",))
    assert sites
    return oracle.Network(module, sites)


def by_hooks(pipe: Any, generate: Callable[[], Any], keep: str = "negative", form: str = "batch") -> Any:
    """Generate with the gate written down in plain hooks, on the UNet and on each ControlNet."""
    nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
    companions = [network_of(net, generate) for net in nets]
    unet = network_of(pipe.unet, generate)
    return oracle.gated([unet], generate, GATE, "batch", keep=keep, companions=companions, companions_form=form)


WINDOW = {"control_guidance_start": 0.3, "control_guidance_end": 0.7, "num_inference_steps": 8}


@pytest.mark.parametrize(
    ("pipeline", "changes"),
    [
        (make, {}),
        (make, WINDOW),
        (make, {"controlnet_conditioning_scale": 0.3}),
        (two, {"image": [image(), image(6)], "controlnet_conditioning_scale": [0.3, 0.8]}),
    ],
    ids=["plain", "window", "scale", "two"],
)
def test_the_negative_branch_goes_on(pipeline: Callable[[], Any], changes: dict[str, Any]) -> None:
    pipe = pipeline()
    plain = run(pipe, **changes)
    expected = by_hooks(pipe, lambda: run(pipe, **changes))
    tgate_fx.gate(pipe, GATE)
    got = run(pipe, **changes)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, plain) > 1e-4
    tgate_fx.restore(pipe)
    assert torch.equal(run(pipe, **changes), plain)


def test_guess_mode_keeps_the_conditional_branch() -> None:
    """The unconditional branch has zeros in place of control, so that it would go on without any."""
    pipe = make()
    expected = by_hooks(pipe, lambda: run(pipe, guess_mode=True), keep="positive", form="none")
    tgate_fx.gate(pipe, GATE)
    assert relative_error(run(pipe, guess_mode=True), expected) < 1e-5


def test_boxes_keep_the_conditional_branch() -> None:
    """The unconditional branch has none."""
    results = []
    for after_gate in (None, "positive"):
        pipe = tgate_fx.gate(stable_diffusion.gligen(), GATE, after_gate=after_gate)
        results.append(torch.as_tensor(pipe(**stable_diffusion.boxed()).images))
    assert torch.equal(*results)


def test_a_controlnet_that_pools_is_in_guess_mode() -> None:
    pipe = make(controlnet=controlnet.controlnet(global_pool_conditions=True))
    expected = by_hooks(pipe, lambda: run(pipe), keep="positive", form="none")
    tgate_fx.gate(pipe, GATE)
    assert relative_error(run(pipe), expected) < 1e-5


def test_companions_may_be_left_ungated(backend: CountingBackend) -> None:
    pipe = make()
    unet = network_of(pipe.unet, lambda: run(pipe))
    expected = oracle.gated([unet], lambda: run(pipe), GATE, "batch", keep="negative")
    tgate_fx.gate(pipe, GATE, gate_companions=False)
    assert relative_error(run(pipe), expected) < 1e-5
    assert "forward" not in vars(pipe.controlnet)
    tgate_fx.restore(pipe)
    tgate_fx.compile(pipe, GATE, gate_companions=False, backend=backend)
    assert relative_error(run(pipe), expected) < 1e-5
    assert len(backend.graphs) == 2


def union(pipe: Any, **changes: Any) -> torch.Tensor:
    given = {"control_image": [image()], **pooled(control_mode=[1]), **changes}
    return torch.as_tensor(pipe(**inputs(**given)).images)


def xl(pipe: Any, **changes: Any) -> torch.Tensor:
    return run(pipe, **pooled(**changes))


@pytest.mark.parametrize(
    ("pipeline", "generate"),
    [
        (make, run),
        pytest.param(lambda: controlnet.xl(f"{XL}Pipeline"), xl, marks=pytest.mark.slow),
        pytest.param(lambda: controlnet.union(f"{UNION}Pipeline"), union, marks=pytest.mark.slow),
    ],
    ids=["sd", "xl", "union"],
)
def test_no_scale_and_no_window_takes_a_graph(
    pipeline: Callable[[], Any], generate: Callable[..., torch.Tensor], backend: CountingBackend
) -> None:
    eager = tgate_fx.gate(pipeline(), GATE)
    pipe = tgate_fx.compile(pipeline(), GATE, backend=backend)
    results = []
    for changes in ({}, {"controlnet_conditioning_scale": 0.3}, {"controlnet_conditioning_scale": 0.0}, WINDOW):
        results.append(generate(pipe, **changes))
        assert torch.equal(results[-1], generate(eager, **changes))
        report = tgate_fx.report(pipe)
        assert report.compiled_graphs == len(backend.graphs) == 4
        assert report.recompiles == 0
    assert not any(torch.equal(results[0], other) for other in results[1:])
    assert sum(step.compiled for step in report.steps) == 0
    assert all(step.companion_seconds > 0 for step in report.steps)


class SometimesControlled(StableDiffusionControlNetPipeline):
    """Calls its ControlNet at some steps only."""

    @torch.no_grad()
    def __call__(self, steps: tuple[int, ...], guidance_scale: float = 4.0) -> torch.Tensor:
        self._guidance_scale = guidance_scale
        self.scheduler.set_timesteps(6)
        self._num_timesteps = 6
        latents = noise(1, 4, 8, 8)
        text = noise(2, 7, controlnet.WIDTH, seed=2)
        for index, t in enumerate(self.scheduler.timesteps):
            given = {"timestep": t, "encoder_hidden_states": text}
            batch = torch.cat([latents, latents])
            control: dict[str, Any] = {}
            if index in steps:
                down, middle = self.controlnet(batch, controlnet_cond=image().expand(2, -1, -1, -1), **given)[:2]
                control = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            uncond, cond = self.unet(batch, **given, **control, return_dict=False)[0].chunk(2)
            latents = self.scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents).prev_sample
        return latents


@pytest.mark.parametrize("steps", [(0, 1, 3), (2, 3, 4), (0, 1, 2, 3, 4, 5), (4, 5)])
def test_a_companion_runs_wherever_the_denoiser_does(steps: tuple[int, ...]) -> None:
    """Whichever step it begins at: only where the denoiser's output is forecast may it rest."""
    pipe = SometimesControlled(**make().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    tgate_fx.gate(pipe, GATE, after_gate="positive", forecast=2)
    denoised: list[int] = []
    controlled: list[int] = []
    handles = [
        pipe.unet.conv_in.register_forward_hook(lambda *_: denoised.append(pipe._tgate.steps.index)),
        pipe.controlnet.conv_in.register_forward_hook(lambda *_: controlled.append(pipe._tgate.steps.index)),
    ]
    with oracle.hooked(*handles):
        assert torch.isfinite(pipe(steps)).all()
    assert denoised == [0, 1, 2, 4, 5]
    assert set(controlled) >= set(steps) & set(denoised)
    assert set(controlled) <= set(steps)


@pytest.mark.parametrize(
    ("steps", "full"),
    [
        ((0, 1, 2, 3), {0, 1}),
        ((0, 3, 4), {0, 3}),  # not at the last step before the gate
        ((3, 4, 5), {3}),
        ((1, 4, 5), {1}),  # what was kept then still holds
    ],
)
def test_a_companion_that_is_left_out_computes_all_of_its_next_step(steps: tuple[int, ...], full: set[int]) -> None:
    pipe = SometimesControlled(**make().components, requires_safety_checker=False)
    rows: dict[int, int] = {}
    tgate_fx.gate(pipe, GATE)

    def count(module: Any, args: Any) -> None:
        index = len(tgate_fx.report(pipe).steps)
        rows[index] = args[0].shape[0]

    with oracle.hooked(pipe.controlnet.conv_in.register_forward_pre_hook(count)):
        got = pipe(steps)
    assert torch.isfinite(got).all()
    assert {index for index, number in rows.items() if number == 2} == full
    assert set(rows) == set(steps)
    tgate_fx.restore(pipe)
    nets = network_of(pipe.controlnet, lambda: pipe(steps))
    unet = network_of(pipe.unet, lambda: pipe(steps))
    expected = oracle.gated([unet], lambda: pipe(steps), GATE, "batch", keep="negative", companions=[nets])
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("steps", [(0, 1, 4), (0, 1, 2, 3, 4), (4, 5)])
def test_a_gate_that_opens_by_itself_finds_companions_that_were_left_out(steps: tuple[int, ...]) -> None:
    pipe = SometimesControlled(**make().components, requires_safety_checker=False)
    results = []
    for gate_step in (3, tgate_fx.AutoGate(-1, earliest=3)):
        tgate_fx.gate(pipe, gate_step)
        results.append(pipe(steps))
        tgate_fx.restore(pipe)
    assert torch.equal(*results)


def test_text_after_the_gate_changes_nothing() -> None:
    pipe = tgate_fx.gate(make(), GATE)
    expected = run(pipe)
    calls = []

    def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        calls.append(kwargs["encoder_hidden_states"])
        if len(calls) <= GATE:
            return None
        return args, {**kwargs, "encoder_hidden_states": oracle.changed(kwargs["encoder_hidden_states"])}

    with oracle.hooked(pipe.controlnet.register_forward_pre_hook(replace, with_kwargs=True)):
        assert torch.equal(run(pipe), expected)
    assert len(calls) == 4


@pytest.mark.parametrize("settings", [{"sp_interval": 2, "fi_interval": 2}, {"deepcache": tgate_fx.DeepCache(2, 0)}])
def test_nothing_but_cross_attention_is_cached_of_a_companion(settings: dict[str, Any]) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for name, extra in (("alone", {}), ("beside", settings)):
        pipe = tgate_fx.gate(make(), GATE, **extra)
        outputs = seen.setdefault(name, [])
        record = (
            pipe.controlnet.mid_block.attentions[0]
            .transformer_blocks[0]
            .attn1.to_q.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        )
        with oracle.hooked(record):
            run(pipe, num_inference_steps=6)
    assert len(seen["alone"]) == len(seen["beside"]) == 6  # its self-attention runs at every step


def test_one_controlnet_twice_is_left_as_it_is() -> None:
    """Its two calls in a step cannot be told apart from two steps."""
    net = controlnet.controlnet()
    pipe = tgate_fx.gate(make(controlnet=[net, net]), GATE)
    given = {"image": [image(), image(6)]}
    assert torch.isfinite(run(pipe, **given)).all()
    assert "forward" not in vars(net)


def test_a_controlnet_replaced_after_gating() -> None:
    pipe = tgate_fx.gate(make(), GATE)
    expected = run(pipe)
    own, pipe.controlnet = pipe.controlnet, controlnet.controlnet()
    with pytest.raises(tgate_fx.StateError, match=says("pipe.controlnet was replaced", "expected the same", "restore")):
        run(pipe)
    pipe.controlnet = own
    assert torch.equal(run(pipe), expected)
    tgate_fx.restore(pipe)
    assert "forward" not in vars(own)


def test_an_error_leaves_nothing_behind() -> None:
    pipe = tgate_fx.gate(make(), GATE)
    expected = run(pipe)

    def fail(module: Any, args: Any) -> None:
        if len(tgate_fx.report(pipe).steps) == GATE:
            raise RuntimeError("in the middle")

    with oracle.hooked(pipe.unet.register_forward_pre_hook(fail)), pytest.raises(RuntimeError, match="in the middle"):
        run(pipe)
    assert torch.equal(run(pipe), expected)


def test_gated_again_it_is_what_it_was() -> None:
    pipe = make()
    own = {name: vars(module).get("forward") for name, module in pipe.controlnet.named_modules()}
    signature = inspect.signature(pipe.controlnet.forward)
    tgate_fx.gate(pipe, GATE)
    assert inspect.signature(pipe.controlnet.forward) == signature
    tgate_fx.restore(pipe)
    assert own == {name: vars(module).get("forward") for name, module in pipe.controlnet.named_modules()}
