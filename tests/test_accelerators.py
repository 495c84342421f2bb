"""What else makes a denoiser faster, or stands around it: composed with the gate where that is exact, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip

import tgate_fx
from tests import oracle, tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_refusals import says
from tests.zoo import seeded, wan

GATE = 2


def video(pipe: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**wan.inputs()).frames)


def config(name: str, **settings: Any) -> Any:
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)(**settings)


CACHES: dict[str, Callable[[Any], Any]] = {
    "pyramid_attention_broadcast": lambda pipe: config(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "faster_cache_denoiser": lambda pipe: config(
        "FasterCacheConfig",
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    ),
    "fbc_leader_block_hook": lambda pipe: config("FirstBlockCacheConfig", threshold=0.1),
    "mag_cache_leader_block_hook": lambda pipe: config("MagCacheConfig", num_inference_steps=4, calibrate=True),
    "sea_cache_root": lambda pipe: config("SeaCacheConfig"),
    "text_kv_cache_transformer": lambda pipe: config("TextKVCacheConfig"),
    "taylorseer_cache": lambda pipe: config(
        "TaylorSeerCacheConfig", cache_interval=2, cache_identifiers=[r"blocks\.0\.attn1"]
    ),
}


@pytest.mark.parametrize("hook", CACHES)
@pytest.mark.parametrize("put", [tgate_fx.gate, tgate_fx.compile])
def test_caches_of_diffusers_are_refused(hook: str, put: Any) -> None:
    pipe = wan.text_to_video()
    pipe.transformer.enable_cache(CACHES[hook](pipe))
    with pytest.raises(
        tgate_fx.UnsupportedError,
        match=says(hook, "is enabled on pipe.transformer", "expected no cache", "disable_cache"),
    ):
        put(pipe, GATE)
    assert type(pipe) is diffusers.WanPipeline
    pipe.transformer.disable_cache()
    tgate_fx.gate(pipe, GATE)
    assert torch.equal(video(pipe), video(tgate_fx.gate(wan.text_to_video(), GATE)))


def test_a_cache_that_is_enabled_later_is_refused_by_the_next_generation() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    pab = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("mid_block",),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.unet, pab)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pyramid_attention_broadcast", "mid_block", "attn1")):
        pipe(**kwargs)
    for module in pipe.unet.modules():
        HookRegistry.check_if_exists_or_initialize(module).remove_hook("pyramid_attention_broadcast", recurse=False)
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_skipped_layers_are_skipped_in_both_phases() -> None:
    """A hook that keeps nothing from step to step is none of the gate's business."""
    pipe = tiny.make("pixart-alpha")
    apply_layer_skip(pipe.transformer, LayerSkipConfig(indices=[0], skip_attention=False, skip_ff=True, fqn="auto"))
    kwargs = {**tiny.inputs("pixart-alpha"), "num_inference_steps": 4}
    plain = tiny.latents(tgate_fx.gate(tiny.make("pixart-alpha"), GATE), **kwargs)
    network = pixart_network(pipe.transformer, lambda: tiny.latents(pipe, **kwargs))
    expected = oracle.gated([network], lambda: tiny.latents(pipe, **kwargs), GATE, "batch", keep="negative")
    got = tiny.latents(tgate_fx.gate(pipe, GATE), **kwargs)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, plain) > 1e-4


def pixart_network(transformer: Any, generate: Callable[[], Any]) -> oracle.Network:
    sites = oracle.find_sites(transformer, generate, "hidden_states", ("encoder_hidden_states",))
    assert sites
    return oracle.Network(transformer, sites)


@pytest.mark.parametrize("put", [tgate_fx.gate, tgate_fx.compile])
def test_blocks_that_are_compiled_in_place_are_refused(put: Any) -> None:
    pipe = tiny.make("sd-small")
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].compile(fullgraph=True, backend="eager")
    with pytest.raises(
        tgate_fx.UnsupportedError,
        match=says("pipe.unet.mid_block.attentions.0.transformer_blocks.0 is compiled", "regional=True"),
    ):
        put(pipe, GATE)


def test_blocks_that_are_compiled_later_are_refused_by_the_next_generation() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), GATE)
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    block = pipe.unet.mid_block.attentions[0]
    pipe.unet.mid_block.attentions[0] = torch.compile(block, backend="eager")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pipe.unet.mid_block.attentions.0 is compiled")):
        pipe(**kwargs)
    pipe.unet.mid_block.attentions[0] = block
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def wrapped() -> Any:
    """PixArt with a LoRA by peft itself, whose wrapper then is the pipeline's transformer."""
    peft = pytest.importorskip("peft")
    pipe = tiny.make("pixart-alpha")
    settings = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False)
    pipe.transformer = seeded(lambda: peft.get_peft_model(pipe.transformer, settings))
    return pipe


@pytest.mark.slow
def test_a_denoiser_within_pefts_wrapper(backend: CountingBackend) -> None:
    pipe = wrapped()
    kwargs = {**tiny.inputs("pixart-alpha"), "num_inference_steps": 4}
    plain = tiny.latents(pipe, **kwargs)
    base = pipe.transformer.get_base_model()
    network = pixart_network(base, lambda: tiny.latents(pipe, **kwargs))
    expected = oracle.gated([network], lambda: tiny.latents(pipe, **kwargs), GATE, "batch", keep="negative")
    tgate_fx.gate(pipe, GATE)
    got = tiny.latents(pipe, **kwargs)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, plain) > 1e-4
    assert tgate_fx.report(pipe).gate == GATE
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **kwargs), plain)
    tgate_fx.compile(pipe, GATE, backend=backend)
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, **kwargs), got)
    assert len(backend.graphs) == 2


@pytest.mark.parametrize("before", [True, False])
def test_an_attention_backend_of_ones_own(before: bool, backend: CountingBackend) -> None:
    """Whether it was set before gating or after."""
    plain, pipe, compiled = (wan.text_to_video() for _ in range(3))
    expected = video(tgate_fx.gate(plain, 2))
    tgate_fx.restore(plain)
    for each in (plain, pipe, compiled):
        if before or each is plain:
            each.transformer.set_attention_backend("_native_math")
    tgate_fx.gate(plain, 2)
    tgate_fx.gate(pipe, 2)
    tgate_fx.compile(compiled, 2, backend=backend)
    if not before:
        for each in (pipe, compiled):
            each.transformer.set_attention_backend("_native_math")
    result = video(pipe)
    assert torch.equal(result, video(plain))
    assert relative_error(result, expected) < 1e-5
    assert relative_error(video(compiled), expected) < 1e-5
    chosen = {each.transformer.blocks[0].attn2.processor._attention_backend for each in (plain, pipe, compiled)}
    assert chosen == {"_native_math"}
    assert len(backend.graphs) == 2
