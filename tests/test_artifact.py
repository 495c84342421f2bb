"""`tgate_fx.save` and `tgate_fx.load`: phases that were compiled ahead of time, and everything they must fit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import operator
import os
import random
import shutil
import subprocess
import sys
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_compile import relative_error
from tests.test_frozen_weights import Scaled
from tests.test_refusals import says
from tests.zoo import entry_of
from tgate_fx.artifact import fingerprint, packaged, weights_file
from tgate_fx.artifact import manifest as manifest_module
from tgate_fx.artifact import save as save_module
from tgate_fx.artifact.contents import check
from tgate_fx.artifact.packaged import weights_of
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.gated import Gated
from tgate_fx.schedule import Schedule

SIZE = {"height": 16, "width": 16}


def made() -> Any:
    return tiny.sd(**tiny.ONE_BLOCK)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is saved of a tiny Stable Diffusion pipeline, once for all tests."""
    torch.set_num_threads(1)
    pipe = tgate_fx.compile(made(), gate_step=3)
    configuration = torch._inductor.config.get_config_copy()
    path = tgate_fx.save(pipe, tmp_path_factory.mktemp("artifacts") / "sd", **SIZE)
    assert torch._inductor.config.get_config_copy() == configuration
    assert sorted(file.name for file in path.iterdir()) == ["0.pt2", "1.pt2", "constants.bin", "manifest.json"]
    return path


@pytest.mark.slow
@pytest.mark.inductor
def test_it_generates_as_the_eager_pipeline_without_compiling(artifact: Path) -> None:
    pipe = tgate_fx.load(made(), artifact)
    eager = tgate_fx.gate(made(), gate_step=3)
    for steps, extra in ((6, {}), (9, {"gate_step": 5, "guidance_scale": 3.0}), (5, {"seed": 2})):
        kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": steps, **extra}
        with torch.compiler.set_stance("fail_on_recompile"):
            got = tiny.latents(pipe, **kwargs)
        assert relative_error(got, tiny.latents(eager, **kwargs)) < 1e-4
    assert len(tgate_fx.warmup(pipe, **SIZE).steps) == 2
    with pytest.raises(tgate_fx.StateError, match=says("was loaded from an artifact", "Copy the artifact")):
        tgate_fx.save(pipe, artifact.with_name("again"))
    tiny.latents(pipe, **kwargs)
    report = tgate_fx.report(pipe)
    assert report.compiled_graphs == 0
    assert report.gate == 3
    assert report.compiler == "compiled ahead of time"
    tgate_fx.restore(pipe)
    plain = made()
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 4}
    assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(plain, **kwargs))


