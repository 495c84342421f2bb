"""What is kept after the gate: the branches' weights, guidance that goes on, and steps that are forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import tgate_fx
from tests import oracle, tiny, zoo
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_families import ENTRIES, calls_of, outputs_of
from tests.test_families import by_hooks as by_hooks_of_entry
from tests.test_refusals import says
from tests.zoo import adapters, controlnet, entry_of
from tgate_fx.forecast import Forecast
from tgate_fx.gated import Gated
from tgate_fx.roles import Kind

GATE = 3
STEPS = 9
KWARGS = {**tiny.inputs("sd"), "num_inference_steps": STEPS}


def generate(pipe: Any, **changes: Any) -> torch.Tensor:
    return tiny.latents(pipe, **{**KWARGS, **changes})


def by_hooks(pipe: Any, keep: str = "positive", gate: int = GATE, **rule: Any) -> torch.Tensor:
    """Generate with the rule written down in plain hooks."""
    sites = [site.name for site in tgate_fx.sites(pipe)]
    networks = [oracle.Network(pipe.unet, sites)]
    result: torch.Tensor = oracle.gated(networks, lambda: generate(pipe), gate, "batch", keep=keep, steps=STEPS, **rule)
    return result


def with_velocity(name: str) -> Any:
    pipe = tiny.sd()
    pipe.scheduler = tiny.scheduler(name).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def alpha(pipe: Any) -> Callable[[int], float]:
    """What multiplies the image in the noisy one at a step, from the scheduler's training."""
    return lambda step: float(pipe.scheduler.alphas_cumprod[int(pipe.scheduler.timesteps[step])] ** 0.5)


@pytest.mark.parametrize("gate", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_weights_of_the_branches(weight: float, gate: int) -> None:
    pipe = tiny.sd()
    keep = "positive" if weight == 1 else "negative"  # which goes on by itself
    expected = by_hooks(pipe, keep, gate, weight=weight)
    mean = generate(tgate_fx.gate(pipe, gate))
    assert relative_error(generate(pipe, cache_weight=weight), expected) < 1e-6
    assert relative_error(mean, expected) > 1e-4
    assert torch.equal(generate(pipe), mean)
    tgate_fx.restore(pipe)
    assert relative_error(generate(tgate_fx.gate(pipe, gate, cache_weight=weight)), expected) < 1e-6


def test_the_weight_is_that_of_cached_self_attention_too() -> None:
    pipe = tiny.sd()
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn1")]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with oracle.hooked(
        *(
            pipe.unet.get_submodule(name).register_forward_hook(lambda _, args, out, to=seen[name]: to.append(out))
            for name in names
        )
    ):
        generate(pipe)

    def stop_at_the_first_gated_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == GATE + 1
        return {}

    tgate_fx.gate(pipe, GATE + 1, cache_weight=1.0, fi_interval=3)
    generate(pipe, callback_on_step_end=stop_at_the_first_gated_step)
    cached = Gated.of(pipe).runs[0]._cached[0][Kind.SELF_ATTENTION]  # type: ignore[union-attr]
    assert names
    for name, value in zip(names, cached, strict=True):
        assert torch.equal(value, seen[name][GATE].chunk(2)[1])


@pytest.mark.parametrize("name", ["Kandinsky3Pipeline", "LuminaPipeline", "HunyuanDiTPipeline"])
def test_where_text_enters_in_another_way_too_the_conditional_branch_goes_on_by_default(name: str) -> None:
    entry = zoo.entry_of(name)
    pipe = tgate_fx.gate(entry.make(), 2, **entry.settings)
    got = entry.run(pipe)
    assert torch.equal(got, entry.run(pipe, after_gate="positive"))
    assert not torch.equal(got, entry.run(pipe, after_gate="negative"))


def test_a_generation_that_never_gates_holds_no_difference() -> None:
    """Of which nothing is known where the model predicts the picture."""
    pipe = tiny.sd()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="sample")
    plain = generate(pipe)
    tgate_fx.gate(pipe, None, after_gate="guided")
    assert torch.equal(generate(pipe), plain)
    with pytest.warns(UserWarning, match="Nothing was gated"):
        assert torch.equal(generate(pipe, gate_step=STEPS), plain)


