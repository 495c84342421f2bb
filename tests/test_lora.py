"""LoRA: every way of loading and changing it, against a fresh pipeline, and the graphs that a change takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tgate_fx
from tests import oracle, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tgate_fx.compiled.lora_scales import LoraScales

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

GATE = 2
KWARGS = {**tiny.inputs("sd-small"), "num_inference_steps": 4}


@functools.cache
def lora(seed: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """The weights of a LoRA for the small UNet, as `load_lora_weights` takes them."""
    unet = tiny.make("sd-small").unet
    torch.manual_seed(seed)
    targets = ["attn1.to_q", "attn2.to_q", "attn2.to_v", "conv_in"]  # every kind of layer, and few: each is traced
    unet.add_adapter(peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False), "a")
    weights = peft.get_peft_model_state_dict(unet, adapter_name="a")
    return {f"unet.{name}": weight.clone() for name, weight in weights.items()}


def load(pipe: Any, name: str, seed: int = 1, **settings: Any) -> None:
    pipe.load_lora_weights(dict(lora(seed)), adapter_name=name, **settings)


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    return tiny.latents(pipe, **KWARGS, **changes)


def scales(pipe: Any) -> list[Any]:
    """Each layer's own scale of its first adapter."""
    layers = [module for module in pipe.unet.modules() if hasattr(module, "lora_A")]
    assert layers
    return [next(iter(layer.scaling.values())) for layer in layers]


EVENTS: list[Callable[[Any], Any]] = [
    lambda pipe: load(pipe, "one"),
    lambda pipe: pipe.set_adapters(["one"], [0.3]),
    lambda pipe: load(pipe, "two", 2),
    lambda pipe: pipe.set_adapters(["one", "two"], [0.7, 0.4]),
    lambda pipe: pipe.set_adapters(["two"], [1.5]),
    lambda pipe: pipe.disable_lora(),
    lambda pipe: pipe.enable_lora(),
    lambda pipe: pipe.fuse_lora(),
    lambda pipe: pipe.unfuse_lora(),
    lambda pipe: pipe.delete_adapters("one"),
    lambda pipe: pipe.unload_lora_weights(),
]


@pytest.mark.parametrize("how", ["gate", pytest.param("compile", marks=pytest.mark.slow)])
def test_every_event_is_exact(how: str) -> None:
    plain = tiny.make("sd-small")
    pipe = tiny.make("sd-small")
    if how == "gate":
        tgate_fx.gate(pipe, GATE)
    else:
        tgate_fx.compile(pipe, GATE, backend="eager")
    before = run(pipe)
    network = oracle.Network(plain.unet, [site.name for site in tgate_fx.sites(plain)])
    results = []
    for event in EVENTS:
        event(plain)
        event(pipe)
        results.append(run(pipe))
        by_hooks = oracle.gated([network], lambda: run(plain), GATE, "batch", keep="negative")
        assert relative_error(results[-1], by_hooks) < 1e-6
    assert relative_error(results[-1], run(plain)) > 1e-5  # which is ungated
    assert not torch.equal(results[0], before)
    assert relative_error(results[-1], before) < 1e-5  # fusing and unfusing rounds


