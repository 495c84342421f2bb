"""Changes of weights that compiled graphs hold are noticed, wherever the weights are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tgate_fx.compiled.checksum import checksum
from tgate_fx.compiled.frozen_weights import FrozenWeights


def held(module: nn.Module) -> FrozenWeights:
    weights = FrozenWeights(module)
    weights.add([*module.parameters(), *module.buffers()])
    assert not weights.changed()
    weights.begin()
    return weights


def double(layer: nn.Linear) -> None:
    layer.weight.mul_(2)


def negate_a_pair_that_the_checksum_confounds(layer: nn.Linear) -> None:
    layer.weight[0, 1:4:2].neg_()


def write_past_the_version_counter(layer: nn.Linear) -> None:
    layer.weight.data.add_(0.1)


def write_one_value(layer: nn.Linear) -> None:
    layer.weight.data[-1, 1] += 0.25


def negate_one_value(layer: nn.Linear) -> None:
    layer.weight.data[-1, 1].neg_()


def negate(layer: nn.Linear) -> None:
    layer.weight.data.neg_()


def negate_every_second_value(layer: nn.Linear) -> None:
    layer.weight.data[:, 1::2].neg_()


def negate_every_fourth_value(layer: nn.Linear) -> None:
    layer.weight.data[:, 1::4].neg_()


def swap_rows(layer: nn.Linear) -> None:
    layer.weight.data[:2] = layer.weight.data[:2].flip(0)


def swap_columns(layer: nn.Linear) -> None:
    layer.weight.data[:, -2:] = layer.weight.data[:, -2:].flip(1)


def transpose(layer: nn.Linear) -> None:
    layer.weight.data.copy_(layer.weight.data.t().clone())


def replace(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(layer.bias.detach().clone())


def replace_and_keep(layer: nn.Linear) -> None:
    layer.kept = [layer.bias]
    replace(layer)


def move(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.clone()


def reformat(layer: nn.Linear) -> None:
    layer.to(torch.bfloat16)


@pytest.mark.parametrize("size", [2, 20, 64, 400, 512, 2042], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        double,
        negate_a_pair_that_the_checksum_confounds,
        write_past_the_version_counter,
        write_one_value,
        negate_one_value,
        negate,
        negate_every_second_value,
        negate_every_fourth_value,
        swap_rows,
        swap_columns,
        transpose,
        replace,
        replace_and_keep,
        move,
        reformat,
    ],
)
@torch.no_grad()
def test_every_way_to_change_a_weight_is_noticed(change: Callable[[nn.Linear], None], size: int) -> None:
    layer = nn.Linear(size, size)
    layer.register_buffer("empty", torch.empty(0))
    weights = held(layer)
    change(layer)
    assert weights.changed()


def test_nothing_held_never_changes() -> None:
    layer = nn.Linear(3, 3)
    weights = FrozenWeights(layer)
    layer.bias = None
    assert not weights.changed()


@pytest.mark.parametrize("change", [double, write_past_the_version_counter, negate, replace, transpose])
def test_what_rewrites_a_weight_is_seen_at_a_glance(change: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(300, 300).requires_grad_(False)
    weights = held(layer)
    assert not weights.changed()
    change(layer)
    assert weights.changed()


def test_a_glance_reads_only_the_beginning() -> None:
    layer = nn.Linear(300, 300).requires_grad_(False)
    weights = held(layer)
    assert not weights.changed()
    write_one_value(layer)
    assert not weights.changed()
    weights.begin()
    assert weights.changed()


def test_all_bits_are_read_once_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its steps are trusted or not."""
    glances: list[bool] = []
    changed = FrozenWeights.changed

    def recorded(self: FrozenWeights) -> bool:
        glances.append(self._read)
        return changed(self)

    monkeypatch.setattr(FrozenWeights, "changed", recorded)
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend=CountingBackend())
    for extra, expected in (
        ({}, [False]),
        ({"callback_on_step_end": lambda *_: {}}, [False, True, True, True]),
        ({}, [False]),
    ):
        glances.clear()
        tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=4, **extra)
        assert glances == expected


def test_a_weight_that_is_gone_has_changed() -> None:
    layer = nn.Linear(3, 3)
    weights = FrozenWeights(layer)
    weights.add([torch.ones(3)])
    assert weights.changed()


