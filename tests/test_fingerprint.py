"""What is told apart of a model that code was compiled for ahead of time, wherever it is kept."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from tests import tiny
from tgate_fx.artifact import fingerprint


class Patch:
    """Something that is not a module, and holds what a patched forward computes with."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def layer(value: float = 1.0) -> nn.Linear:
    made = nn.Linear(2, 2).requires_grad_(False)
    for tensor in made.parameters():
        tensor.fill_(value)
    return made


def nested(value: float) -> Patch:
    return Patch([nn.Sequential(layer(), layer(value))])


def cyclic(value: float) -> Patch:
    module = layer(value)
    module.patch = patch = Patch([module])
    return patch


def closure(held: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden_states: hidden_states * held


def default(value: float) -> Callable[..., torch.Tensor]:
    def forward(hidden_states: torch.Tensor, scale: float = value) -> torch.Tensor:
        return hidden_states * scale

    return forward


def keyword_default(value: float) -> Callable[..., torch.Tensor]:
    def forward(hidden_states: torch.Tensor, *, scale: float = value) -> torch.Tensor:
        return hidden_states * scale

    return forward


def empty_cell(value: float) -> list[Any]:
    def forward() -> Any:
        return later

    if value > 10:
        later = value
    return [forward, value]


@dataclass
class Settings:
    scale: float
    more: Any = None


def dag(value: float) -> Any:
    """Whose parts are held twice, and hold each other."""
    inner = Patch([value])
    outer = Patch([inner, {"again": inner}])
    inner.back = outer  # type: ignore[attr-defined]
    return outer


def model(processor: Any) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(layer(), layer())
    made[1].processor = processor
    made[1].parent = [made]
    return made


@pytest.mark.parametrize(
    "kept",
    [
        lambda value: Patch(torch.full((2,), value)),
        lambda value: Patch(layer(value)),
        lambda value: layer(value).forward,
        lambda value: Patch(torch.full((2,), value)).forward,
        lambda value: closure(value),
        lambda value: closure(torch.full((2,), value)),
        lambda value: closure(layer(value)),
        lambda value: functools.partial(torch.mul, value),
        lambda value: functools.partial(torch.mul, other=layer(value)),
        lambda value: types.MethodType(closure(value), Patch(None)),
        nested,
        cyclic,
        default,
        keyword_default,
        empty_cell,
        lambda value: Patch(Settings(1.0, Settings(value))),
        lambda value: Patch({"a": {"b": {"c": [[(value,)]]}}}),
        lambda value: Patch(Patch(Patch(Patch(Patch(Patch(value)))))),
        lambda value: closure(Patch([closure(Patch({"a": [value]}))])),
        lambda value: Patch(np.full(2, value)),
        lambda value: Patch(str(value).encode()),
        dag,
    ],
)
def test_what_modules_hold_beside_their_own_weights_is_told_apart(kept: Callable[[float], Any]) -> None:
    first, same, other = (fingerprint.structure(model(kept(value))) for value in (1.0, 1.0, 3.0))
    assert fingerprint.differences(first, same) == []
    assert fingerprint.differences(first, other) == ["1"]


def test_what_changes_in_every_generation_is_not_told_apart() -> None:
    """A pipeline, or its scheduler, that a hook or a processor holds."""
    pipes = [tiny.make("sd-small") for _ in range(2)]
    tiny.latents(pipes[1], **tiny.inputs("sd-small"), num_inference_steps=3)
    first, other = (fingerprint.structure(model(Patch([pipe, pipe.scheduler]))) for pipe in pipes)
    assert first == other


def test_weights_that_modules_list_may_change() -> None:
    """Packages that read the pipeline's own follow them; for others they are compared apart."""
    first, changed = model(None), model(None)
    changed[0].weight.add_(1)
    # What an attribute holds of the model itself is the model's, however it is wrapped.
    for each in (first, changed):
        each[1].processor = Patch(nn.Sequential(each[0], closure_module(each[0])))
    assert fingerprint.differences(fingerprint.structure(first), fingerprint.structure(changed)) == []
    assert fingerprint.differences(fingerprint.weights(first), fingerprint.weights(changed)) == ["0.weight"]


def closure_module(module: nn.Module) -> nn.Module:
    wrapper = nn.Identity()
    wrapper.forward = closure(module)  # type: ignore[method-assign]
    return wrapper


def test_another_models_place_in_the_order_of_offloading_is_not_told_apart() -> None:
    """It moves between devices while the denoiser does not."""

    def hooked(device: str) -> nn.Module:
        made = model(None)
        made._hf_hook = types.SimpleNamespace(prev_module_hook=Patch(layer().to(device)))
        return made

    first, other = (fingerprint.structure(hooked(device)) for device in ("cpu", "meta"))
    assert first == other


def test_a_registry_without_hooks_is_not_told_apart() -> None:
    """diffusers' pipelines leave one on a model at the end of their first generation."""
    plain, used, hooked = model(None), model(None), model(None)
    HookRegistry.check_if_exists_or_initialize(used)
    HookRegistry.check_if_exists_or_initialize(hooked).register_hook(ModelHook(), "a hook")
    assert fingerprint.structure(plain) == fingerprint.structure(used)
    assert fingerprint.differences(fingerprint.structure(plain), fingerprint.structure(hooked)) == ["the denoiser"]


def test_every_module_has_an_entry_of_its_own() -> None:
    described = fingerprint.structure(nn.Sequential(*itertools.starmap(nn.Linear, [(1, 2), (2, 3)])))
    assert list(described) == ["", "0", "1"]
    assert len(set(described.values())) == 3