@pytest.mark.slow
@pytest.mark.inductor
def test_packages_keep_the_weights_that_they_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps tensors of its own over the same memory, which do not keep that."""
    mapped: list[weakref.ref[torch.Tensor]] = []
    read = weights_file.mapped

    def recorded(path: Path, phases: list[dict[str, weights_file.Entry]]) -> list[dict[str, torch.Tensor]]:
        held = read(path, phases)
        mapped.extend(weakref.ref(tensor) for weights in held for tensor in weights.values())
        return held

    monkeypatch.setattr(weights_file, "mapped", recorded)
    pipe = tgate_fx.load(made(), artifact)
    gc.collect()
    assert len(mapped) > 100
    assert all(tensor() is not None for tensor in mapped)
    tgate_fx.restore(pipe)


@pytest.mark.slow
@pytest.mark.inductor
def test_it_generates_in_another_process_that_compiles_nothing(artifact: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch; torch.set_num_threads(1); import tgate_fx; from tests import tiny\n"
        "from tests.test_artifact import made\n"
        "pipe = tgate_fx.load(made(), sys.argv[1])\n"
        "kwargs = {**tiny.inputs('sd'), 'height': 16, 'width': 16, 'num_inference_steps': 5}\n"
        "print(tiny.latents(pipe, **kwargs).double().sum().item())\n"
    )
    command = [sys.executable, "-c", program, str(artifact)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not list(tmp_path.rglob("*.so"))  # not even torch's programs that try out the processor
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    expected = tiny.latents(tgate_fx.load(made(), artifact), **kwargs).double().sum().item()
    assert float(result.stdout) == expected


def test_packages_are_compiled_for_dense_latents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A channels-last VAE gives others, and a package does not look at how its inputs are laid out."""

    class EnoughError(Exception):
        pass

    def traced(_: Any, example: Any) -> Any:
        layouts.append(example.inputs["sample"].is_contiguous())
        raise EnoughError

    monkeypatch.setattr(save_module, "trace", traced)
    layouts: list[bool] = []
    pipe = StableDiffusionImg2ImgPipeline(**made().components, requires_safety_checker=False)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    tgate_fx.compile(pipe, 2)
    with pytest.raises(EnoughError):
        tgate_fx.save(pipe, tmp_path / "artifact", prompt="a cat", image=torch.rand(1, 3, 16, 16), strength=1.0)
    example = Gated.of(pipe).runs[0].examples["pre-gate"]  # type: ignore[union-attr]
    assert not example.inputs["sample"].is_contiguous()
    assert layouts == [True]


