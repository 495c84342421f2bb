"""A gate that opens once both guidance branches predict nearly the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

import tgate_fx
from tests import oracle, tiny, zoo
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says
from tests.zoo import controlnet, entry_of
from tgate_fx import auto_gate

STEPS = 8


def generate(pipe: Any, prompts: int = 1, **changes: Any) -> torch.Tensor:
    return tiny.latents(pipe, **{**tiny.inputs("sd", prompts), "num_inference_steps": STEPS, **changes})


def similarities(pipe: Any, prompts: int = 1) -> list[float]:
    """Of the branches' outputs at each step of an ungated generation, the least of all images."""
    found = []

    def compare(module: Any, args: Any, output: Any) -> None:
        unconditional, conditional = (half.double() for half in oracle.tensors_in(output)[0].chunk(2))
        pairs = zip(unconditional, conditional, strict=True)
        found.append(min(float((one * other).sum() / one.norm() / other.norm()) for one, other in pairs))

    with oracle.hooked(pipe.unet.register_forward_hook(compare)):
        generate(pipe, prompts)
    return found


def between(values: list[float], index: int) -> float:
    """A threshold that the first values do not reach, and the one at this index does."""
    below, at = max(values[:index]), values[index]
    assert below < at
    return (below + at) / 2


def rising(values: list[float], least: int = 1) -> int:
    """The first index from there on whose value is larger than all before it."""
    return next(index for index in range(least, len(values)) if values[index] > max(values[:index]))


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("rule", [{}, {"after_gate": "guided", "cache_weight": 1.0}, {"forecast": 2}])
def test_it_opens_after_the_first_step_that_is_alike(prompts: int, rule: dict[str, Any]) -> None:
    pipe = tiny.sd()
    alike = similarities(pipe, prompts)
    last = rising(alike)
    tgate_fx.gate(pipe, last + 1, **rule)
    expected = generate(pipe, prompts)
    similarity = between(alike, last)
    got = generate(pipe, prompts, gate_step=tgate_fx.AutoGate(similarity))
    assert torch.equal(got, expected)
    report = tgate_fx.report(pipe)
    assert report.gate == last + 1
    assert report.similarity == pytest.approx(alike[last], abs=1e-5)
    assert f"gate at step {last + 1}, opened by branches that were alike to {alike[last]:.4f}" in str(report)
    assert torch.equal(generate(pipe, prompts), expected)
    assert tgate_fx.report(pipe).similarity is None


def test_earliest_latest_and_never() -> None:
    pipe = tiny.sd()
    alike = similarities(pipe)
    plain = generate(pipe)
    tgate_fx.gate(pipe, "auto")
    opened = {}
    for name, rule in {
        "at once": tgate_fx.AutoGate(-1),
        "early": tgate_fx.AutoGate(-1, earliest=4),
        "late": tgate_fx.AutoGate(1.0, latest=5),
        "never": tgate_fx.AutoGate(1.0),
    }.items():
        results = generate(pipe, gate_step=rule)
        opened[name] = tgate_fx.report(pipe).gate
        assert torch.equal(results, generate(pipe, gate_step=opened[name]))
    assert opened == {"at once": 1, "early": 4, "late": 5, "never": None}
    assert torch.equal(results, plain)
    assert max(alike) < 1


def test_separate_calls() -> None:
    entry = entry_of("WanPipeline")
    pipe = entry.make()
    outputs: list[torch.Tensor] = []
    record = pipe.transformer.register_forward_hook(
        lambda _, args, output: outputs.append(output[0].double().flatten())
    )
    with oracle.hooked(record):
        entry.run(pipe)
    alike = [
        float(torch.nn.functional.cosine_similarity(*pair, dim=0))
        for pair in zip(outputs[::2], outputs[1::2], strict=True)
    ]
    last = rising(alike)
    assert last + 1 < zoo.STEPS
    expected = entry.run(tgate_fx.gate(pipe, last + 1))
    tgate_fx.restore(pipe)
    tgate_fx.gate(pipe, tgate_fx.AutoGate(between(alike, last)))
    assert torch.equal(entry.run(pipe), expected)
    assert tgate_fx.report(pipe).gate == last + 1


