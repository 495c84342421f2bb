"""Every family against an oracle that this package did not write: gated eagerly, and compiled."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch

import tgate_fx
from tests import oracle, tiny, zoo
from tests.conftest import CountingBackend
from tests.test_compile import relative_error

ENTRIES = zoo.entries()
GATE = 2

# One of each way in which guidance reaches a denoiser, and two denoisers.
FIRST = (
    "LTXPipeline",
    "LuminaPipeline",
    "SanaSprintPipeline",
    "StableDiffusionPAGPipeline",
    "WanPipeline",
    "WanPipeline 2.2 14B",
)
COMPILED_FIRST = FIRST[:-1]  # two denoisers take twice as long


def parameters(entries: Iterable[zoo.Entry], first: Container[str]) -> list[Any]:
    """These entries, of which the default run has the first ones only."""
    return [
        pytest.param(entry, id=entry.pipeline, marks=() if entry.pipeline in first else pytest.mark.slow)
        for entry in entries
    ]


def compiled_entries() -> list[zoo.Entry]:
    """Of each family those that differ in form: compiling takes long."""
    seen = set()
    chosen = []
    for entry in ENTRIES:
        added = entry.make.__module__.endswith("adapters") or "GLIGEN" in entry.pipeline
        key = (entry.pipeline if added else entry.make.__module__, entry.form)
        if key not in seen or entry.pipeline in FIRST:
            chosen.append(entry)
        seen.add(key)
    return chosen


def denoisers_of(pipe: Any, entry: zoo.Entry) -> list[Any]:
    return [getattr(pipe, name) for name in entry.denoisers if getattr(pipe, name) is not None]


def companions_of(pipe: Any, entry: zoo.Entry) -> list[oracle.Network]:
    found = []
    for name in entry.companions:
        module = operator.attrgetter(name)(pipe)
        images = ("sample", "hidden_states", "controlnet_cond")
        sites = oracle.find_sites(module, lambda: entry.run(pipe), images, entry.text)
        assert sites
        found.append(oracle.Network(module, sites))
    return found


def calls_of(entry: zoo.Entry) -> int:
    """How many calls of a denoiser a step has."""
    return 2 if entry.form == "calls" else 1


def by_hooks(pipe: Any, entry: zoo.Entry, gate: int, **rule: Any) -> tuple[torch.Tensor, list[oracle.Network]]:
    """What the pipeline generates with the gate as the oracle has it, and the denoisers; ``rule`` is the oracle's."""
    networks = [
        oracle.Network(each, oracle.find_sites(each, lambda: entry.run(pipe), entry.latents, entry.text))
        for each in denoisers_of(pipe, entry)
    ]
    expected = oracle.gated(
        networks,
        lambda: entry.run(pipe),
        gate,
        entry.form,
        calls_of(entry),
        loop=entry.loop,
        companions=companions_of(pipe, entry),
        companions_form=entry.companions_form,
        **rule,
    )
    return expected, networks


CUT_SHORT = [
    ("StableDiffusionXLControlNetPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLControlNetInpaintPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLControlNetUnionPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLControlNetUnionInpaintPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLAdapterPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLControlNetPAGPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionXLInstructPix2PixPipeline", {"denoising_end": 0.5}),
    ("StableDiffusionInpaintPipelineLegacy", {"strength": 0.5}),
    ("VideoToVideoSDPipeline", {"strength": 0.5}),
]


@pytest.mark.parametrize(("name", "cut"), CUT_SHORT, ids=[name for name, _ in CUT_SHORT])
def test_a_share_is_of_the_steps_that_are_run(name: str, cut: dict[str, float]) -> None:
    """Also in pipelines that do not record them, or record those before they are cut; and the last one is computed."""
    entry = zoo.entry_of(name)
    pipe = entry.make()
    for scheduler in ("DDIM", "EulerDiscrete"):
        pipe.scheduler = tiny.scheduler(scheduler)
        whole = {"after_gate": "both"} if entry.form == "whole" else {"forecast": 5}
        tgate_fx.gate(pipe, 0.5, **whole)
        entry.run(pipe, num_inference_steps=16, **cut)
        report = tgate_fx.report(pipe)
        assert len(report.steps) in (7, 8)  # by the spacing of the timesteps
        assert report.gate == 4
        assert report.steps[-1].phase == "post-gate"
        tgate_fx.restore(pipe)