def test_packages_are_given_what_they_were_compiled_for() -> None:
    """Inputs are dense, on one device and at addresses of 16 bytes, as zeros in their place were."""
    second = torch.arange(9.0)[1:]
    last = torch.rand(1, 4, 8, 8).to(memory_format=torch.channels_last)
    assert second.data_ptr() % 16
    for given in (second, last):
        got = packaged._as_compiled(given, torch.device("cpu"))
        assert torch.equal(got, given)
        assert got.is_contiguous()
        assert got.data_ptr() % 16 == 0
    assert packaged._as_compiled(second, torch.device("meta")).is_meta
    dense = torch.rand(8)
    assert packaged._as_compiled(dense, torch.device("cpu")) is dense


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning")  # by torch itself
def test_packages_without_freezing_read_the_pipelines_own_weights(tmp_path: Path) -> None:
    """And hold those that no module lists, such as a processor's, which may not change."""

    def scaled(value: float) -> Any:
        pipe, processor = made(), Scaled()
        processor.layer.requires_grad_(False).weight.fill_(value)
        pipe.unet.set_attn_processor(processor)
        return pipe

    pipe = tgate_fx.compile(scaled(2.0), gate_step=3, options={"freezing": False})
    path = tgate_fx.save(pipe, tmp_path / "unfrozen", **SIZE)
    with pytest.raises(tgate_fx.StateError, match=says("does not fit the denoiser's structure", "attn1")):
        tgate_fx.load(scaled(3.0), path)
    pipe, eager = tgate_fx.load(scaled(2.0), path), tgate_fx.gate(scaled(2.0), gate_step=3)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 6}
    for change in (lambda weight: weight, lambda weight: weight.mul_(1.5), lambda weight: weight.clone() * 0.5):
        for each in (pipe, eager):
            conv = each.unet.conv_in
            conv.weight = nn.Parameter(change(conv.weight.detach()), requires_grad=False)
        assert relative_error(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs)) < 1e-4
    weight = next(iter(pipe.unet.attn_processors.values())).layer.weight
    weight.data.fill_(3.0)
    with pytest.raises(tgate_fx.StateError, match=says("attn1 changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs)
    weight.data.fill_(2.0)
    pipe.unet.to(memory_format=torch.channels_last)  # compiled code goes by the strides that weights had
    with pytest.raises(tgate_fx.StateError, match=says("conv_in", "changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs)
    assert json.loads((path / "manifest.json").read_text())["contents"]["weights"] is None


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning")  # by torch itself
@pytest.mark.parametrize(
    ("family", "settings", "phases"),
    [
        ("sd-small", {"gate_step": None, "deepcache": tgate_fx.DeepCache(interval=2, branch=0, order=1)}, 2),
    ],
)
def test_other_pipelines_and_schedules(family: str, settings: dict[str, Any], phases: int, tmp_path: Path) -> None:
    kwargs = {**tiny.inputs(family), "num_inference_steps": 6}
    inputs = {name: value for name, value in kwargs.items() if name != "num_inference_steps"}
    pipe = tgate_fx.compile(tiny.make(family), **settings)
    path = tgate_fx.save(pipe, tmp_path / "artifact", **inputs)
    pipe, eager = tgate_fx.load(tiny.make(family), path), tgate_fx.gate(tiny.make(family), **settings)
    with torch.compiler.set_stance("fail_on_recompile"):
        got = tiny.latents(pipe, **kwargs)
    assert relative_error(got, tiny.latents(eager, **kwargs)) < 1e-4
    assert len({step.phase for step in tgate_fx.report(pipe).steps}) == phases


def other_weights(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].proj_in.weight[0, 0] += 1e-3


def other_processor(pipe: Any) -> None:
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())


def hooked(pipe: Any) -> None:
    pipe.unet.conv_in.register_forward_hook(lambda *_: None)


def with_another_forward(pipe: Any) -> None:
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    own = attention.forward
    attention.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def with_anothers_forward(pipe: Any) -> None:
    first, second = [getattr(pipe.unet, f"{part}_blocks")[0].resnets[0] for part in ("down", "up")]
    second.forward = first.forward


def with_free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def forwards(pipe: Any) -> dict[str, Any]:
    return {name: vars(module)["forward"] for name, module in pipe.unet.named_modules() if "forward" in vars(module)}


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_weights, "mid_block.attentions.0.proj_in.weight"),
        (other_processor, "mid_block.attentions.0.transformer_blocks.0.attn1"),
        (hooked, "conv_in"),
        (with_another_forward, "mid_block.attentions.0.transformer_blocks.0.attn2"),
        (with_anothers_forward, "up_blocks.0.resnets.0"),
        (with_free_u, "up_blocks.0"),
        (lambda pipe: pipe.unet.to(torch.bfloat16), "conv_in"),
        (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), "conv_in"),
    ],
)
def test_a_pipeline_that_is_another_is_refused(change: Callable[[Any], None], message: str, artifact: Path) -> None:
    pipe = made()
    change(pipe)
    own = forwards(pipe)
    with pytest.raises(tgate_fx.StateError, match=says("does not fit", "expected the same")) as error:
        tgate_fx.load(pipe, artifact)
    assert message in str(error.value)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert forwards(pipe) == own


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    """Where they rest is not where a package would run."""
    pipe = tgate_fx.compile(made(), 2)
    accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("accelerate", "pipe.unet", "without offloading")):
        tgate_fx.save(pipe, tmp_path / "artifact", **SIZE)
    accelerate.hooks.remove_hook_from_module(pipe.unet)
    accelerate.dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pipe.unet", "device map", "pipe.reset_device_map()")):
        tgate_fx.save(pipe, tmp_path / "artifact", **SIZE)
    assert not (tmp_path / "artifact").exists()


def test_where_an_artifact_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tgate_fx.compile(made(), 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    paths = {"file": "already exists", "link": "already exists", "file/artifact": "cannot be written"}
    for name, message in (*paths.items(), ("x" * 300, "cannot be written")):
        with pytest.raises(tgate_fx.ArgumentError, match=message):
            tgate_fx.save(pipe, tmp_path / name, **SIZE)
    for path in (None, 5, "a\0b"):
        with pytest.raises(tgate_fx.ArgumentError, match="is no path"):
            tgate_fx.save(pipe, path, **SIZE)  # type: ignore[arg-type]

    def saved_by_another(*_: Any) -> dict[str, Any]:
        (tmp_path / "new" / "full").mkdir(parents=True)
        return {"phases": []}

    monkeypatch.setattr(save_module, "_packages", saved_by_another)
    with pytest.raises(tgate_fx.ArgumentError, match=says("cannot be written", "nobody else saves")):
        tgate_fx.save(pipe, tmp_path / "new", **SIZE)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "link", "new"]


