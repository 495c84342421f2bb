"""Single steps after the gate that are computed in full: what is cached and what is held are renewed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tgate_fx
from tests import oracle, tiny, zoo
from tests.conftest import CountingBackend
from tests.test_companions import SometimesControlled, network_of
from tests.test_companions import make as make_controlled
from tests.test_compile import relative_error
from tests.test_families import by_hooks as by_hooks_of_entry
from tests.test_families import calls_of, outputs_of
from tests.test_refusals import says
from tests.test_rules import GATE, ONE_BRANCH, STEPS, alpha, by_hooks, generate, level_of, with_velocity
from tests.test_schedule import table
from tests.zoo import entry_of
from tgate_fx.schedule import Schedule

GUIDED: dict[str, Any] = {"after_gate": "guided", "cache_weight": 1.0}


@pytest.mark.parametrize("full", [(4,), (3, 6), (4, 5, 8)])
@pytest.mark.parametrize(
    ("rule", "by_rule"),
    [
        ({"after_gate": "positive"}, {}),
        ({"cache_weight": 1.0}, {"weight": 1.0}),
        ({"after_gate": "negative", "forecast": 2}, {"keep": "negative", "forecast": 2}),
        ({"cache_weight": 1.0, "forecast": 3}, {"weight": 1.0, "forecast": 3}),
        (GUIDED, {"weight": 1.0, "level": lambda step: 1.0}),
        ({**GUIDED, "forecast": 3}, {"weight": 1.0, "level": lambda step: 1.0, "forecast": 3}),
    ],
)
def test_full_steps(rule: dict[str, Any], by_rule: dict[str, Any], full: tuple[int, ...]) -> None:
    pipe = tiny.sd()
    expected = by_hooks(pipe, full=full, **by_rule)
    got = generate(tgate_fx.gate(pipe, GATE, full_steps=full, **rule))
    assert relative_error(got, expected) < 1e-5
    batches = [row.batch for row in tgate_fx.report(pipe).steps]
    assert [index for index, rows in enumerate(batches) if rows == 2] == [*range(GATE), *full]
    assert relative_error(generate(pipe, full_steps=()), got) > 1e-4


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep"])
def test_the_difference_is_that_of_the_last_full_step(name: str) -> None:
    pipe = with_velocity(name)
    expected = by_hooks(pipe, weight=1.0, level=alpha(pipe), full=(5, 6))
    got = generate(tgate_fx.gate(pipe, GATE, full_steps=(5, 6), **GUIDED))
    assert relative_error(got, expected) < 1e-3


@pytest.mark.parametrize(
    "rule",
    [{}, {"after_gate": "both"}, {"cache_weight": 0.7}, {"fi_interval": 2}, {"guidance": (0, 20)}, GUIDED],
    ids=str,
)
def test_one_after_another_from_the_gate_on_they_are_a_later_gate(rule: dict[str, Any]) -> None:
    pipe = tgate_fx.gate(tiny.sd(), GATE + 2, **rule)
    expected = generate(pipe)
    assert torch.equal(generate(pipe, gate_step=GATE, full_steps=[GATE, GATE + 1]), expected)
    assert torch.equal(generate(pipe, full_steps=(0, GATE)), expected)  # before the gate every step is full
    assert not torch.equal(generate(pipe, gate_step=GATE), expected)


def test_shares_of_the_steps() -> None:
    pipe = tgate_fx.gate(tiny.sd(), 0.33, full_steps=(0.8, 0.45), **GUIDED)
    assert torch.equal(generate(pipe), generate(pipe, gate_step=3, full_steps=(4, 7)))
    schedule = Schedule(2, full_steps=(0.5,))
    with pytest.raises(tgate_fx.ArgumentError, match=says("full_steps=(0.5,)", "does not say how many steps")):
        schedule.resolve(None)


def test_the_whole_batch_goes_on() -> None:
    pipe = tiny.sd()
    sites = [site.name for site in tgate_fx.sites(pipe)]
    expected = oracle.gated([oracle.Network(pipe.unet, sites)], lambda: generate(pipe), GATE, "whole", full=(5,))
    assert torch.equal(generate(tgate_fx.gate(pipe, GATE, after_gate="both", full_steps=(5,))), expected)


def test_the_report_says_which_step_is_gated_first() -> None:
    pipe = tgate_fx.gate(tiny.sd(), GATE, full_steps=(GATE,), forecast=3)
    generate(pipe)
    phases = [row.phase for row in tgate_fx.report(pipe).steps[GATE - 1 :]]
    assert phases == ["pre-gate", "pre-gate", "forecast", "forecast", "post-gate", "forecast", "post-gate"]
    assert tgate_fx.report(pipe).gate == GATE + 1


def test_a_full_step_outside_the_window_renews_what_is_cached_for_a_callback_too() -> None:
    """There both branches are one already, so that it changes nothing when a callback ends guidance after it."""
    pipe = tgate_fx.gate(tiny.sd(), 3, guidance=(0, 6), full_steps=(5, 7))

    def end(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 7:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}
        return {}

    ended = generate(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert relative_error(ended, generate(pipe)) < 1e-7


def test_separate_calls() -> None:
    entry = entry_of("WanPipeline")
    pipe = entry.make()

    def run() -> torch.Tensor:
        result: torch.Tensor = pipe(**{**entry.inputs(), "num_inference_steps": STEPS}).frames
        return result

    def level(step: int) -> float:
        return 1 - float(pipe.scheduler.sigmas[step])

    networks = [oracle.Network(pipe.transformer, [site.name for site in tgate_fx.sites(pipe)])]
    rule = {"weight": 1.0, "level": level, "forecast": 3, "steps": STEPS, "full": (4, 6)}
    expected = oracle.gated(networks, run, 2, "calls", 2, **rule)
    tgate_fx.gate(pipe, 2, forecast=3, full_steps=(4, 6), **GUIDED)
    got = run()
    assert relative_error(got, expected) < 1e-5
    assert [row.calls for row in tgate_fx.report(pipe).steps] == [2, 2, 1, 0, 2, 0, 2, 0, 1]


def test_without_guidance() -> None:
    pipe = tiny.sd()
    sites = [site.name for site in tgate_fx.sites(pipe)]

    def run() -> torch.Tensor:
        return generate(pipe, guidance_scale=1.0)

    networks = [oracle.Network(pipe.unet, sites)]
    expected = oracle.gated(networks, run, GATE, "none", full=(5,), forecast=3, steps=STEPS)
    tgate_fx.gate(pipe, GATE, full_steps=(5,), forecast=3)
    assert relative_error(run(), expected) < 1e-6


@pytest.mark.parametrize(
    ("settings", "cross", "own", "deep"),
    [
        ({"fi_interval": 3}, "CKRRKRR", "CKRCKRK", "LLLLLLL"),
        ({"sp_interval": 2}, "CKRRKRR", "CCLLCLL", "LLLLLLL"),
        ({"deep_interval": 3}, "CKRRKRRRR", "LLLLLLLLL", "CCKRCKRRK"),
    ],
)
def test_they_serve_what_else_is_cached(settings: dict[str, Any], cross: str, own: str, deep: str) -> None:
    schedule = Schedule(2, full_steps=(0, 4), **settings)
    kinds = {"cross_attention": cross, "self_attention": own, "deep_branch": deep}
    assert {kind: table(schedule, kind, len(cross)) for kind in kinds} == kinds


@pytest.mark.parametrize("settings", [{"fi_interval": 2}, {"deepcache": tgate_fx.DeepCache(interval=2, branch=0)}])
def test_no_step_before_a_full_one_shows_after_it(settings: dict[str, Any]) -> None:
    """Of two generations alike but for the steps between the gate and the full step, from the same latents there."""
    latents: list[torch.Tensor] = []

    def swap(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": latents[0]} if index == 4 and latents else tensors

    pipe = tgate_fx.gate(tiny.sd(), 2, full_steps=(5,), **settings)
    pipe.scheduler = tiny.scheduler("DDIM").from_config(pipe.scheduler.config)
    latents.append(generate(pipe, num_inference_steps=STEPS) * 0.5)
    results = [generate(pipe, gate_step=gate, callback_on_step_end=swap) for gate in (2, 4)]
    assert torch.equal(*results)
    assert not torch.equal(generate(pipe, full_steps=(), callback_on_step_end=swap), results[0])


@pytest.mark.parametrize("guided_until", [4, 5, 6])
@pytest.mark.parametrize(("full", "gate"), [((4,), 5), ((4, 6), 7)])
def test_guidance_that_a_callback_ends(guided_until: int, full: tuple[int, ...], gate: int) -> None:
    """After the last full step all is as after a gate there, from the same latents at that step."""
    latents: list[torch.Tensor] = []

    def end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        changed = dict(tensors)
        if index + 1 == gate - 1 and latents:
            changed["latents"] = latents[0]
        if index + 1 == guided_until:
            pipe._guidance_scale = 0.0
            changed["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return changed

    changes = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    pipe = tgate_fx.gate(tiny.sd(), 2, after_gate="positive")
    pipe.scheduler = tiny.scheduler("DDIM").from_config(pipe.scheduler.config)
    latents.append(generate(pipe) * 0.5)
    expected = generate(pipe, gate_step=gate, **changes)
    assert torch.equal(generate(pipe, full_steps=full, **changes), expected)
    assert not torch.equal(generate(pipe, **changes), expected)


def test_a_gate_that_opens_by_itself() -> None:
    pipe = tgate_fx.gate(tiny.sd(), GATE, full_steps=(1, 5), **GUIDED)
    expected = generate(pipe)
    assert torch.equal(generate(pipe, gate_step=tgate_fx.AutoGate(-1, earliest=GATE)), expected)


@pytest.mark.parametrize(
    ("steps", "whole"),
    [
        ((0, 1, 2, 3, 4, 5), {0, 1, 3}),
        ((0, 1, 2, 4, 5), {0, 1, 4}),  # not at the full step, of which it computes the next one whole
        ((0, 4, 5), {0, 4}),
    ],
)
def test_companions_are_full_too(steps: tuple[int, ...], whole: set[int]) -> None:
    pipe = SometimesControlled(**make_controlled().components, requires_safety_checker=False)
    nets = network_of(pipe.controlnet, lambda: pipe(steps))
    unet = network_of(pipe.unet, lambda: pipe(steps))
    expected = oracle.gated([unet], lambda: pipe(steps), 2, "batch", keep="negative", companions=[nets], full=(3,))
    tgate_fx.gate(pipe, 2, full_steps=(3,))
    rows: dict[int, int] = {}

    def count(module: Any, args: Any) -> None:
        rows[len(tgate_fx.report(pipe).steps)] = args[0].shape[0]

    with oracle.hooked(pipe.controlnet.conv_in.register_forward_pre_hook(count)):
        assert relative_error(pipe(steps), expected) < 1e-5
    assert {index for index, number in rows.items() if number == 2} == whole


def test_they_take_no_graph(backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    tgate_fx.compile(pipe, GATE, backend=backend, full_steps=(5,))
    tgate_fx.gate(eager, GATE, full_steps=(5,))
    for rule in ({}, {"full_steps": (4, 7)}, {**GUIDED, "forecast": 3}, {**GUIDED, "gate_step": 1}):
        assert relative_error(generate(pipe, **rule), generate(eager, **rule)) < 1e-5
    assert len(backend.graphs) == 2
    assert tgate_fx.report(pipe).recompiles == 0


@pytest.mark.parametrize("value", [5, "5", (1.5,), (-1,), (1.0, 0.5), (True,), (None,), None, {3: 4}])
def test_what_is_refused(value: Any) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    expected = generate(pipe)
    with pytest.raises(
        tgate_fx.ArgumentError, match=says(f"full_steps={value!r}", "expected indices of steps", "shares")
    ):
        generate(pipe, full_steps=value)
    assert torch.equal(generate(pipe), expected)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ONE_BRANCH, ids=lambda each: each.pipeline)
def test_every_family(entry: zoo.Entry) -> None:
    """Against the same hooks, with guidance that goes on where that is known of the scheduler."""
    pipe = entry.make()
    steps = len(outputs_of(pipe, entry)[1]) // calls_of(entry)
    guides = entry.form in ("batch", "reversed", "calls") and entry.loop is None
    level: Callable[[int], float] | None = level_of(pipe, lambda: entry.run(pipe)) if guides else None
    if level is not None and level(0) < 1e-3:  # of a first step of nothing but noise there is no difference to hold
        level = None
    forecast = 2 if entry.loop is None else 1
    rule = {"after_gate": "guided" if level is not None else entry.after_gate, "cache_weight": 1.0}
    expected, _ = by_hooks_of_entry(pipe, entry, 1, weight=1.0, forecast=forecast, steps=steps, level=level, full=(2,))
    tgate_fx.gate(pipe, gate_step=1, full_steps=(2,), forecast=forecast, **rule, **entry.settings)
    assert relative_error(entry.run(pipe), expected) < 1e-4