@pytest.mark.parametrize(
    ("name", "given", "steps"),
    [
        ("AmusedImg2ImgPipeline", {"strength": 0.5, "num_inference_steps": 16}, 8),
        ("AmusedInpaintPipeline", {"strength": 0.5, "num_inference_steps": 16}, 8),
        ("AceStepPipeline", {"timesteps": [1.0, 0.8, 0.6, 0.4, 0.2], "num_inference_steps": 3}, 5),
        ("AceStepPipeline", {"num_inference_steps": 6}, 6),
    ],
)
def test_a_share_is_of_the_steps_that_the_call_asks_for(name: str, given: dict[str, Any], steps: int) -> None:
    entry = zoo.entry_of(name)
    pipe = tgate_fx.gate(entry.make(), 0.5, **entry.settings)
    entry.run(pipe, **given)
    report = tgate_fx.report(pipe)
    assert (len(report.steps), report.gate) == (steps, round(steps / 2))


@pytest.mark.parametrize("name", ["StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"])
def test_an_image_that_is_embedded_like_a_class_counts_after_the_gate(name: str) -> None:
    """The other branch has zeros in its place."""
    entry = zoo.entry_of(name)
    pipe = tgate_fx.gate(entry.make(), GATE, **entry.settings)
    empty: list[list[bool]] = []
    hook = pipe.unet.class_embedding.register_forward_pre_hook(
        lambda module, args: empty.append([not bool(row.any()) for row in args[0]])
    )
    got = entry.run(pipe)
    assert empty == [[True, False]] * GATE + [[False]] * (zoo.STEPS - GATE)
    hook.remove()
    assert torch.equal(entry.run(pipe, after_gate="positive"), got)


