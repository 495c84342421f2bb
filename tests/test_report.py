"""The report, and the cost of the dispatch that fills it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tgate_fx
from benchmarks import overhead
from tests import tiny
from tests.test_refusals import says
from tests.zoo import entry_of
from tgate_fx.gated import Gated


def test_before_the_first_generation() -> None:
    report = tgate_fx.report(tgate_fx.gate(tiny.sd()))
    assert report.steps == ()
    assert report.gate is None
    assert report.sites == 4
    assert report.compiled_graphs == report.recompiles == report.cache_bytes == 0


def test_step_by_step() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    report = tgate_fx.report(pipe)
    assert [(step.index, step.phase, step.batch) for step in report.steps] == [
        (0, "pre-gate", 4),
        (1, "pre-gate", 4),
        (2, "pre-gate", 4),
        (3, "post-gate", 2),
        (4, "post-gate", 2),
    ]
    assert all(0 < step.seconds < 5 for step in report.steps)
    assert report.gate == 3
    assert report.compiler == "eager"


@pytest.mark.parametrize("steps", [2, 3])
def test_a_gate_that_is_never_reached_is_a_warning(steps: int) -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    inputs = tiny.inputs("sd", 2)
    message = says("Nothing was gated", "gate_step=3", f"{steps} steps", "a share of the steps")
    with pytest.warns(UserWarning, match=message) as said:
        tiny.latents(pipe, **inputs, num_inference_steps=steps)
    assert said[0].filename == tiny.__file__  # where the pipeline was called
    assert len(tgate_fx.report(pipe).steps) == steps
    assert tgate_fx.report(pipe).gate is None

    def by_hand() -> None:
        with tgate_fx.generation(pipe, steps, guided=False):
            for timestep in range(steps):
                pipe.unet(torch.zeros(1, 4, 8, 8), timestep, torch.zeros(1, 7, tiny.TEXT_WIDTH))

    with pytest.warns(UserWarning, match=message) as said:
        by_hand()
    assert said[0].filename == __file__


def test_the_networks_of_two_denoisers_are_named() -> None:
    entry = entry_of("WanPipeline 2.2 14B")
    pipe = tgate_fx.gate(entry.make(), 2)
    entry.run(pipe)
    report = tgate_fx.report(pipe)
    names = [step.network for step in report.steps]
    assert set(names) == {"transformer", "transformer_2"}
    assert names == sorted(names)
    assert "transformer_2 post-gate" in str(report)
    phases = [f"{name} {phase}" for name in dict.fromkeys(names) for phase in ("pre-gate", "post-gate")]
    assert list(tgate_fx.graphs(pipe)) == phases


def test_what_is_not_gated_on_purpose_is_no_warning() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    inputs = {**tiny.inputs("sd", 2), "num_inference_steps": 2}
    tiny.latents(pipe, **inputs, gate_step=None)
    tiny.latents(pipe, **inputs, gate_step=tgate_fx.AutoGate(1.0, latest=9))
    with tgate_fx.disabled(pipe):
        tiny.latents(pipe, **inputs)


def test_cache_bytes_are_those_of_one_branch_of_the_sites_outputs() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    pre, _ = tgate_fx.split(pipe.unet)
    with torch.no_grad():
        _, cache = pre(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 7, tiny.TEXT_WIDTH))
    assert tgate_fx.report(pipe).cache_bytes == sum(tensor.nbytes for tensor in cache)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    assert tgate_fx.report(pipe).cache_bytes == sum(tensor.nbytes for tensor in cache)


def test_as_a_table() -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=1, backend="eager")
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=2)
    lines = str(tgate_fx.report(pipe)).splitlines()
    assert lines[0] == "gate at step 1"
    assert lines[1].startswith("1 site, ")
    assert "torch.compile (eager), 2 graphs compiled, 0 recompiles" in lines[1]
    assert lines[2].split() == ["step", "phase", "batch", "seconds"]
    assert [line.split()[:3] for line in lines[3:]] == [["0", "pre-gate", "2"], ["1", "post-gate", "1"]]
    assert all(line.endswith("compiled 1") for line in lines[3:])


CROSS, SELF, DEEP = (f"{kind} cached" for kind in ("cross-attention", "self-attention", "deep branch"))


@pytest.mark.parametrize(
    ("settings", "rungs"),
    [
        ({}, ["guidance dropped", CROSS]),
        ({"after_gate": "both"}, [CROSS]),
        ({"forecast": 2}, ["guidance dropped", CROSS, "steps forecast"]),
        ({"gate_step": 2, "full_steps": (4,)}, ["guidance dropped", CROSS]),
        ({"gate_step": None, "guidance": (1, 4)}, ["guidance dropped"]),
        ({"sp_interval": 2, "fi_interval": 2}, ["guidance dropped", CROSS, SELF]),
        ({"deepcache": tgate_fx.DeepCache(interval=2, branch=0)}, ["guidance dropped", CROSS, DEEP]),
        ({"gate_step": None, "deepcache": tgate_fx.DeepCache(interval=2, branch=0)}, [DEEP]),
        ({"gate_step": None}, []),
    ],
)
def test_the_ladder_times_what_the_generation_did(
    settings: dict[str, Any], rungs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that counts operations: those of its ends are an ungated generation's and this one's."""
    pipe = tgate_fx.gate(tiny.sd(), **{"gate_step": 3, **settings})
    inputs = {**tiny.inputs("sd"), "num_inference_steps": 6}
    with FlopCounterMode(display=False) as counter:
        clock = SimpleNamespace(perf_counter=lambda: float(counter.get_total_flops()))
        monkeypatch.setattr(sys.modules["tgate_fx.report"], "time", clock)
        with tgate_fx.disabled(pipe):
            tiny.latents(pipe, **inputs)
            ungated = sum(step.seconds for step in tgate_fx.report(pipe).steps)
        tiny.latents(pipe, **inputs)
        assert tgate_fx.report(pipe).ladder == ()
        report = tgate_fx.report(pipe, ladder=True)
    seconds = [rung.seconds for rung in report.ladder]
    assert [rung.name for rung in report.ladder] == ["ungated, eager", *rungs]
    assert seconds[0] == ungated > 0
    assert seconds[-1] == sum(step.seconds for step in report.steps)
    assert seconds == sorted(set(seconds), reverse=True)
    assert [rung.speedup for rung in report.ladder] == pytest.approx(
        [before / after for before, after in zip([seconds[0], *seconds], seconds, strict=False)]
    )
    if "guidance dropped" in rungs:  # for three steps of six, which is half of the batch there
        assert seconds[1] == 0.75 * ungated
    result = tiny.latents(pipe, **inputs)
    assert torch.equal(result, tiny.latents(tgate_fx.gate(tiny.sd(), **{"gate_step": 3, **settings}), **inputs))