def test_guidance_goes_on_under_heun_with_velocity() -> None:
    """It evaluates at levels of noise that its own timesteps have."""
    pipe = with_velocity("HeunDiscrete")
    expected = by_hooks(pipe, gate=5, weight=1.0, level=alpha(pipe))
    tgate_fx.gate(pipe, 5, after_gate="guided", cache_weight=1.0)
    got = generate(pipe)
    assert relative_error(got, expected) < 1e-4
    assert relative_error(generate(pipe, after_gate="positive"), expected) > 1e-3


@pytest.mark.parametrize("rule", [{"cache_weight": 1.0}, {"guidance": (0, GATE - 1)}])
def test_the_branch_that_is_cached_goes_on_by_itself(rule: dict[str, Any]) -> None:
    """On a model that conditioning reaches in another way too, so that it matters."""
    pipe = tgate_fx.gate(tiny.make("sdxl-small"), GATE)
    got = generate(pipe, **rule)
    assert torch.equal(got, generate(pipe, **rule, after_gate="positive"))
    others = {name: value for name, value in rule.items() if name != "guidance"}  # which refuses the other branch
    assert not torch.equal(got, generate(pipe, **others, after_gate="negative"))


def test_the_conditional_branch_alone_is_cached_bit_for_bit() -> None:
    """Its cache is what a run without the other branch would have captured."""
    pipe = tiny.sd()
    seen = []
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    with oracle.hooked(attention.register_forward_hook(lambda module, args, output: seen.append(output))):
        generate(pipe)
    tgate_fx.gate(pipe, GATE, cache_weight=1.0)
    generate(pipe)
    cached = pipe._tgate.networks[0].cache.buffers()[0]
    assert torch.equal(cached, seen[GATE - 1].chunk(2)[1])


@pytest.mark.parametrize("every", [2, 3, 20])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_forecast_steps(every: int, weight: float) -> None:
    pipe = tiny.sd()
    expected = by_hooks(pipe, forecast=every, weight=weight)
    tgate_fx.gate(pipe, GATE, after_gate="positive", cache_weight=weight)
    calls: list[int] = []
    with oracle.hooked(pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))):
        got = generate(pipe, forecast=every)
    assert relative_error(got, expected) < 1e-5
    rows = tgate_fx.report(pipe).steps
    computed = [index for index in range(STEPS) if index < GATE or not (index - GATE) % every or index + 1 == STEPS]
    assert [row.index for row in rows if row.phase != "forecast"] == computed
    assert [row.batch for row in rows if row.phase == "forecast"] == [0] * (STEPS - len(computed))
    assert len(calls) == len(computed)
    assert relative_error(generate(pipe), got) > 1e-4


def test_a_straight_line_is_forecast_exactly() -> None:
    forecast = Forecast()
    start, slope = torch.randn(2, 3), torch.randn(2, 3)
    forecast.add(4, (start,))
    assert torch.equal(forecast.at(5)[0], start)
    for index in (7, 10):
        forecast.add(index, (start + slope * (index - 4),))
    for index in (11, 12):
        assert torch.allclose(forecast.at(index)[0], start + slope * (index - 4), atol=1e-5)


@pytest.mark.parametrize("forecast", [1, 2])
@pytest.mark.parametrize(
    ("make", "level"),
    [
        (tiny.sd, lambda pipe: lambda step: 1.0),
        (lambda: with_velocity("DDIM"), alpha),
        (lambda: with_velocity("EulerDiscrete"), alpha),
        (lambda: with_velocity("DPMSolverMultistep"), alpha),
    ],
    ids=["noise", "velocity, DDIM", "velocity, Euler", "velocity, DPM++"],
)
def test_guidance_that_goes_on(
    make: Callable[[], Any], level: Callable[[Any], Callable[[int], float]], forecast: int
) -> None:
    pipe = make()
    expected = by_hooks(pipe, weight=1.0, forecast=forecast, level=level(pipe))
    tgate_fx.gate(pipe, GATE, after_gate="guided", cache_weight=1.0, forecast=forecast)
    got = generate(pipe)
    assert relative_error(got, expected) < 1e-3  # Euler's timesteps are rounded between those of the training
    assert relative_error(generate(pipe, after_gate="positive"), got) > 1e-2
    assert {row.batch for row in tgate_fx.report(pipe).steps[GATE:]} <= {0, 1}
    assert torch.equal(generate(pipe, guidance_scale=1.0), generate(pipe, guidance_scale=1.0, after_gate="positive"))