def test_nothing_is_saved_under_autocast(tmp_path: Path) -> None:
    pipe = tgate_fx.compile(made(), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(tgate_fx.StateError, match="autocast is on"):
        tgate_fx.save(pipe, tmp_path / "artifact", **SIZE)


@pytest.mark.slow
@pytest.mark.inductor
def test_packages_do_not_run_under_autocast(artifact: Path) -> None:
    pipe = tgate_fx.load(made(), artifact)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    expected = tiny.latents(pipe, **kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(tgate_fx.StateError, match="autocast is on"):
        tiny.latents(pipe, **kwargs)
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)


def test_different_forwards_beneath_a_site_are_told_apart() -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    pipes = [made(), made(), made()]
    with_another_forward(pipes[0])
    with_another_forward(pipes[1])
    pipes[2].unet.get_submodule(name).forward = forwards
    first, same, other = [fingerprint.structure(tgate_fx.gate(pipe, gate_step=2).unet) for pipe in pipes]
    assert fingerprint.differences(first, same) == []
    assert fingerprint.differences(first, other) == [name]


@pytest.mark.slow
@pytest.mark.inductor
def test_changes_after_loading_are_noticed(artifact: Path) -> None:
    pipe = tgate_fx.load(made(), artifact)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    before = tiny.latents(pipe, **kwargs)
    weight = pipe.unet.conv_in.weight
    kept = weight.detach().clone()
    weight.data.mul_(2)
    with pytest.raises(tgate_fx.StateError, match=says("weights changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs)
    weight.data.copy_(kept)

    def write(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        weight.data.mul_(2)
        return values

    with pytest.raises(tgate_fx.StateError, match=says("weights changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs, callback_on_step_end=write)
    weight.data.copy_(kept)
    processor = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    other_processor(pipe)
    with pytest.raises(tgate_fx.StateError, match=says("attn1 changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)

    def change(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 2:
            with_free_u(pipeline)
        return values

    with pytest.raises(tgate_fx.StateError, match=says("changed after the artifact was loaded")):
        tiny.latents(pipe, **kwargs, callback_on_step_end=change)
    pipe.disable_freeu()
    torch.set_num_threads(2)
    try:
        with pytest.raises(tgate_fx.StateError, match=says("torch has 2 threads: expected 1", "set_num_threads(1)")):
            tiny.latents(pipe, **kwargs)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(tiny.latents(pipe, **kwargs), before)
    fresh = tgate_fx.load(made(), artifact)
    assert torch.equal(tiny.latents(fresh, **kwargs), before)


@pytest.mark.slow
@pytest.mark.inductor
def test_another_pipeline_may_gate_the_same_denoiser(artifact: Path) -> None:
    pipe = tgate_fx.load(made(), artifact)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    before = tiny.latents(pipe, **kwargs)
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    tgate_fx.gate(other, gate_step=2, deepcache=tgate_fx.DeepCache(2))
    tiny.latents(other, **kwargs)
    assert torch.equal(tiny.latents(pipe, **kwargs), before)
    tgate_fx.restore(other)
    assert torch.equal(tiny.latents(pipe, **kwargs), before)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 24}, "sample as float32[2, 4, 12, 8] on cpu: expected float32[2, 4, 8, 8]"),
        ({"prompt": ["a cat", "a dog"]}, "expected"),
        ({"guidance_scale": 1.0}, "expected"),
        ({"sp_interval": 2}, "has no pre-gate"),
    ],
)
def test_what_was_not_compiled_is_refused(call: dict[str, Any], message: str, artifact: Path) -> None:
    pipe = tgate_fx.load(made(), artifact)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    with pytest.raises(tgate_fx.StateError) as error:
        tiny.latents(pipe, **{**kwargs, **call})
    assert message in str(error.value)
    tiny.latents(pipe, **kwargs)


def change_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest["contents"])
        manifest["digest"] = manifest_module._digest(manifest["contents"])
        (path / "manifest.json").write_text(json.dumps(manifest))

    return damage


def in_text(old: str, new: str) -> Callable[[Path], None]:
    """Write something else into the manifest."""

    def damage(path: Path) -> None:
        text = (path / "manifest.json").read_text()
        assert old in text
        (path / "manifest.json").write_text(text.replace(old, new))

    return damage


def replace_package(path: Path) -> None:
    """Put something that is no package in the place of one."""
    package = path / "0.pt2"
    with zipfile.ZipFile(package, "w") as file:
        file.writestr("0/version", "0")
    change_manifest(lambda said: said["phases"][0].update(file=manifest_module.describe_file(package)))(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: truncate(path / "0.pt2"), "0.pt2 is"),
        (lambda path: flip(path / "1.pt2"), "and not as it was written"),
        (lambda path: (path / "1.pt2").unlink(), "1.pt2 is missing"),
        (lambda path: truncate(path / "manifest.json"), "No complete artifact"),
        (lambda path: (path / "manifest.json").unlink(), "No complete artifact"),
        (in_text('"format": 12', '"format": 99'), "has format 99: expected 12"),
        (lambda path: truncate(path / "constants.bin"), "constants.bin is"),
        (lambda path: flip(path / "constants.bin"), "and not as it was written"),
        (in_text('"gate_step": 3', '"gate_step": 4'), "manifest.json is not as it was written"),
        (in_text('"contents"', '"content"'), "manifest.json is not as it was written"),
        (replace_package, "torch cannot load"),
        (change_manifest(lambda said: said.update(torch="1.0")), "does not fit this torch, whose version is"),
        (change_manifest(lambda said: said.update(diffusers="0.1")), "does not fit this diffusers, whose version is"),
        (change_manifest(lambda said: said["processor"].update(threads="64")), "threads is 1: expected 64"),
        (change_manifest(lambda said: said["processor"].update(capability="AVX9000")), "expected AVX9000"),
        (change_manifest(lambda said: said["processor"].update(device="cuda")), "device is cpu: expected cuda"),
        (change_manifest(lambda said: said["model"].update(in_channels="9")), "in_channels is 4: expected 9"),
    ],
)
def test_what_is_damaged_or_from_elsewhere_is_refused(
    damage: Callable[[Path], None], message: str, artifact: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(artifact, copied)
    damage(copied)
    pipe = made()
    with pytest.raises(tgate_fx.StateError) as error:
        tgate_fx.load(pipe, copied)
    assert message in str(error.value)
    tgate_fx.gate(pipe)  # as usable as before


def test_weights_with_several_names_are_known_under_each() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].register_buffer("scale", torch.ones(1))
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "0.scale"]
    assert list(weights_of(model)) == [f"denoiser.{name}" for name in names]


def test_what_cannot_be_saved(tmp_path: Path, backend: CountingBackend) -> None:
    with pytest.raises(tgate_fx.StateError, match=says("not compiled", "tgate_fx.compile")):
        tgate_fx.save(tgate_fx.gate(made()), tmp_path / "new")
    for settings, what in (
        ({"backend": backend}, "backend="),
        ({"dynamic": True}, "dynamic=True and freezing"),
        ({"regional": True, "options": {"post_grad_custom_pre_pass": print}}, "options['post_grad_custom_pre_pass']"),
    ):
        pipe = tgate_fx.compile(made(), **settings)
        with pytest.raises(tgate_fx.UnsupportedError, match=says(what, "cannot be saved")):
            tgate_fx.save(pipe, tmp_path / "new")
    with pytest.raises(tgate_fx.ArgumentError, match=says("already exists", "expected a new directory")):
        tgate_fx.save(tgate_fx.compile(made()), tmp_path)
    assert not list(tmp_path.iterdir())


def mutated(value: Any, rng: random.Random) -> Any:
    """Something else in place of one value of a manifest."""
    others: list[Any] = [None, True, -1, 0, 1, 2**63, 1.5, "", "../x", [], {}, [0], {"a": 1}]
    if isinstance(value, int) and not isinstance(value, bool):
        others += [value + 1, value - 1, value * 2, value + 4096]
    if isinstance(value, str):
        others += [value[1:], value + "0", value.upper(), "/" + value]
    if isinstance(value, list):
        others += [value[:-1], [*value, 1], value[::-1]]
    return rng.choice([other for other in others if type(other) is not type(value) or other != value])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a manifest's contents."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [path, *[place for key, item in items for place in places(item, (*path, key))]]
        if path
        else [place for key, item in items for place in places(item, (key,))]
    )