@pytest.mark.parametrize("regional", tiny.slow_but((), (False, True)))
def test_no_weight_of_an_adapter_takes_a_graph(regional: bool, backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    for each in (pipe, eager):
        load(each, "one")
    tgate_fx.compile(pipe, GATE, backend=backend, regional=regional)
    tgate_fx.gate(eager, GATE)
    results = []
    for weight in (1.0, 0.3, 0.8, -0.5, 0.0):
        for each in (pipe, eager):
            each.set_adapters(["one"], [weight])
        results.append(run(pipe))
        assert relative_error(results[-1], run(eager)) < 1e-5
        assert len(backend.graphs) == 2
    assert not any(torch.equal(results[0], other) for other in results[1:])


def test_no_scale_of_a_call_takes_a_graph(backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    for each in (pipe, eager):
        load(each, "one")
        each.set_adapters(["one"], [0.7])
    tgate_fx.compile(pipe, GATE, backend=backend)
    tgate_fx.gate(eager, GATE)
    expected = run(pipe)
    for scale in (0.3, 1.0, 0.5, 2.0):
        scaled = {"cross_attention_kwargs": {"scale": scale}}
        assert relative_error(run(pipe, **scaled), run(eager, **scaled)) < 1e-5
        assert [float(scale) for scale in scales(pipe)] == pytest.approx(scales(eager))  # their own again
        assert torch.equal(run(pipe), expected)
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_a_weight_that_changes_between_steps(backend: CountingBackend) -> None:
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    tgate_fx.compile(pipe, GATE, backend=backend)
    tgate_fx.gate(eager, GATE)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters(["one"], [0.2 * index])
        return {}

    for each in (pipe, eager):
        load(each, "one")
    results = [
        run(each, callback_on_step_end=callback, cross_attention_kwargs={"scale": 0.5}) for each in (pipe, eager)
    ]
    assert relative_error(*results) < 1e-5
    assert len(backend.graphs) == 2


def test_hotswap_and_then_other_weights(backend: CountingBackend) -> None:
    pipe = tiny.make("sd-small")
    pipe.enable_lora_hotswap(target_rank=4)
    load(pipe, "one")
    tgate_fx.compile(pipe, GATE, backend=backend)
    run(pipe)
    for seed, weight in ((2, 1.0), (3, 0.4), (4, 0.9)):
        load(pipe, "one", seed, hotswap=True)
        pipe.set_adapters(["one"], [weight])
        got = run(pipe)
        fresh = tiny.make("sd-small")
        load(fresh, "one", seed)
        fresh.set_adapters(["one"], [weight])
        assert relative_error(got, run(tgate_fx.gate(fresh, GATE))) < 1e-5
    assert len(backend.graphs) == 2


@pytest.mark.slow
def test_restored_layers_have_plain_numbers_again() -> None:
    pipe = tiny.make("sd-small")
    load(pipe, "one")
    pipe.set_adapters(["one"], [0.3])
    before = scales(pipe)
    expected = run(pipe)
    tgate_fx.compile(pipe, GATE, backend="eager")
    run(pipe, cross_attention_kwargs={"scale": 0.5})
    assert all(isinstance(scale, torch.Tensor) for scale in scales(pipe))
    tgate_fx.restore(pipe)
    assert all(type(scale) is float for scale in scales(pipe))
    assert scales(pipe) == before
    assert torch.equal(run(pipe), expected)


@pytest.mark.slow
def test_an_error_leaves_every_scale_as_it_was() -> None:
    pipe = tiny.make("sd-small")
    load(pipe, "one")
    tgate_fx.compile(pipe, GATE, backend="eager")
    before = scales(pipe)
    expected = run(pipe)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, callback_on_step_end=callback, cross_attention_kwargs={"scale": 0.5})
    assert [float(scale) for scale in scales(pipe)] == before
    assert torch.equal(run(pipe), expected)


def test_an_error_within_a_step_leaves_every_scale_as_it_was() -> None:
    """There the scale that the call gives is in its place."""
    pipe = tgate_fx.compile(with_lora(), GATE, backend="eager")
    before, expected = scales(pipe), run(pipe)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    failing = oracle.hooked(pipe.unet.mid_block.register_forward_pre_hook(fail))
    with failing, pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, **SCALED)
    assert list(map(float, scales(pipe))) == before
    assert torch.equal(run(pipe), expected)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("settings", [{}, {"regional": True}], ids=["packages", "caches"])
def test_a_lora_has_its_own_scales_in_an_artifact(settings: dict[str, Any], tmp_path: Path) -> None:
    """Under `compile` they are tensors while a generation runs, and were left so for the structure."""

    pipe = tgate_fx.compile(with_lora(), GATE, **settings)
    expected = run(pipe)
    tgate_fx.save(pipe, tmp_path / "artifact", height=KWARGS["height"], width=KWARGS["width"])
    loaded = tgate_fx.load(with_lora(), tmp_path / "artifact")
    assert relative_error(run(loaded), expected) < 1e-4
    assert torch.equal(run(pipe), expected)
    tgate_fx.restore(pipe)
    assert not any(isinstance(scale, torch.Tensor) for scale in scales(pipe))


SCALED = {"cross_attention_kwargs": {"scale": 0.37}}


def with_lora() -> Any:
    pipe = tiny.make("sd-small")
    load(pipe, "one")
    return pipe