def test_guidance_that_goes_on_in_separate_calls() -> None:
    entry = entry_of("WanPipeline")
    pipe = entry.make()
    sites = [site.name for site in tgate_fx.sites(pipe)]
    sigmas = []

    def level(step: int) -> float:
        sigmas[:] = pipe.scheduler.sigmas.tolist()
        return 1 - sigmas[step]

    networks = [oracle.Network(pipe.transformer, sites)]
    expected = oracle.gated(networks, lambda: entry.run(pipe), 2, "calls", 2, weight=1.0, level=level)
    tgate_fx.gate(pipe, 2, after_gate="guided", cache_weight=1.0)
    assert relative_error(entry.run(pipe), expected) < 1e-5
    assert max(sigmas) <= 1
    tgate_fx.restore(pipe)
    assert relative_error(entry.run(tgate_fx.gate(pipe, 2, cache_weight=1.0)), expected) > 1e-4


def test_rescaled_guidance_goes_on_too() -> None:
    """The pipeline is given a pair, with which it does what it always does."""
    pipe = tiny.sd()
    sites = [site.name for site in tgate_fx.sites(pipe)]
    networks = [oracle.Network(pipe.unet, sites)]

    def rescaled() -> torch.Tensor:
        return generate(pipe, guidance_rescale=0.7)

    expected = oracle.gated(networks, rescaled, GATE, "batch", weight=1.0, level=lambda step: 1.0)
    plain = by_hooks(pipe, weight=1.0, level=lambda step: 1.0)
    tgate_fx.gate(pipe, GATE, after_gate="guided", cache_weight=1.0)
    assert relative_error(rescaled(), expected) < 1e-5
    assert relative_error(plain, expected) > 1e-4


@pytest.mark.parametrize("regional", tiny.slow_but((False,), (False, True)))
def test_no_rule_takes_a_graph(regional: bool, backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    tgate_fx.compile(pipe, GATE, backend=backend, regional=regional)
    tgate_fx.gate(eager, GATE)
    generate(pipe)
    for rule in (
        {"cache_weight": 1.0},
        {"cache_weight": 0.7, "after_gate": "negative"},
        {"after_gate": "guided"},
        {"after_gate": "guided", "cache_weight": 1.0, "forecast": 2},
        {"forecast": 3},
        {},
    ):
        assert relative_error(generate(pipe, **rule), generate(eager, **rule)) < 1e-5
    assert len(backend.graphs) == 2
    assert tgate_fx.report(pipe).recompiles == 0


def dropped(pipe: Any, window: tuple[int, int], run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Generate with the conditional half of the output in place of both, outside of these steps."""
    steps: list[int] = []

    def answer(module: Any, args: Any, output: Any) -> Any:
        steps.append(len(steps))
        if window[0] <= steps[-1] < window[1]:
            return output
        return oracle.mapped(lambda tensor: torch.cat([tensor.chunk(2)[1]] * 2), output)

    with oracle.hooked(pipe.unet.register_forward_hook(answer)):
        return run()


@pytest.mark.parametrize("window", [(0, 3), (2, 6), (1, 20)])
@pytest.mark.parametrize("prompts", [1, 2])
def test_guidance_at_some_steps(window: tuple[int, int], prompts: int) -> None:
    pipe = tiny.sd()
    inputs = tiny.inputs("sd", prompts)
    plain = generate(pipe, **inputs)
    expected = dropped(pipe, window, lambda: generate(pipe, **inputs))
    tgate_fx.gate(pipe, None, guidance=window)
    assert relative_error(generate(pipe, **inputs), expected) < 1e-5
    assert relative_error(plain, expected) > 1e-3
    rows = [step.batch for step in tgate_fx.report(pipe).steps]
    assert rows == [prompts * (2 if window[0] <= index < window[1] else 1) for index in range(STEPS)]
    alone = {**inputs, "guidance_scale": 1.0}
    assert torch.equal(generate(pipe, **alone), generate(pipe, **alone, guidance=None))


def test_the_window_ends_before_the_gate() -> None:
    """What is cached is then the conditional branch's alone, whatever the weight."""
    pipe = tiny.sd()
    unguided = generate(tgate_fx.gate(pipe, GATE, guidance=(0, GATE - 1)))
    assert [step.phase for step in tgate_fx.report(pipe).steps[:4]] == [
        "pre-gate",
        "pre-gate",
        "pre-gate, unguided",
        "post-gate",
    ]
    tgate_fx.restore(pipe)
    expected = dropped(pipe, (0, GATE - 1), lambda: by_hooks(pipe, weight=1.0))
    assert relative_error(unguided, expected) < 1e-5


def test_a_window_in_separate_calls() -> None:
    entry = entry_of("WanPipeline")
    pipe = entry.make()
    seen: list[Any] = []

    def answer(module: Any, args: Any, output: Any) -> Any:
        seen.append(output)
        step, call = divmod(len(seen) - 1, 2)
        return seen[-2] if call and step >= 2 else output

    with oracle.hooked(pipe.transformer.register_forward_hook(answer)):
        expected = entry.run(pipe)
    tgate_fx.gate(pipe, None, guidance=(0, 2))
    assert relative_error(entry.run(pipe), expected) < 1e-6
    assert [step.calls for step in tgate_fx.report(pipe).steps] == [2, 2, 1, 1]


def test_a_window_takes_one_graph_more(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), GATE + 2, guidance=(0, GATE), backend=backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), GATE + 2, guidance=(0, GATE))
    tgate_fx.warmup(pipe, height=16, width=16)
    assert len(backend.graphs) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for steps in (7, 9):
            assert relative_error(*[generate(each, num_inference_steps=steps) for each in (pipe, eager)]) < 1e-5


