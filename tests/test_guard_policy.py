"""What changes modules between two steps of one generation is seen by compiled phases, whoever changes them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import tgate_fx
from tests import oracle, tiny, zoo
from tests.conftest import CountingBackend
from tests.test_families import denoisers_of
from tests.zoo import controlnet
from tgate_fx.compiled.guard_policy import _LOOPS, runs_only_known_code

FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
KWARGS = {**tiny.inputs("sd"), "num_inference_steps": 7}


class CountingProcessor(AttnProcessor2_0):
    """An attention processor that does something else from its fifth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = super().__call__(*args, **kwargs)
        return out * 2 if self.calls >= 5 else out


def plain_class(pipe: Any) -> type[Any]:
    """The class of a gated pipeline before it was gated."""
    return type(pipe).__mro__[1]


def counting_processor(pipe: Any) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(CountingProcessor())


def freeu_at_fifth(pipe: Any) -> Callable[..., None]:
    calls: list[int] = []

    def hook(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 5:
            pipe.enable_freeu(**FREEU)

    return hook


def hook_on_the_denoiser(pipe: Any) -> None:
    pipe.unet.register_forward_pre_hook(freeu_at_fifth(pipe))


def hook_on_the_denoiser_afterwards(pipe: Any) -> None:
    hook = freeu_at_fifth(pipe)
    pipe.unet.register_forward_hook(lambda *args: hook())


def scheduler_of_its_own(pipe: Any) -> None:
    hook = freeu_at_fifth(pipe)

    class Scheduler(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            hook()
            return super().step(*args, **kwargs)

    pipe.scheduler = Scheduler.from_config(pipe.scheduler.config)


def replaced_step(pipe: Any) -> None:
    hook, plain = freeu_at_fifth(pipe), pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        hook()
        return plain(*args, **kwargs)

    pipe.scheduler.step = step


def pipeline_of_its_own(pipe: Any) -> None:
    hook = freeu_at_fifth(pipe)

    class Pipeline(diffusers.StableDiffusionPipeline):  # type: ignore[misc]
        @property
        def interrupt(self) -> bool:  # asked in every step of the loop
            hook()
            return False

    pipe.__class__ = Pipeline


def module_of_its_own(pipe: Any) -> None:
    hook = freeu_at_fifth(pipe)

    class Watched(nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                hook()
            return super().forward(x)

    pipe.unet.conv_act = Watched()


CHANGES = [
    counting_processor,
    hook_on_the_denoiser,
    hook_on_the_denoiser_afterwards,
    scheduler_of_its_own,
    replaced_step,
    pipeline_of_its_own,
]


@pytest.mark.parametrize("change", tiny.slow_but((hook_on_the_denoiser,), CHANGES))
def test_what_changes_between_steps_is_seen(change: Callable[[Any], None], backend: CountingBackend) -> None:
    pipe, eager, plain = (tiny.make("sd-small") for _ in range(3))
    change(pipe)
    change(eager)
    tgate_fx.compile(pipe, gate_step=2, backend=backend)
    got = tiny.latents(pipe, **KWARGS)
    assert torch.equal(got, tiny.latents(tgate_fx.gate(eager, 2), **KWARGS))
    assert not torch.equal(got, tiny.latents(tgate_fx.gate(plain, 2), **KWARGS))
    assert len(backend.graphs) > 2


@pytest.mark.parametrize("change", [*CHANGES, module_of_its_own])
def test_only_known_code_is_trusted(change: Callable[[Any], None]) -> None:
    pipe = tiny.make("sd-small")
    change(pipe)
    tgate_fx.gate(pipe)
    assert not runs_only_known_code(pipe, plain_class(pipe), pipe.unet)


@pytest.mark.parametrize("family", tiny.MAKERS)
def test_diffusers_own_code_is_trusted(family: str) -> None:
    pipe = tgate_fx.gate(tiny.make(family))
    assert runs_only_known_code(pipe, plain_class(pipe), tiny.denoiser(pipe))


def state(network: nn.Module) -> dict[tuple[str, ...], Any]:
    """What a compiled graph may hold of the modules: their and their processors' attributes, and which tensors."""
    found: dict[tuple[str, ...], Any] = {}
    for name, module in network.named_modules():
        for key, value in [*vars(module).items(), *vars(vars(module).get("processor", object)).items()]:
            if isinstance(value, dict):  # parameters, buffers and modules among them
                found.update({(name, key, inner): id(held) for inner, held in value.items()})
            found[name, key] = str(value) if isinstance(value, str | int | float | tuple | list) else type(value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", [each for each in zoo.entries() if each.pipeline.split()[0] in _LOOPS], ids=lambda each: each.pipeline
)
def test_loops_change_nothing_on_a_denoiser(entry: zoo.Entry) -> None:
    pipe = entry.make()
    states: dict[int, list[dict[tuple[str, ...], Any]]] = {}

    def hook(network: nn.Module, *_: Any) -> None:
        states.setdefault(id(network), []).append(state(network))

    networks = denoisers_of(pipe, entry)
    with oracle.hooked(*[network.register_forward_pre_hook(hook) for network in networks]):
        entry.run(pipe)
    assert len(states) == len(networks)
    for first, *others in states.values():
        assert others
        assert all(other == first for other in others)
    if "tokenizer" in pipe.components:
        pipe.tokenizer = None  # Kolors' is of the tests, and so is unknown code
    assert runs_only_known_code(pipe, type(pipe), networks[0])


@pytest.mark.slow
def test_every_trusted_loop_is_tested() -> None:
    assert {each.pipeline.split()[0] for each in zoo.entries()} >= _LOOPS


def test_a_hook_on_a_companion_is_seen() -> None:
    pipe = controlnet.with_controlnet("StableDiffusionControlNetPipeline")
    assert runs_only_known_code(pipe, type(pipe), pipe.unet)
    with oracle.hooked(pipe.controlnet.mid_block.register_forward_hook(lambda *_: None)):
        assert not runs_only_known_code(pipe, type(pipe), pipe.unet)


def test_loops_that_were_not_looked_at_are_not_trusted() -> None:
    """This pipeline turns layers of its denoiser off in the middle of its loop."""
    parts = {name: part for name, part in tiny.make("sd-small").components.items() if name != "image_encoder"}
    pipe = tgate_fx.gate(diffusers.StableDiffusionGLIGENPipeline(**parts), gate_step=None)
    assert not runs_only_known_code(pipe, plain_class(pipe), pipe.unet)


def test_forwards_that_are_not_the_class_s_own_are_not_trusted() -> None:
    pipe = tiny.make("sd-small")
    block = pipe.unet.mid_block
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    tgate_fx.gate(pipe)
    assert not runs_only_known_code(pipe, plain_class(pipe), pipe.unet)
    block.forward = plain
    assert runs_only_known_code(pipe, plain_class(pipe), pipe.unet)


def test_global_hooks_are_refused_by_compiled_phases(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend=backend)
    expected = tiny.latents(pipe, **KWARGS)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: out)
    try:
        with pytest.raises(tgate_fx.UnsupportedError, match=r"for all modules.*expected none.*tgate_fx\.gate"):
            tiny.latents(pipe, **KWARGS)
    finally:
        handle.remove()
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


@pytest.mark.slow
def test_a_hook_that_is_registered_later_is_seen(backend: CountingBackend) -> None:
    pipe, eager = tgate_fx.compile(tiny.make("sd-small"), 2, backend=backend), tgate_fx.gate(tiny.make("sd-small"), 2)
    before = tiny.latents(pipe, **KWARGS)
    handles = [each.unet.mid_block.register_forward_hook(lambda module, given, out: out * 2) for each in (pipe, eager)]
    hooked = tiny.latents(pipe, **KWARGS)
    assert torch.equal(hooked, tiny.latents(eager, **KWARGS))
    assert not torch.equal(hooked, before)
    for handle in handles:
        handle.remove()
    assert torch.equal(tiny.latents(pipe, **KWARGS), before)


def patched(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrap a method so that it looks like the one it wraps."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


@pytest.mark.parametrize(
    "what",
    [
        lambda pipe: (nn.SiLU, "forward"),
        lambda pipe: (type(pipe.unet), "get_time_embed"),
        lambda pipe: (AttnProcessor2_0, "__call__"),
        lambda pipe: (type(pipe.scheduler), "scale_model_input"),
        lambda pipe: (diffusers.DiffusionPipeline, "progress_bar"),
        lambda pipe: (pipe.unet, "get_time_embed"),
        lambda pipe: (pipe.unet.mid_block, "forward"),
        lambda pipe: (pipe.scheduler, "step"),
        lambda pipe: (pipe, "progress_bar"),
    ],
)
@pytest.mark.parametrize("gated_first", [False, True])
def test_what_is_patched_in_is_not_trusted(
    what: Callable[[Any], tuple[Any, str]], gated_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.make("sd-small")
    if gated_first:
        tgate_fx.gate(pipe)
        assert runs_only_known_code(pipe, plain_class(pipe), pipe.unet)
    patched(*what(pipe), monkeypatch)
    if not gated_first:
        tgate_fx.gate(pipe)
    assert not runs_only_known_code(pipe, plain_class(pipe), pipe.unet)


class Stepper:
    """Something to call that is no function."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap", [torch.no_grad(), torch._dynamo.disable, Stepper, functools.lru_cache, functools.partial]
)
@pytest.mark.parametrize("owner", ["scheduler", "unet", "pipe"])
def test_code_within_what_a_known_package_makes_of_it_is_not_trusted(
    wrap: Callable[[Any], Any], owner: str, backend: CountingBackend
) -> None:
    pipe = tiny.make("sd-small")
    name = {"scheduler": "step", "unet": "get_time_embed", "pipe": "progress_bar"}[owner]
    thing = pipe if owner == "pipe" else getattr(pipe, owner)
    plain = getattr(thing, name)
    tgate_fx.gate(pipe)
    assert runs_only_known_code(pipe, plain_class(pipe), pipe.unet)
    setattr(thing, name, wrap(lambda *args, **kwargs: plain(*args, **kwargs)))
    assert not runs_only_known_code(pipe, plain_class(pipe), pipe.unet)


def test_a_decorated_step_that_changes_modules_is_seen(backend: CountingBackend) -> None:
    results = []
    for compiled in (False, True):
        pipe = tiny.make("sd-small")
        hook, plain = freeu_at_fifth(pipe), pipe.scheduler.step

        @torch.no_grad()
        def step(*args: Any, hook: Any = hook, plain: Any = plain, **kwargs: Any) -> Any:
            hook()
            return plain(*args, **kwargs)

        pipe.scheduler.step = step
        tgate_fx.compile(pipe, 2, backend=backend) if compiled else tgate_fx.gate(pipe, 2)
        results.append(tiny.latents(pipe, **KWARGS))
    assert torch.equal(*results)
