"""Sites, roles and the functional transform, on bare denoisers of several families."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    LTXVideoTransformer3DModel,
    SanaTransformer2DModel,
    UNet2DModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from torch import nn

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.zoo import noise
from tgate_fx.forward_patch import ForwardPatch

Case = tuple[nn.Module, dict[str, Any]]


def unet() -> Case:
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor(500)}
    return tiny.unet(), {**inputs, "encoder_hidden_states": torch.randn(2, 7, tiny.TEXT_WIDTH)}


def pixart() -> Case:
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500])}
    text = {"encoder_hidden_states": torch.randn(2, 7, tiny.TEXT_WIDTH), "encoder_attention_mask": torch.ones(2, 7)}
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return tiny.pixart_transformer(), {**inputs, **text, **sizes}


def wan() -> Case:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    inputs = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "timestep": torch.tensor([500, 500])}
    return model, {**inputs, "encoder_hidden_states": torch.randn(2, 7, 16)}


def ltx() -> Case:
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=12,
    ).eval()
    inputs = {"hidden_states": torch.randn(2, 2 * 4 * 4, 4), "timestep": torch.tensor([500, 500])}
    text = {"encoder_hidden_states": torch.randn(2, 7, 12), "encoder_attention_mask": torch.ones(2, 7).bool()}
    return model, {**inputs, **text, "num_frames": 2, "height": 4, "width": 4}


def sana() -> Case:
    model = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
    ).eval()
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500])}
    return model, {**inputs, "encoder_hidden_states": torch.randn(2, 7, 12)}


CASES: dict[str, Callable[[], Case]] = {"unet": unet, "pixart": pixart, "wan": wan, "ltx": ltx, "sana": sana}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def other_text(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "encoder_hidden_states": torch.randn_like(inputs["encoder_hidden_states"])}


@cases
@torch.no_grad()
def test_pre_is_the_denoiser_and_post_is_the_denoiser_with_a_cache(case: Callable[[], Case]) -> None:
    denoiser, inputs = case()
    plain = denoiser(**inputs, return_dict=False)[0]
    pre, post = tgate_fx.split(denoiser)
    output, cache = pre(**inputs, return_dict=False)
    assert torch.equal(output[0], plain)
    assert len(cache) == len(tgate_fx.sites(denoiser))
    assert all(not torch.equal(tensor, torch.zeros_like(tensor)) for tensor in cache)
    assert torch.equal(post(cache, **inputs, return_dict=False)[0], plain)
    # The cache stands in for the text, which no longer matters ...
    assert torch.equal(post(cache, **other_text(inputs), return_dict=False)[0], plain)
    assert not torch.equal(denoiser(**other_text(inputs), return_dict=False)[0], plain)
    # ... and the cache does.
    assert not torch.equal(post([2 * tensor for tensor in cache], **inputs, return_dict=False)[0], plain)
    assert torch.equal(denoiser(**inputs, return_dict=False)[0], plain)


@pytest.mark.parametrize("case", tiny.slow_but([CASES["wan"], CASES["pixart"]], CASES.values()), ids=CASES)
@torch.no_grad()
def test_each_phase_compiles_to_one_graph(case: Callable[[], Case]) -> None:
    denoiser, inputs = case()
    pre, post = tgate_fx.split(denoiser)
    output, cache = pre(**inputs, return_dict=False)
    backend = CountingBackend()
    compiled_pre, compiled_post = (torch.compile(phase, backend=backend, fullgraph=True) for phase in (pre, post))
    with torch.no_grad():
        for _ in range(2):
            compiled_output, compiled_cache = compiled_pre(**inputs, return_dict=False)
            assert torch.equal(compiled_output[0], output[0])
            assert all(torch.equal(*pair) for pair in zip(compiled_cache, cache, strict=True))
            assert torch.equal(compiled_post(cache, **inputs, return_dict=False)[0], output[0])
    assert len(backend.graphs) == 2
    names = [node.name for node in backend.graphs[1].graph.find_nodes(op="placeholder")]
    assert not [name for name in names if "attn2" in name]


@torch.no_grad()
def test_phases_can_be_exported() -> None:
    class Post(nn.Module):
        def __init__(self, denoiser: nn.Module, post: Callable[..., Any]) -> None:
            super().__init__()
            self.denoiser = denoiser
            self.post = post

        def forward(self, cache: list[torch.Tensor], sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            text = torch.zeros(2, 7, tiny.TEXT_WIDTH)
            return self.post(cache, sample, timestep, encoder_hidden_states=text, return_dict=False)[0]

    denoiser, inputs = unet()
    pre, post = tgate_fx.split(denoiser)
    output, cache = pre(**inputs, return_dict=False)
    arguments = (list(cache), inputs["sample"], inputs["timestep"])
    program = torch.export.export(Post(denoiser, post), arguments)
    torch.testing.assert_close(program.module()(*arguments), output[0])


@torch.no_grad()
def test_a_failing_phase_leaves_every_site_live() -> None:
    denoiser, inputs = unet()
    pre, post = tgate_fx.split(denoiser)
    output, cache = pre(**inputs, return_dict=False)
    for phase in (pre, lambda **kw: post(cache, **kw)):
        with pytest.raises(RuntimeError, match="channels"):
            phase(**{**inputs, "sample": torch.randn(2, 3, 16, 16)})
        assert torch.equal(denoiser(**inputs, return_dict=False)[0], output[0])


@torch.no_grad()
def test_restore_takes_a_split_off() -> None:
    denoiser, _ = unet()
    names = [set(vars(module)) for module in denoiser.modules()]
    tgate_fx.split(denoiser)
    assert "forward" in vars(denoiser)
    tgate_fx.restore(denoiser)
    assert [set(vars(module)) for module in denoiser.modules()] == names
    with pytest.raises(tgate_fx.StateError, match="is not split"):
        tgate_fx.restore(denoiser)


@torch.no_grad()
def test_a_denoiser_split_twice_is_restored_once() -> None:
    denoiser, inputs = unet()
    first, second = tgate_fx.split(denoiser), tgate_fx.split(denoiser)
    output, cache = first[0](**inputs, return_dict=False)
    assert torch.equal(second[1](cache, **inputs, return_dict=False)[0], output[0])
    tgate_fx.restore(denoiser)
    assert not any("forward" in vars(module) for module in denoiser.modules())
    for phase in (first[0], lambda **inputs: second[1](cache, **inputs)):
        with pytest.raises(tgate_fx.StateError, match=r"taken off.*expected them on it.*split again"):
            phase(**inputs)


def test_a_denoiser_may_be_split_and_gated_at_once() -> None:
    pipe = tiny.sd()
    plain = [set(vars(module)) for module in pipe.unet.modules()]
    tgate_fx.gate(pipe, 2)
    with pytest.raises(tgate_fx.StateError, match=r"belongs to a gated pipeline.*expected.*restore\(pipe\)"):
        tgate_fx.restore(pipe.unet)
    tgate_fx.split(pipe.unet)
    tgate_fx.restore(pipe.unet)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(tgate_fx.gate(tiny.sd(), 2), **kwargs))
    tgate_fx.restore(pipe)
    assert [set(vars(module)) for module in pipe.unet.modules()] == plain


@torch.no_grad()
def test_a_deep_copy_is_independent() -> None:
    denoiser, inputs = unet()
    pre, _ = tgate_fx.split(denoiser)
    plain = denoiser(**inputs, return_dict=False)[0]
    twin = copy.deepcopy(denoiser)
    for parameter in denoiser.parameters():
        parameter.zero_()
    assert torch.equal(twin(**inputs, return_dict=False)[0], plain)
    twin_pre, _ = tgate_fx.split(twin)
    assert torch.equal(twin_pre(**inputs, return_dict=False)[0][0], plain)
    assert not torch.equal(pre(**inputs, return_dict=False)[0][0], plain)


@torch.no_grad()
def test_a_copied_part_is_a_plain_module() -> None:
    denoiser, _ = unet()
    tgate_fx.split(denoiser)
    part = copy.deepcopy(denoiser.mid_block)
    assert not any(isinstance(getattr(module, "forward", None), ForwardPatch) for module in part.modules())
    hidden, embedding, text = torch.randn(1, 32, 8, 8), torch.randn(1, 64), torch.randn(1, 7, 32)
    expected = denoiser.mid_block(hidden, embedding, encoder_hidden_states=text)
    assert torch.equal(part(hidden, embedding, encoder_hidden_states=text), expected)
    for parameter in denoiser.parameters():
        parameter.zero_()
    assert torch.equal(part(hidden, embedding, encoder_hidden_states=text), expected)
    pickle.dumps(part)


def test_sites_are_listed_without_a_gate() -> None:
    pipe = tiny.sdxl()
    listed = tgate_fx.sites(pipe)
    expected = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    assert [site.name for site in listed] == expected
    assert {site.kind for site in listed} == {"cross-attention"}
    assert "forward" not in vars(pipe.unet)
    assert tgate_fx.sites(pipe.unet) == listed
    assert tgate_fx.sites(tgate_fx.gate(pipe)) == listed


def test_printed_sites_have_a_line_each() -> None:
    listed = tgate_fx.sites(tgate_fx.gate(tiny.sd(), gate_step=2, sp_interval=2))
    first, *lines = str(listed).splitlines()
    assert first == "4 × cross-attention, 4 × self-attention"
    assert [tuple(line.split()) for line in lines] == [tuple(site) for site in listed]
    assert len({line.index(" " + site.kind) for line, site in zip(lines, listed, strict=True)}) == 1


def test_attention_over_frames_is_not_a_site() -> None:
    model = UNetMotionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    assert any("motion_modules" in name and name.endswith("attn2") for name, _ in model.named_modules())
    assert not any("motion_modules" in site.name for site in tgate_fx.sites(model))


def test_blocks_without_self_attention_have_two_sites() -> None:
    """`only_cross_attention`, as in the Stable Diffusion upscaler."""
    names = [site.name for site in tgate_fx.sites(tiny.unet(only_cross_attention=(True, False)))]
    assert any(name.startswith("down_blocks.0") and name.endswith("attn1") for name in names)
    assert not any(name.startswith("mid_block") and name.endswith("attn1") for name in names)


def test_a_model_without_cross_attention_is_refused() -> None:
    model = UNet2DModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    for function in (tgate_fx.split, tgate_fx.sites):
        with pytest.raises(
            tgate_fx.UnsupportedError, match=r"UNet2DModel has no cross-attention.*use the pipeline as it"
        ):
            function(model)
    assert not [name for module in model.modules() for name in vars(module) if name in ("forward", "_tgate_dispatch")]


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(tgate_fx.UnsupportedError, match="split was given a str: expected a denoiser"):
        tgate_fx.split("unet")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_cache_of_another_length_is_refused() -> None:
    denoiser, inputs = unet()
    pre, post = tgate_fx.split(denoiser)
    _, cache = pre(**inputs)
    with pytest.raises(tgate_fx.ArgumentError, match="holds 3 tensors: expected the 4"):
        post(cache[:3], **inputs)


@torch.no_grad()
def test_a_cross_attention_without_text_is_refused() -> None:
    denoiser, inputs = unet()
    pre, _ = tgate_fx.split(denoiser)
    with pytest.raises(tgate_fx.UnsupportedError, match="was given no text to attend to"):
        pre(inputs["sample"], inputs["timestep"], None)


@torch.no_grad()
def test_a_site_that_returns_no_tensor_is_refused() -> None:
    denoiser, inputs = unet()
    attention = denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.forward = lambda *args, **kwargs: (args[0], None)
    pre, _ = tgate_fx.split(denoiser)
    with pytest.raises(tgate_fx.UnsupportedError, match=r"mid_block.*attn2 returned tuple: expected one tensor"):
        pre(**inputs)


@torch.no_grad()
def test_a_site_that_runs_twice_is_refused() -> None:
    denoiser, inputs = unet()
    block = denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    plain = block.forward
    block.forward = lambda *args, **kwargs: plain(plain(*args, **kwargs), *args[1:], **kwargs)
    pre, _ = tgate_fx.split(denoiser)
    with pytest.raises(tgate_fx.UnsupportedError, match="ran more than once in one call"):
        pre(**inputs)


def test_phases_of_a_split_may_run_in_several_threads() -> None:
    denoiser, inputs = unet()
    with torch.no_grad():
        pre, post = tgate_fx.split(denoiser)
        output, cache = pre(**inputs, return_dict=False)
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            for call in range(20):
                got = (
                    post(cache, **inputs, return_dict=False)[0] if call % 2 else pre(**inputs, return_dict=False)[0][0]
                )
                if not torch.equal(got, output[0]):
                    wrong.append(call)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        keys = self.to_k(encoder_hidden_states)
        return torch.softmax(self.to_q(hidden_states) @ keys.transpose(1, 2), -1) @ keys


class Block(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.attn2, self.in_place = Attention(), in_place

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = self.attn2(x, encoder_hidden_states=text)
        return attended.add_(x) if self.in_place else attended + x


class Denoiser(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(in_place) for _ in range(2)])

    def forward(self, x: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        return x


@torch.no_grad()
def test_a_model_may_write_to_what_its_cross_attention_gave() -> None:
    writes, plain = Denoiser(True), Denoiser(False)
    writes.load_state_dict(plain.state_dict())
    latents, later, text = noise(1, 4, 8), noise(1, 4, 8, seed=2), noise(1, 3, 8, seed=3)
    pairs = [tgate_fx.split(each) for each in (writes, plain)]
    caches = [pre(latents, encoder_hidden_states=text)[1] for pre, _ in pairs]
    assert all(map(torch.equal, *caches))
    for _ in range(3):
        outputs = [
            post(cache, later, encoder_hidden_states=text) for (_, post), cache in zip(pairs, caches, strict=True)
        ]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("how", ["gate", "compile"])
def test_a_hook_may_write_to_what_a_site_gave(how: str) -> None:
    def halves(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 0.5

    def halves_in_place(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        output.mul_(0.5)

    results = []
    for hook in (halves, halves_in_place):
        pipe = tiny.make("sd-small")
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                module.register_forward_hook(hook)
        tgate_fx.gate(pipe, 2) if how == "gate" else tgate_fx.compile(pipe, 2, backend="aot_eager")
        results.append(tiny.latents(pipe, **tiny.inputs("sd-small"), num_inference_steps=6))
    assert relative_error(results[1], results[0]) < 1e-5