@pytest.mark.parametrize("looks", ["graphs", "ladder"])
@pytest.mark.parametrize("scale", [0.37, 0.0])
def test_looking_at_a_pipeline_leaves_the_scales_as_they_are(looks: str, scale: float) -> None:
    """Though the last call had a scale, with which the denoiser is traced or run."""
    pipe = tgate_fx.compile(with_lora(), GATE, backend="eager")
    pipe.set_adapters(["one"], [0.5])
    expected = run(pipe)
    for _ in range(2):
        scaled = run(pipe, cross_attention_kwargs={"scale": scale})
    tgate_fx.graphs(pipe) if looks == "graphs" else tgate_fx.report(pipe, ladder=True)
    assert set(map(float, scales(pipe))) == {0.5}
    assert torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe, cross_attention_kwargs={"scale": scale}), scaled)
    tgate_fx.restore(pipe)
    assert set(scales(pipe)) == {0.5}


def test_scales_are_copied_only_where_a_call_gives_one() -> None:
    """With a callback they are looked at before every step, where each copy is a launch on a GPU."""

    class Clones(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += func is torch.ops.aten.clone.default
            return func(*args, **(kwargs or {}))

    pipe = with_lora()
    held = LoraScales(pipe.unet)
    held.begin(may_change=True)
    for inputs, copies in (({}, 0), (SCALED, len(scales(pipe))), ({}, 0)):
        with Clones() as clones:
            held.put(inputs, torch.device("cpu"))
            held.take_out()
        assert clones.number == copies
        assert set(map(float, scales(pipe))) == {1.0}
    held.give_back()


def test_a_calls_scale_is_not_for_others_who_share_the_denoiser() -> None:
    """Not for a plain pipeline that a callback calls, nor for a compiled one that takes turns with it."""
    pipe = with_lora()
    plain, other = (diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False) for _ in "ab")
    for each in (plain, other):
        each.set_progress_bar_config(disable=True)
        each.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    expected = run(plain)
    tgate_fx.compile(pipe, GATE, backend="eager")
    tgate_fx.compile(other, GATE, backend="eager")
    calls = ((pipe, SCALED), (other, {"cross_attention_kwargs": {"scale": 0.8}}))
    alone = [run(each, **scale) for each, scale in calls]
    got = []

    def calls_plain(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            got.append(run(plain))
        return kwargs

    assert torch.equal(run(pipe, **SCALED, callback_on_step_end=calls_plain), alone[0])
    assert torch.equal(got[0], expected)
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda call: run(call[0], **call[1]), calls))
        assert all(map(torch.equal, together, alone))
    tgate_fx.restore(pipe)
    tgate_fx.restore(other)
    assert set(scales(pipe)) == {1.0}
    assert torch.equal(run(plain), expected)


def test_scales_that_a_hook_sets_between_steps_are_those_of_the_next() -> None:
    results = []
    for compiled in (False, True):
        pipe = with_lora()
        tgate_fx.compile(pipe, GATE, backend="eager") if compiled else tgate_fx.gate(pipe, GATE)
        seen: list[int] = []

        def changes(module: Any, args: Any, pipe: Any = pipe, seen: list[int] = seen) -> None:
            seen.append(1)
            if len(seen) == 3:
                pipe.set_adapters(["one"], [0.2])

        pipe.unet.register_forward_pre_hook(changes)
        results.append(run(pipe, **SCALED))
    assert relative_error(results[1], results[0]) < 1e-5


def test_a_scale_without_a_lora_takes_no_graph(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), GATE, backend=backend)
    expected = run(pipe)
    for scale in (0.3, 0.7):
        assert torch.equal(run(pipe, cross_attention_kwargs={"scale": scale}), expected)
    assert len(backend.graphs) == 2


def test_frozen_graphs_follow_the_scales_of_a_lora(backend: CountingBackend, freezing: Any) -> None:
    """Each is compiled for once, however often it is written: a call's scale is put in and taken out at every step."""
    pipe, eager = (with_lora() for _ in range(2))
    tgate_fx.compile(pipe, GATE, backend=freezing)
    tgate_fx.gate(eager, GATE)
    results = []
    for weight, call, graphs in ((1.0, {}, 2), (0.3, {}, 4), (0.3, SCALED, 6)):
        for each in (pipe, eager):
            each.set_adapters(["one"], [weight])
        for changes in ({}, {}, {"callback_on_step_end": lambda *_: {}}):
            results.append(run(pipe, **call, **changes))
            assert relative_error(results[-1], run(eager, **call)) < 1e-6
            assert len(backend.graphs) == graphs
            pipe.set_adapters(["one"], [weight])
    assert relative_error(results[0], results[3]) > 1e-3
    assert relative_error(results[3], results[6]) > 1e-3