def test_companions_rest_while_steps_are_forecast() -> None:
    pipe = controlnet.with_controlnet("StableDiffusionControlNetPipeline")
    tgate_fx.gate(pipe, 2, after_gate="positive", forecast=3)
    calls: list[int] = []
    call = controlnet.inputs(image=controlnet.image(), num_inference_steps=8)
    with oracle.hooked(pipe.controlnet.conv_in.register_forward_hook(lambda *_: calls.append(1))):
        result = pipe(**call).images
    assert torch.isfinite(result).all()
    assert len(calls) == 2 + 3
    assert [row.phase for row in tgate_fx.report(pipe).steps].count("forecast") == 3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"cache_weight": 1.5}, says("cache_weight=1.5", "from 0", "to 1")),
        ({"cache_weight": "mean"}, says("cache_weight='mean'", "expected a number")),
        ({"cache_weight": float("nan")}, says("cache_weight=nan")),
        ({"forecast": 0}, says("forecast=0", "expected an int ≥ 1")),
        ({"forecast": 2, "fi_interval": 2}, says("forecast=2", "fi_interval=2", "Leave one out")),
        ({"forecast": 2, "after_gate": "both"}, says("forecast=2", "after_gate='both'", "Leave one out")),
        ({"guidance": (3, 3)}, says("guidance=(3, 3)", "expected (start, stop)")),
        ({"guidance": (3, 8)}, says("guidance=(3, 8)", "gate_step=3", "no step before the gate")),
        ({"guidance": 5}, says("guidance=5", "expected (start, stop)")),
        ({"guidance": (0, 5), "sp_interval": 2}, says("guidance=(0, 5)", "sp_interval=2", "Leave one out")),
        ({"guidance": (0, 5), "after_gate": "both"}, says("guidance=(0, 5)", "after_gate='both'", "Leave one out")),
    ],
)
@pytest.mark.parametrize("per_call", [False, True])
def test_what_is_refused(rule: dict[str, Any], message: str, per_call: bool) -> None:
    pipe = tiny.make("sd-small")
    plain = generate(pipe)
    if per_call:
        expected = generate(tgate_fx.gate(pipe, GATE))
        with pytest.raises(tgate_fx.ArgumentError, match=message):
            generate(pipe, **rule)
        assert torch.equal(generate(pipe), expected)
    else:
        with pytest.raises(tgate_fx.ArgumentError, match=message):
            tgate_fx.gate(pipe, GATE, **rule)
        assert torch.equal(generate(pipe), plain)


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # of KDPM2's own
def test_schedulers_that_a_rule_is_refused_with() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    pipe.scheduler = tiny.scheduler("HeunDiscrete")
    expected = generate(pipe)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("forecast=2", "HeunDiscreteScheduler", "order 1")):
        generate(pipe, forecast=2)
    assert torch.equal(generate(pipe), expected)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("after_gate='guided'", "DDIMScheduler", "'sample'")):
        generate(pipe, after_gate="guided")
    pipe.scheduler = diffusers.KDPM2DiscreteScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("'v_prediction' at levels between those of its steps")):
        generate(pipe, after_gate="guided")
    generate(pipe)
    entry = entry_of("HeliosPyramidPipeline of two stages")
    pipe = tgate_fx.gate(entry.make(), GATE, after_gate="guided")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("HeliosScheduler", "'flow_prediction' in stages")):
        entry.run(pipe)
    entry.run(pipe, after_gate="positive")