@pytest.mark.slow
@pytest.mark.inductor
def test_no_change_of_a_manifest_does_harm(artifact: Path, tmp_path: Path) -> None:
    """300 changes, sealed again: each is refused, or gives the image of the schedule that the manifest then says."""
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    rng = random.Random(0)
    manifest = json.loads((artifact / "manifest.json").read_text())
    sections: dict[Any, list[tuple[Any, ...]]] = {}
    for place in places(manifest["contents"]):
        sections.setdefault(place[:3] if place[0] == "phases" else place[0], []).append(place)
    copied = tmp_path / "copied"
    shutil.copytree(artifact, copied)
    refused = 0
    for _ in range(300):
        changed = copy.deepcopy(manifest)
        *parents, last = rng.choice(sections[rng.choice(list(sections))])
        holder = changed["contents"]
        for key in parents:
            holder = holder[key]
        if rng.random() < 0.15 and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = mutated(holder[last], rng)
        changed["digest"] = manifest_module._digest(changed["contents"])
        (copied / "manifest.json").write_text(json.dumps(changed))
        pipe = made()
        try:
            tgate_fx.load(pipe, copied)
            got = tiny.latents(pipe, **kwargs)
        except tgate_fx.TGateError:
            refused += 1
            continue
        eager = tgate_fx.gate(made(), 3)
        eager._tgate.schedule = pipe._tgate.schedule
        assert relative_error(got, tiny.latents(eager, **kwargs)) < 1e-4, (parents, last, holder.get(last))
    assert refused > 200


