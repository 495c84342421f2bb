"""What gating leaves behind: nothing, on the pipeline, its class, its siblings, or under hooks."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import tgate_fx
from tests import reference, tiny
from tgate_fx.gated_class import gate_of


def snapshot(pipe: Any) -> dict[str, Any]:
    denoiser = tiny.denoiser(pipe)
    return {
        "class": type(pipe),
        "attributes": dict(vars(pipe)),
        "call": inspect.signature(pipe.__call__),
        "modules": [(name, set(vars(module))) for name, module in denoiser.named_modules()],
        "forward": inspect.signature(denoiser.forward),
        "pointers": {name: value.data_ptr() for name, value in denoiser.state_dict(keep_vars=True).items()},
    }


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *[(family, "gate") for family in ("sd", "sdxl", "pixart-alpha", "lcm")],
        *[(family, "compile") for family in ("sd-small", "pixart-alpha")],
    ],
)
def test_restore_gives_back_the_untouched_pipeline(family: str, how: str) -> None:
    pipe = tiny.make(family)
    kwargs = {**tiny.inputs(family), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    before = snapshot(pipe)
    assert getattr(tgate_fx, how)(pipe, gate_step=2, **({"backend": "eager"} if how == "compile" else {})) is pipe
    tiny.latents(pipe, **kwargs)
    tgate_fx.restore(pipe)
    assert snapshot(pipe) == before
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_state_dict_and_names_stay_while_gated() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    names = [name for name, _ in pipe.unet.named_modules()]
    processors = dict(pipe.unet.attn_processors)
    tgate_fx.gate(pipe)
    after = snapshot(pipe)
    assert after["pointers"] == before["pointers"]
    assert after["forward"] == before["forward"]
    assert [name for name, _ in pipe.unet.named_modules()] == names
    assert pipe.unet.attn_processors == processors


def test_a_gated_pipeline_is_still_of_its_class() -> None:
    pipe = tgate_fx.gate(tiny.sd())
    cls = diffusers.StableDiffusionPipeline
    assert isinstance(pipe, cls)
    assert (type(pipe).__name__, type(pipe).__module__) == (cls.__name__, cls.__module__)
    assert type(pipe).__doc__ == cls.__doc__
    assert "gate_step" not in inspect.signature(cls.__call__).parameters
    gated = inspect.signature(pipe.__call__).parameters
    added = {"gate_step", "sp_interval", "fi_interval", "warm_up", "after_gate", "cache_weight", "forecast", "guidance"}
    assert set(gated) == {*inspect.signature(tiny.sd().__call__).parameters, *added, "full_steps"}
    assert gated["gate_step"].kind is inspect.Parameter.KEYWORD_ONLY
    assert set(pipe.components) == set(tiny.sd().components)


def test_save_pretrained_saves_the_plain_pipeline(tmp_path: Any) -> None:
    pipe = tiny.sd()
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 3}
    expected = tiny.latents(pipe, **kwargs)
    tgate_fx.gate(pipe, 2).save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is diffusers.StableDiffusionPipeline
    assert torch.equal(tiny.latents(loaded, **kwargs), expected)


@pytest.mark.parametrize("through", ["class", "auto", "components", "own class"])
def test_a_sibling_that_shares_the_denoiser_stays_ungated(through: str) -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=2)
    if through == "class":
        sibling = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    elif through == "auto":
        sibling = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    elif through == "components":
        sibling = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    else:
        sibling = type(pipe).from_pipe(pipe)
    family = "sd" if through == "own class" else "sd-img2img"
    sibling.set_progress_bar_config(disable=True)
    assert sibling.unet is pipe.unet
    kwargs = {**tiny.inputs(family), "num_inference_steps": 6}
    plain = tiny.latents(tiny.make(family), **kwargs)
    assert torch.equal(tiny.latents(sibling, **kwargs), plain)

    own = {**tiny.inputs("sd"), "num_inference_steps": 6}
    gated = tiny.latents(reference.gate(tiny.sd(), 2, guided=True), **own)
    assert torch.equal(tiny.latents(pipe, **own), gated)
    with pytest.raises(tgate_fx.StateError, match="not gated"):
        tgate_fx.report(sibling)
    tgate_fx.gate(sibling, gate_step=1)
    expected = tiny.latents(reference.gate(tiny.make(family), 1, guided=True), **kwargs)
    assert torch.equal(tiny.latents(sibling, **kwargs), expected)
    assert torch.equal(tiny.latents(pipe, **own), gated)
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(sibling, **kwargs), expected)
    tgate_fx.restore(sibling)
    assert torch.equal(tiny.latents(sibling, **kwargs), plain)
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("how", ["gate", "regional"])
def test_a_gated_pipeline_that_is_dropped_keeps_nothing_of_a_shared_denoiser(how: str) -> None:
    """Such as one for each request, over the components of one that stays."""
    base = tiny.make("sd-small")
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    plain = tiny.latents(base, **kwargs)
    gates = []
    for _ in range(3):
        pipe = type(base)(**base.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        tgate_fx.gate(pipe, 2) if how == "gate" else tgate_fx.compile(pipe, 2, regional=True, backend="eager")
        gated = tiny.latents(pipe, **kwargs)
        gates.append(weakref.ref(gate_of(pipe)))
        del pipe
        gc.collect()
    assert [each() for each in gates] == [None] * 3
    assert torch.equal(tiny.latents(base, **kwargs), plain)
    pipe = tgate_fx.gate(base, 2)
    assert torch.equal(tiny.latents(pipe, **kwargs), gated)
    tgate_fx.restore(pipe)
    other = type(base)(**base.components, requires_safety_checker=False)
    tgate_fx.gate(other, 2)
    with pytest.raises(tgate_fx.StateError, match="belongs to a gated pipeline"):
        tgate_fx.restore(base.unet)
    del other
    gc.collect()
    tgate_fx.restore(base.unet)
    assert "forward" not in vars(base.unet)
    assert torch.equal(tiny.latents(base, **kwargs), plain)


def test_the_pipeline_class_is_never_changed() -> None:
    cls = diffusers.StableDiffusionPipeline
    before = dict(vars(cls))
    other = tiny.sd()
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    expected = tiny.latents(other, **kwargs)
    pipe = tgate_fx.gate(tiny.sd(), 2)
    tiny.latents(pipe, **kwargs)
    assert dict(vars(cls)) == before
    assert torch.equal(tiny.latents(other, **kwargs), expected)


class Noting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("order", ["hook first", "gate first"])
def test_accelerates_hooks_may_come_and_go(order: str) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    pipe = tiny.sd()
    plain = tiny.latents(pipe, **kwargs)
    gated = tiny.latents(reference.gate(tiny.sd(), 2, guided=True), **kwargs)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    hooks = [Noting(), Noting()]

    def hook() -> None:
        for module, noting in zip((pipe.unet, attention), hooks, strict=True):
            add_hook_to_module(module, noting)

    def unhook() -> None:
        for module in (pipe.unet, attention):
            remove_hook_from_module(module)

    if order == "hook first":
        hook()
        tgate_fx.gate(pipe, 2)
    else:
        tgate_fx.gate(pipe, 2)
        hook()
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, **kwargs), gated)
        unhook()
        assert torch.equal(tiny.latents(pipe, **kwargs), gated)
        hook()
    assert [noting.calls for noting in hooks] == [8, 8]
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **kwargs), plain)
    unhook()
    assert torch.equal(tiny.latents(pipe, **kwargs), plain)


def test_diffusers_hooks_may_come_later() -> None:
    """Layerwise casting wraps the forwards of single layers, through diffusers' own hook registry."""
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    pipe = tgate_fx.gate(tiny.sd(), 2)
    plain = reference.gate(tiny.sd(), 2, guided=True)
    for denoiser in (pipe.unet, plain.unet):
        denoiser.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    for _ in range(2):
        got = tiny.latents(pipe, **kwargs)
    assert torch.equal(got, tiny.latents(plain, **kwargs))