def turns_guidance_off(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 1.0
    return {}


# Written out: what the package's own list forgot would be missing here too.
DECIDE_ONCE = (
    "AceStepPipeline",
    "AllegroPipeline",
    "LattePipeline",
    "LuminaPipeline",
    "SanaWMPipeline",
    "StableDiffusionControlNetXSPipeline",
    "StableDiffusionXLControlNetXSPipeline",
)


@pytest.mark.parametrize("name", DECIDE_ONCE)
def test_guidance_that_a_pipeline_decides_on_once_stays_as_it_is(name: str) -> None:
    """Whatever a callback does to the scale, of which the property tells."""
    entry = zoo.entry_of(name)
    pipe = entry.make()
    tgate_fx.gate(pipe, GATE, **entry.settings)
    entry.run(pipe)
    batches = [step.batch for step in tgate_fx.report(pipe).steps]
    for _ in range(2):
        entry.run(pipe, callback_on_step_end=turns_guidance_off)
        assert [step.batch for step in tgate_fx.report(pipe).steps] == batches


def test_a_pipeline_that_guides_at_every_scale_is_gated_so() -> None:
    entry = zoo.entry_of("DreamLitePipeline")
    pipe = tgate_fx.gate(entry.make(), GATE, **entry.settings)
    for scale in (1.0, 3.5):
        entry.run(pipe, guidance_scale=scale)
        assert [step.batch for step in tgate_fx.report(pipe).steps] == [2, 2, 1, 1]


def test_calls_of_two_steps_are_no_pair() -> None:
    """Kandinsky 5 begins without guidance, and does not begin with it when the scale is changed."""

    def turns_guidance_on(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 4.0
        return {}

    entry = zoo.entry_of("Kandinsky5T2VPipeline")
    pipe = tgate_fx.gate(entry.make(), GATE, **entry.settings)
    names = ("negative_prompt_embeds_qwen", "negative_prompt_embeds_clip", "negative_prompt_cu_seqlens")
    unguided = {"guidance_scale": 1.0, **dict.fromkeys(names)}
    expected = entry.run(pipe, **unguided)
    with pytest.raises(tgate_fx.UnsupportedError, match="called twice in a step, but with other latents"):
        entry.run(pipe, **unguided, callback_on_step_end=turns_guidance_on)
    assert torch.equal(entry.run(pipe, **unguided), expected)


def outputs_of(pipe: Any, entry: zoo.Entry) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a generation gives, and the denoisers' outputs, call by call."""
    seen: list[torch.Tensor] = []

    def record(module: Any, args: Any, output: Any) -> None:
        seen.append(torch.cat([tensor.flatten() for tensor in oracle.tensors_in(output)]).clone())

    with oracle.hooked(*[module.register_forward_hook(record) for module in denoisers_of(pipe, entry)]):
        return entry.run(pipe), seen


@pytest.mark.parametrize("entry", parameters(ENTRIES, FIRST))
def test_gated_eagerly(entry: zoo.Entry) -> None:
    pipe = entry.make()
    calls = calls_of(entry)
    plain, plain_outputs = outputs_of(pipe, entry)
    expected, networks = by_hooks(pipe, entry, GATE)
    assert all(network.sites for network in networks)

    if entry.form == "whole":
        check_one_branch_is_refused(pipe, entry)
    steps = entry.loop or len(plain_outputs) // calls
    tgate_fx.gate(pipe, gate_step=GATE / steps, after_gate=entry.after_gate, **entry.settings)
    assert [site.name for site in tgate_fx.sites(pipe)] == [name for network in networks for name in network.sites]
    got, outputs = outputs_of(pipe, entry)
    assert torch.isfinite(got).all()
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, plain) > 1e-4
    assert len(outputs) == len(plain_outputs)
    assert all(map(torch.equal, outputs[: GATE * calls], plain_outputs[: GATE * calls]))
    assert tgate_fx.report(pipe).gate == GATE
    if entry.only_cross:
        assert torch.equal(with_other_text_after_the_gate(pipe, entry, calls), got)
    tgate_fx.restore(pipe)
    assert torch.equal(entry.run(pipe), plain)


def check_one_branch_is_refused(pipe: Any, entry: zoo.Entry) -> None:
    cls = type(pipe)
    with pytest.raises(tgate_fx.UnsupportedError, match=rf"{cls.__name__} uses .* keeps one.*after_gate='both'"):
        tgate_fx.gate(pipe, gate_step=GATE, **entry.settings)
    assert type(pipe) is cls
    assert not any("forward" in vars(module) for each in denoisers_of(pipe, entry) for module in each.modules())


def with_other_text_after_the_gate(pipe: Any, entry: zoo.Entry, calls: int) -> torch.Tensor:
    """Generate with noise in place of the text from each denoiser's first gated step on."""
    position = {"calls": -1}
    begun: dict[int, int] = {}

    def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        position["calls"] += 1
        if entry.loop is not None:
            position["calls"] %= entry.loop * calls
        step = position["calls"] // calls
        if step < max(GATE, begun.setdefault(id(module), step) + 1):
            return None
        names = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        assert any(name in given for name in entry.text)
        changed = {name: oracle.changed(value) if name in entry.text else value for name, value in given.items()}
        return tuple(changed.pop(name) for name in names[: len(args)]), changed

    handles = [each.register_forward_pre_hook(replace, with_kwargs=True) for each in denoisers_of(pipe, entry)]
    with oracle.hooked(*handles):
        return entry.run(pipe)


@pytest.mark.parametrize("entry", parameters(compiled_entries(), COMPILED_FIRST))
def test_compiled(entry: zoo.Entry, backend: CountingBackend) -> None:
    settings = {"gate_step": GATE, "after_gate": entry.after_gate, **entry.settings}
    eager = tgate_fx.gate(entry.make(), **settings)
    expected = entry.run(eager)
    pipe = tgate_fx.compile(entry.make(), **settings, backend=backend)
    for _ in range(2):
        assert relative_error(entry.run(pipe), expected) < 1e-5
    assert len(backend.graphs) == entry.graphs
    assert tgate_fx.report(pipe).recompiles == 0
    for rule in rules_for(entry):
        try:
            expected = entry.run(eager, **rule)
        except tgate_fx.UnsupportedError as error:
            with pytest.raises(tgate_fx.UnsupportedError, match=re.escape(str(error))):
                entry.run(pipe, **rule)
            assert "guided" in rule.values()
        else:
            assert relative_error(entry.run(pipe, **rule), expected) < 1e-5
    assert len(backend.graphs) == entry.graphs + entry.graphs_of_full
    assert tgate_fx.report(pipe).recompiles == 0


def rules_for(entry: zoo.Entry) -> list[dict[str, Any]]:
    """What may be kept and computed after the gate without a graph more."""
    full = {"full_steps": (GATE + 1,)}
    if entry.form == "whole":
        return [full]
    return [
        {"cache_weight": 0.8, "forecast": 2},
        {"cache_weight": 1.0, **full},
        {"cache_weight": 1.0, "after_gate": "guided"},
    ]