@pytest.mark.parametrize("pipeline", ["WanPipeline", "LongCatAudioDiTPipeline"])
def test_guidance_cannot_go_on_from_where_all_is_noise(pipeline: str) -> None:
    """At a sigma of 1, or of 0 where a schedule is inverted."""
    entry = entry_of(pipeline)
    pipe = entry.make()
    if pipeline == "WanPipeline":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    tgate_fx.gate(pipe, 1, after_gate="guided")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("nothing but noise", "Give gate_step=2 or more")):
        entry.run(pipe)
    tgate_fx.restore(pipe)
    entry.run(tgate_fx.gate(pipe, 2, after_gate="guided"))


def test_guidance_cannot_go_on_from_where_nearly_all_is_noise() -> None:
    """Zero terminal SNR, by timestep and by position, and the first of Wan's own levels."""
    for name in ("DDIM", "EulerDiscrete"):
        pipe = with_velocity(name)
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **zero)
        tgate_fx.gate(pipe, 2, after_gate="guided", cache_weight=1.0)
        expected = generate(pipe)
        for early in (1, tgate_fx.AutoGate(-1)):
            with pytest.raises(tgate_fx.UnsupportedError, match=says("nothing but noise", r"AutoGate(earliest=2)")):
                generate(pipe, gate_step=early)
        assert torch.equal(generate(pipe, gate_step=tgate_fx.AutoGate(-1, earliest=2)), expected)
    entry = entry_of("WanPipeline")
    pipe = entry.make()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    tgate_fx.gate(pipe, 1, after_gate="guided")
    with pytest.raises(tgate_fx.UnsupportedError, match="nothing but noise"):
        entry.run(pipe)


def test_guidance_goes_on_in_a_loop_from_the_middle_of_the_schedule() -> None:
    """Where the scheduler itself finds out at its first step which one that is."""
    entry = entry_of("WanVideoToVideoPipeline")
    pipe = entry.make()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kwargs = {"strength": 0.5, "num_inference_steps": 2 * STEPS}
    given = entry.inputs
    entry = dataclasses.replace(entry, inputs=lambda: {**given(), **kwargs})
    entry.run(pipe)
    levels = [1 - sigma for sigma in pipe.scheduler.sigmas.tolist()][-STEPS - 1 :]
    expected, _ = by_hooks_of_entry(pipe, entry, 1, weight=1.0, steps=STEPS, level=levels.__getitem__)
    tgate_fx.gate(pipe, 1, after_gate="guided", cache_weight=1.0)
    assert relative_error(entry.run(pipe), expected) < 1e-5


def test_faces_need_guidance_at_every_step() -> None:
    pipe = adapters.sd_with_ip_adapters(1, adapters.face_plus_projection)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("guidance=(0, 2)", "FaceID Plus", "Leave guidance out")):
        tgate_fx.gate(pipe, 3, guidance=(0, 2))


def test_a_loop_of_ones_own_is_checked_too() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE, forecast=2)
    pipe.scheduler = tiny.scheduler("HeunDiscrete")
    with (
        pytest.raises(tgate_fx.UnsupportedError, match=says("forecast=2", "HeunDiscreteScheduler")),
        tgate_fx.generation(pipe, 4, guided=True),
    ):
        pass
    with tgate_fx.disabled(pipe):
        generate(pipe)