def test_columns_are_aligned_under_long_phase_names() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=3, sp_interval=2)
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=5)
    report = tgate_fx.report(pipe)
    phases = {step.phase for step in report.steps}
    assert phases == {"pre-gate", "pre-gate, self-attention reused", "post-gate"}
    lines = str(report).splitlines()[2:]
    assert len({len(line) for line in lines}) == 1
    assert all(line[7:].startswith(step.phase) for line, step in zip(lines[1:], report.steps, strict=True))
    assert {line.rindex(" ") - line.rindex(".") for line in lines[1:]} == {lines[1].rindex(" ") - lines[1].rindex(".")}


def test_the_ladder_ends_with_what_the_compiled_generation_took() -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend="eager")
    inputs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    with pytest.raises(tgate_fx.TGateError, match=r"No step has run .* Generate an image first"):
        tgate_fx.report(pipe, ladder=True)
    tiny.latents(pipe, **inputs)
    with pytest.raises(tgate_fx.TGateError, match=r"At step 0 .* a graph was compiled.* Generate once more"):
        tgate_fx.report(pipe, ladder=True)
    tiny.latents(pipe, **inputs)
    report = tgate_fx.report(pipe, ladder=True)
    assert [rung.name for rung in report.ladder] == ["ungated, eager", "guidance dropped", CROSS, "compiled"]
    assert report.ladder[-1].seconds == sum(step.seconds for step in report.steps)
    assert report.compiled_graphs == 2
    lines = str(report).splitlines()[-5:]
    assert lines[0].split() == ["where", "the", "speed-up", "comes", "from", "seconds", "speed-up", "in", "all"]
    assert lines[1].split()[-2:] == ["1.00x", "1.00x"]
    assert [line[:29].strip() for line in lines[1:]] == [rung.name for rung in report.ladder]
    tiny.latents(pipe, **inputs)
    assert tgate_fx.report(pipe).recompiles == 0


def _fails(*args: Any) -> None:
    raise RuntimeError("on purpose")


def test_the_ladder_refuses_what_it_cannot_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    inputs = {**tiny.inputs("sd"), "num_inference_steps": 4, "guidance_scale": 7.5}

    def without_guidance(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 0:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    cut_off = {"callback_on_step_end": without_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    tiny.latents(pipe, **inputs, **cut_off, gate_step=None)
    with pytest.raises(tgate_fx.TGateError, match=r"At step 1 .* the batch changed: expected .* without what changes"):
        tgate_fx.report(pipe, ladder=True)
    tiny.latents(pipe, **inputs)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet.conv_in, "forward", _fails)
        with pytest.raises(RuntimeError, match="on purpose"):
            tiny.latents(pipe, **inputs)
    with pytest.raises(tgate_fx.TGateError, match="No step has run"):
        tgate_fx.report(pipe, ladder=True)
    tiny.latents(pipe, **inputs)
    (run,) = Gated.of(pipe).runs  # type: ignore[union-attr]
    run.device = torch.device("meta")  # as if it had been moved since
    with pytest.raises(tgate_fx.TGateError, match=r"is on cpu, and .* ran on meta: expected .* Move the pipeline back"):
        tgate_fx.report(pipe, ladder=True)


@pytest.mark.slow
def test_a_step_costs_microseconds() -> None:
    """50 µs between the pipeline's call and the compiled function's on an idle machine; here, five times as much."""
    pipe, generate = overhead.tiny_pipeline()
    tgate_fx.compile(pipe, gate_step=10, backend=overhead.nothing)
    medians = [overhead.dispatch_microseconds(pipe, generate, 20) for _ in range(3)]
    assert set(medians[0]) == {"pre-gate", "post-gate"}
    assert all(0 < each < 250 for each in min(medians, key=lambda phases: max(phases.values())).values())


def test_importing_is_cheap() -> None:
    """No model, pipeline or compiler is imported until it is needed."""
    check = (
        "import sys, tgate_fx; "
        "print([name for name in ('diffusers', 'transformers', 'torch._dynamo', 'torch._inductor') if name in "
        "sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