FORMS = {
    "channels-last": lambda: torch.zeros(3, 4, 5, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.zeros(5, 7, dtype=torch.bfloat16).t(),
    "odd offset": lambda: torch.zeros(9)[1:],
    "strided": lambda: torch.zeros(3, 4)[:, 1::2],
    "expanded": lambda: torch.zeros(3, 1).expand(3, 5),
    "complex": lambda: torch.zeros(3, 3, dtype=torch.complex64),
    "bytes": lambda: torch.zeros(3, dtype=torch.uint8),
    "scalar": lambda: torch.zeros(()),
    "large": lambda: torch.zeros(9, 4097),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_every_form_are_read(form: str) -> None:
    tensor = FORMS[form]()
    before = checksum(tensor)
    assert checksum(tensor) == before
    (tensor.select(-1, -1) if tensor.ndim else tensor).add_(1)
    assert checksum(tensor) != before


def test_weights_without_values_have_no_bits() -> None:
    assert checksum(torch.empty(3, device="meta")) == 0


class Wrapped(torch.Tensor):
    """As quantized weights are: a tensor that gives out no bits of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.data_ptr:
            raise AssertionError("no storage")
        return super().__torch_function__(function, types, args, kwargs or {})


UNREADABLE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "subclass": lambda: torch.eye(3).as_subclass(Wrapped),
    "quantized": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_weight_that_cannot_be_read_is_refused(kind: str) -> None:
    weights = FrozenWeights(nn.Linear(3, 3))
    weight = UNREADABLE[kind]()
    with pytest.raises(tgate_fx.UnsupportedError, match=r"A weight of type .*expected dense weights.*freezing"):
        weights.add([weight])
    assert not weights.changed()


class Scaled(AttnProcessor2_0):
    """A processor that keeps weights which no module lists."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1)
        self.layer = nn.Linear(1, 1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * self.scale * self.layer.weight


def scale_tensor(processor: Scaled) -> None:
    processor.scale.mul_(2)


def scale_layer(processor: Scaled) -> None:
    processor.layer.weight.data.add_(1)


def replace_tensor(processor: Scaled) -> None:
    processor.scale = torch.full((1,), 3.0)


@pytest.mark.parametrize("change", tiny.slow_but((scale_layer,), (scale_tensor, scale_layer, replace_tensor)))
def test_weights_that_no_module_lists_are_followed(change: Callable[[Scaled], None], freezing: Any) -> None:
    processor = Scaled()
    pipe, eager = tiny.make("sd-small"), tiny.make("sd-small")
    for each in (pipe, eager):
        each.unet.set_attn_processor(processor)
    tgate_fx.compile(pipe, gate_step=None, backend=freezing)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 2}
    before = tiny.latents(pipe, **kwargs)
    assert torch.equal(before, tiny.latents(eager, **kwargs))
    with torch.no_grad():
        change(processor)
    after = tiny.latents(pipe, **kwargs)
    assert torch.equal(after, tiny.latents(eager, **kwargs))
    assert not torch.equal(after, before)


def test_a_denoiser_with_unreadable_weights_is_refused_before_compiling(
    backend: CountingBackend, freezing: Any
) -> None:
    pipe = tiny.make("sd-small")
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    conv = pipe.unet.conv_in
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Wrapped), requires_grad=False)
    plain = tiny.latents(pipe, **kwargs)
    tgate_fx.compile(pipe, gate_step=2, backend=freezing)
    with pytest.raises(tgate_fx.UnsupportedError, match=r"type Wrapped.*freezing"):
        tiny.latents(pipe, **kwargs)
    assert backend.graphs == []
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **kwargs), plain)


@pytest.mark.slow
def test_weights_that_change_before_the_first_step_are_noticed(freezing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that hold weights are checked where they are used: a call may change weights before its loop begins."""
    pipe = tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend=freezing)
    eager = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    before = tiny.latents(pipe, **kwargs)
    checked: list[FrozenWeights] = []

    def counted(held: FrozenWeights) -> bool:
        checked.append(held)
        return changed(held)

    changed = FrozenWeights.changed
    with monkeypatch.context() as patch:
        patch.setattr(FrozenWeights, "changed", counted)
        assert torch.equal(tiny.latents(pipe, **kwargs), before)
    assert len(checked) == 1

    def write_to(weight: torch.Tensor) -> None:
        weight.mul_(1.5)

    for each in (pipe, eager):
        weight = each.unet.conv_in.weight.data
        each.text_encoder.register_forward_pre_hook(lambda *_, weight=weight: write_to(weight))
    got = tiny.latents(pipe, **kwargs)
    assert torch.equal(got, tiny.latents(eager, **kwargs))
    assert not torch.equal(got, before)


def test_two_graphs_that_hold_different_values_of_a_weight_are_noticed() -> None:
    """Though it is again what it was when the first one was compiled."""
    module = nn.Linear(4, 4).requires_grad_(False)
    weights = FrozenWeights(module)
    weights.add([module.weight])
    module.weight.data.mul_(2)
    weights.add([module.weight, module.bias])
    module.weight.data.div_(2)
    weights.begin()
    assert weights.changed()
    fresh = FrozenWeights(module)
    for _ in range(2):
        fresh.add([module.weight, module.bias])
    assert not fresh.changed()