def test_two_graphs_serve_every_gate(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), "auto", backend=backend)
    eager = tgate_fx.gate(tiny.make("sd-small"), "auto")
    tgate_fx.warmup(pipe, height=16, width=16)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rule in ({}, {"gate_step": tgate_fx.AutoGate(-1, earliest=3)}, {"gate_step": 2}):
            assert relative_error(*[generate(each, **rule) for each in (pipe, eager)]) < 1e-5
    assert len(backend.graphs) == 2


@pytest.mark.parametrize("guess_mode", [False, True])
def test_companions_follow(guess_mode: bool) -> None:
    """Those that are given the conditional branch alone too, in which the denoiser is guided still."""
    call = controlnet.inputs(image=controlnet.image(), num_inference_steps=STEPS, guess_mode=guess_mode)
    pipe = controlnet.with_controlnet("StableDiffusionControlNetPipeline")
    results = []
    for gate_step in (4, tgate_fx.AutoGate(-1, earliest=4)):
        tgate_fx.gate(pipe, gate_step)
        results.append(pipe(**{**call, "generator": torch.Generator().manual_seed(3)}).images)
        tgate_fx.restore(pipe)
    assert torch.equal(*results)


def test_a_callback_that_ends_guidance_before_the_gate_opens() -> None:
    """What is cached is then that of the last step, and not of the last one with guidance."""
    pipe = tiny.sd()
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2)
    tgate_fx.gate(pipe, 6)
    expected = generate(pipe, callback_on_step_end=callback)
    got = generate(pipe, callback_on_step_end=callback, gate_step=tgate_fx.AutoGate(1.0, latest=6))
    assert torch.equal(got, expected)


def test_a_device_that_lags_behind_opens_it_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where a similarity is read when the step after has been queued."""
    waited: list[int] = []

    class Copied:
        def synchronize(self) -> None:
            waited.append(1)

    note = auto_gate.Watch.note

    def late(self: Any, *args: Any) -> None:
        note(self, *args)
        self._seen[-1] = (*self._seen[-1][:2], Copied())

    monkeypatch.setattr(auto_gate.Watch, "note", late)
    pipe = tiny.sd()
    alike = similarities(pipe)
    last = rising(alike)
    tgate_fx.gate(pipe, tgate_fx.AutoGate(between(alike, last)))
    got = generate(pipe)
    assert tgate_fx.report(pipe).gate == last + 2
    assert tgate_fx.report(pipe).similarity == pytest.approx(alike[last], abs=1e-5)
    assert len(waited) == last + 1
    assert torch.equal(got, generate(pipe, gate_step=last + 2))


def test_without_guidance_there_is_nothing_to_go_by() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), "auto")
    expected = generate(pipe)
    with pytest.raises(tgate_fx.ArgumentError, match=says("there is no guidance", "AutoGate(latest=...)")):
        generate(pipe, guidance_scale=1.0)
    assert torch.equal(generate(pipe), expected)
    generate(pipe, guidance_scale=1.0, gate_step=tgate_fx.AutoGate(latest=3))
    assert tgate_fx.report(pipe).gate == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tgate_fx.AutoGate(1.5), says("similarity=1.5", "expected a number from -1 to 1")),
        (lambda: tgate_fx.AutoGate("high"), says("similarity='high'", "expected a number")),
        (lambda: tgate_fx.AutoGate(earliest=0), says("earliest=0", "expected an int ≥ 1")),
        (lambda: tgate_fx.AutoGate(earliest=5, latest=3), says("latest=3", "expected an int ≥ 5")),
        (lambda: tgate_fx.gate(tiny.sd(), "auto", sp_interval=2), says("AutoGate", "sp_interval=2", "Leave one out")),
        (lambda: tgate_fx.gate(tiny.sd(), "auto", guidance=(0, 3)), says("AutoGate", "guidance=(0, 3)")),
        (lambda: tgate_fx.gate(tiny.sd(), "auto", after_gate="both"), says("AutoGate", "after_gate='both'")),
        (lambda: tgate_fx.gate(tiny.sd(), "soon"), says("gate_step='soon'", "'auto'")),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=message):
        make()