@pytest.mark.slow
@pytest.mark.inductor
def test_an_artifact_can_be_pinned(artifact: Path, tmp_path: Path) -> None:
    digest = json.loads((artifact / "manifest.json").read_text())["digest"]
    tgate_fx.restore(tgate_fx.load(made(), artifact, digest=digest))
    with pytest.raises(tgate_fx.StateError, match=says("has the digest", "expected 00, which was given")):
        tgate_fx.load(made(), artifact, digest="00")
    copied = tmp_path / "copied"
    shutil.copytree(artifact, copied)
    forged = bytearray((copied / "constants.bin").read_bytes())
    forged[: 8 * 1021 * 2] = b"\0" * (8 * 1021 * 2)
    (copied / "constants.bin").write_bytes(forged)
    checksum = manifest_module._file_checksum
    try:
        manifest_module._file_checksum = lambda path: checksum(artifact / path.name)
        with pytest.raises(tgate_fx.StateError, match=r"constants\.bin is .* not as it was written"):
            tgate_fx.load(made(), copied, digest=digest)
    finally:
        manifest_module._file_checksum = checksum


@pytest.mark.slow
@pytest.mark.inductor
def test_files_that_are_none_or_cannot_be_read(artifact: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(artifact, copied)
    for name, message in (("1.pt2", "1.pt2 is missing"), ("manifest.json", "No complete artifact")):
        (copied / name).unlink()
        os.mkfifo(copied / name)
        with pytest.raises(tgate_fx.StateError, match=message):
            tgate_fx.load(made(), copied)
        (copied / name).unlink()
        shutil.copy(artifact / name, copied / name)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may read everything: the refusal is the system's."""
    file = tmp_path / "0.pt2"
    file.write_bytes(bytes(100))
    described = manifest_module.describe_file(file)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(manifest_module, "_file_checksum", refuse)
    with pytest.raises(tgate_fx.StateError, match=says("0.pt2 cannot be read", "Permission denied", "permissions")):
        manifest_module.check_file(file, described, by_sha256=False)


GENERATE_FROM_CACHES = """
import sys, torch
torch.set_num_threads(1)
import tgate_fx
from tests import tiny
from tests.test_artifact import SIZE, made
from torch._dynamo.utils import counters

pipe = tgate_fx.load(made(), sys.argv[1])
latents = tiny.latents(pipe, **{**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5})
found = counters["inductor"]
print(latents.double().sum().item(), found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
print(tgate_fx.report(pipe).compiler)
"""


@pytest.mark.slow
@pytest.mark.inductor
def test_where_phases_cannot_be_packages_torchs_caches_are_kept(tmp_path: Path) -> None:
    pipe = tgate_fx.compile(made(), gate_step=3, cache_weight=1.0, regional=True)
    kwargs = {**tiny.inputs("sd"), **SIZE, "num_inference_steps": 5}
    expected = tiny.latents(pipe, **kwargs)
    path = tgate_fx.save(pipe, tmp_path / "artifact", **SIZE)
    assert sorted(file.name for file in path.iterdir()) == ["caches.bin", "manifest.json"]
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    graphs = tgate_fx.report(pipe).compiled_graphs

    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-c", GENERATE_FROM_CACHES, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    numbers, compiler = result.stdout.splitlines()
    total, hits, misses = map(float, numbers.split())
    assert total == pytest.approx(expected.double().sum().item(), rel=1e-5)
    assert (hits, misses) == (graphs, 0)
    assert compiler == "torch.compile (inductor, regional)"

    loaded = tgate_fx.load(made(), path)
    assert relative_error(tiny.latents(loaded, **kwargs), expected) < 1e-5
    assert tgate_fx.report(loaded).gate == 3
    tgate_fx.restore(loaded)
    plain = made()
    other_processor(plain)
    with pytest.raises(tgate_fx.StateError, match=says("does not fit the denoiser's structure", "Load it on")):
        tgate_fx.load(plain, path)
    tgate_fx.gate(plain, 3)  # it was left as it was
    with torch._inductor.config.patch(fx_graph_cache=False):
        with pytest.raises(tgate_fx.StateError, match=says("took nothing of", "caches that are on")):
            tgate_fx.load(made(), path)
        with pytest.raises(tgate_fx.UnsupportedError, match=says("torch has cached nothing", "to be on")):
            tgate_fx.save(pipe, tmp_path / "another", **SIZE)
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
    flip(path / "caches.bin")
    with pytest.raises(tgate_fx.StateError, match=says("caches.bin", "not as it was written")):
        tgate_fx.load(made(), path)
    (path / "caches.bin").write_bytes(b"")
    with pytest.raises(tgate_fx.StateError, match=says("caches.bin", "not as it was written")):
        tgate_fx.load(made(), path)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.*:FutureWarning")  # by torch itself
def test_a_video(tmp_path: Path) -> None:
    """Its pipeline leaves a registry of hooks on the denoiser, and guides in separate calls."""
    entry = entry_of("WanPipeline")
    call = entry.inputs()
    for name in ("num_inference_steps", "generator", "output_type"):
        del call[name]
    path = tgate_fx.save(tgate_fx.compile(entry.make(), gate_step=2), tmp_path / "artifact", **call)
    expected = entry.run(tgate_fx.gate(entry.make(), gate_step=2))
    pipe = tgate_fx.load(entry.make(), path)
    for _ in range(2):
        assert relative_error(entry.run(pipe), expected) < 1e-4
    assert tgate_fx.report(pipe).compiled_graphs == 0


@pytest.mark.slow
@pytest.mark.inductor
def test_caches_of_two_denoisers(tmp_path: Path) -> None:
    entry = entry_of("WanPipeline 2.2 14B")
    call = {name: value for name, value in entry.inputs().items() if name not in ("num_inference_steps", "generator")}
    del call["output_type"]
    pipe = tgate_fx.compile(entry.make(), gate_step=2, regional=True)
    path = tgate_fx.save(pipe, tmp_path / "artifact", **call)
    expected = entry.run(pipe)
    assert relative_error(entry.run(tgate_fx.load(entry.make(), path)), expected) < 1e-5
    plain = entry.make()
    plain.transformer_2.blocks[0].attn2.scale = 1.0
    with pytest.raises(tgate_fx.StateError, match=says("structure: transformer_2.blocks.0.attn2 changed")):
        tgate_fx.load(plain, path)


def test_packages_are_of_one_denoiser(tmp_path: Path) -> None:
    entry = entry_of("WanPipeline 2.2 14B")
    pipe = tgate_fx.compile(entry.make(), gate_step=2)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("transformer and transformer_2", "regional=True")):
        tgate_fx.save(pipe, tmp_path / "artifact", prompt="a cat")
    assert not list(tmp_path.iterdir())