def test_a_deep_copy_of_the_denoiser_does_not_reach_back() -> None:
    pipe = tgate_fx.gate(tiny.sd(), 2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 3}
    expected = tiny.latents(tiny.sd(), **kwargs)
    other = tiny.sd(seed=5)
    other.unet = copy.deepcopy(pipe.unet)
    other.vae, other.text_encoder = pipe.vae, pipe.text_encoder
    for parameter in pipe.unet.parameters():
        parameter.data.zero_()
    assert torch.equal(tiny.latents(other, **kwargs), expected)


def test_copying_a_gated_pipeline_is_refused() -> None:
    pipe = tgate_fx.gate(tiny.sd(), 2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 3}
    expected = tiny.latents(pipe, **kwargs)
    with pytest.raises(tgate_fx.StateError, match=r"neither copied nor pickled.*expected a plain one.*from_pipe"):
        copy.deepcopy(pipe)
    with pytest.raises(tgate_fx.StateError, match="neither copied nor pickled"):
        copy.copy(pipe)
    with pytest.raises(tgate_fx.StateError, match="neither copied nor pickled"):
        pickle.dumps(pipe)
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    tgate_fx.restore(pipe)
    copy.deepcopy(pipe)


def test_a_gated_denoiser_is_saved_as_weights_only(tmp_path: Path) -> None:
    pipe = tgate_fx.gate(tiny.sd(), 2)
    with pytest.raises(tgate_fx.StateError, match=r"torch\.save.*expected a plain module.*restore.*save_pretrained"):
        torch.save(pipe.unet, tmp_path / "unet.pt")
    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert all(map(torch.equal, loaded.state_dict().values(), pipe.unet.state_dict().values()))
    twin = copy.deepcopy(pipe.unet)
    tgate_fx.restore(twin)
    assert not any("forward" in vars(module) for module in twin.modules())
    tgate_fx.restore(pipe)
    torch.save(pipe.unet, tmp_path / "unet.pt")