@pytest.mark.parametrize("window", tiny.slow_but((), [(0, 5), (2, 5)]))
def test_a_share_and_a_window_are_warmed_up(window: tuple[int, int], backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), 0.8, guidance=window, backend=backend)
    tgate_fx.warmup(pipe, height=16, width=16)
    assert len(backend.graphs) == 3
    with torch.compiler.set_stance("fail_on_recompile"):
        generate(pipe, num_inference_steps=10)


def test_a_number_of_steps_that_is_not_known() -> None:
    schedule = tgate_fx.schedule.Schedule(2, forecast=2)
    with pytest.raises(tgate_fx.ArgumentError, match=says("forecast=2", "does not say how many steps")):
        schedule.resolve(None)


# Three chunks are kept whole; and this one has fewer frames from its second step on, which must not be gated yet.
ONE_BRANCH = [each for each in ENTRIES if each.form != "whole" and "before the gate" not in each.pipeline]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ONE_BRANCH, ids=lambda each: each.pipeline)
def test_every_family(entry: zoo.Entry) -> None:
    """A weight of its own and steps that are forecast, against the same hooks."""
    pipe = entry.make()
    steps = len(outputs_of(pipe, entry)[1]) // calls_of(entry)
    forecast = 2 if entry.loop is None else 1
    expected, networks = by_hooks_of_entry(pipe, entry, 1, weight=0.8, forecast=forecast, steps=steps)
    rule = {"after_gate": entry.after_gate, "cache_weight": 0.8, "forecast": forecast}
    tgate_fx.gate(pipe, gate_step=1, **rule, **entry.settings)
    assert relative_error(entry.run(pipe), expected) < 1e-5
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    assert phases.count("forecast") == sum(network.forecast for network in networks)


def level_of(pipe: Any, plain: Callable[[], Any]) -> Callable[[int], float] | None:
    """What a difference of predictions times this is one of noise, by the scheduler's kind; None if it is not known.

    Args:
        pipe: the pipeline.
        plain: generates with it, by which its scheduler has its timesteps.
    """
    plain()
    scheduler = pipe.scheduler
    name, predicts = type(scheduler).__name__, getattr(scheduler.config, "prediction_type", None)
    if name.startswith("FlowMatch"):
        predicts = "flow_prediction"
    counts = not type(pipe).__name__.startswith("SkyReelsV2DiffusionForcing")  # which steps copies of it
    if predicts == "epsilon" and not name.startswith("EDM"):
        return lambda step: 1.0
    if name.startswith(("EDM", "CosineDPM")) or not counts:
        return None
    if predicts == "v_prediction" and not hasattr(scheduler, "sigmas"):
        return alpha(pipe)
    sigmas = scheduler.sigmas.tolist() if hasattr(scheduler, "sigmas") else [float("inf")]
    if predicts == "v_prediction":
        return lambda step: (1 + sigmas[step] ** 2) ** -0.5
    if predicts != "flow_prediction" or max(sigmas) > 1:
        return None
    begins_with_noise = sigmas[0] > sigmas[-1]  # otherwise the schedule is inverted, and noise is at 0
    return lambda step: 1 - sigmas[step] if begins_with_noise else sigmas[step]


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry",
    [each for each in ONE_BRANCH if each.form in ("batch", "reversed", "calls") and each.loop is None],
    ids=lambda each: each.pipeline,
)
def test_guidance_goes_on_in_every_family(entry: zoo.Entry) -> None:
    pipe = entry.make()
    level = level_of(pipe, lambda: entry.run(pipe))
    rule = {"after_gate": "guided", "cache_weight": 1.0}
    if level is None:
        tgate_fx.gate(pipe, 2, **rule, **entry.settings)
        with pytest.raises(tgate_fx.UnsupportedError, match=says("after_gate='guided'", "after_gate='positive'")):
            entry.run(pipe)
        return
    expected, _ = by_hooks_of_entry(pipe, entry, 2, weight=1.0, level=level)
    tgate_fx.gate(pipe, 2, **rule, **entry.settings)
    assert relative_error(entry.run(pipe), expected) < 1e-4