def of_caches() -> dict[str, Any]:
    """What a manifest says where caches are kept."""
    return {
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "processor": {},
        "model": {},
        "structure": {},
        "weights": None,
        "schedule": dataclasses.asdict(Schedule(3)),
        "deepcache": None,
        "gate_companions": True,
        "phases": [],
        "weights_file": None,
        "caches": {
            "settings": {"mode": "reduce-overhead", "dynamic": None, "options": None, "regional": False},
            "file": {"bytes": 8, "checksum": "1f-", "sha256": "0" * 64},
        },
    }


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("caches",), None),
        (("caches",), []),
        (("caches", "file"), None),
        (("caches", "file", "sha256"), "0"),
        (("caches", "settings"), {}),
        (("caches", "settings", "mode"), 1),
        (("caches", "settings", "options"), {}),  # beside a mode
        (("caches", "settings", "dynamic"), "yes"),
        (("caches", "settings", "regional"), None),
        (("caches", "settings", "backend"), "eager"),
        (("weights_file",), {"bytes": 8, "checksum": "1f-", "sha256": "0" * 64}),
        (("phases",), [{}]),
    ],
)
def test_what_a_manifest_of_caches_may_say(place: tuple[str, ...], value: Any) -> None:
    contents = of_caches()
    check(Path("manifest.json"), contents)
    *parents, last = place
    functools.reduce(operator.getitem, parents, contents)[last] = value
    with pytest.raises(tgate_fx.StateError, match=says("manifest.json has", "as tgate_fx.save writes it")):
        check(Path("manifest.json"), contents)


def test_what_is_kept_of_each_setting() -> None:
    """Packages, or torch's caches for what is recorded or made when it runs."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert CompileSettings().ahead_of_time(cpu) == {"freezing": True}
    assert CompileSettings().ahead_of_time(cuda) == {}
    assert CompileSettings(mode="reduce-overhead").ahead_of_time(cpu) is not None
    assert CompileSettings(mode="reduce-overhead").ahead_of_time(cuda) is None
    assert CompileSettings(dynamic=True).ahead_of_time(cuda) is None
    assert CompileSettings(regional=True).ahead_of_time(cpu) is None