def test_a_copied_denoiser_in_another_pipeline_is_restored_whole() -> None:
    pipe, other = tgate_fx.gate(tiny.sd(), 2), tiny.sd()
    plain = [set(vars(module)) for module in other.unet.modules()]
    other.unet = copy.deepcopy(pipe.unet)
    tgate_fx.gate(other, 2)
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    assert torch.equal(tiny.latents(other, **kwargs), tiny.latents(pipe, **kwargs))
    with pytest.raises(tgate_fx.StateError, match="belongs to a gated pipeline"):
        tgate_fx.restore(other.unet)
    tgate_fx.restore(other)
    assert [set(vars(module)) for module in other.unet.modules()] == plain
    pickle.dumps(other.unet)


def test_what_a_call_may_override_is_in_its_signature_and_may_be_passed_on() -> None:
    pipe = tgate_fx.gate(tiny.sd(), 2)
    parameters = inspect.signature(pipe.__call__).parameters
    defaults = {name: parameters[name].default for name in ("gate_step", "sp_interval", "fi_interval", "warm_up")}
    assert {str(default) for default in defaults.values()} == {"<as gated>"}
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    assert torch.equal(tiny.latents(pipe, **kwargs, **defaults), tiny.latents(pipe, **kwargs))
    assert tgate_fx.report(pipe).gate == 2


@pytest.mark.parametrize("order", ["offload first", "gate first"])
def test_model_offloading_which_hooks_anew_after_every_generation(order: str) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 4}
    pipe = tiny.sd()
    if order == "offload first":
        pipe.enable_model_cpu_offload(device="cpu")
    tgate_fx.gate(pipe, 2)
    if order == "gate first":
        pipe.enable_model_cpu_offload(device="cpu")
    expected = tiny.latents(reference.gate(tiny.sd(), 2, guided=True), **kwargs)
    for _ in range(3):
        assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(tiny.sd(), **kwargs))
