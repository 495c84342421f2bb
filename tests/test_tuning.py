"""`tgate_fx.tune` and `tgate-fx tune`: what is measured, what is recommended, and where it goes on."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image

import tgate_fx
from tests import tiny
from tests.conftest import run
from tests.test_refusals import says
from tests.zoo import entry_of, sana, wan
from tgate_fx.artifact.fingerprint import digest
from tgate_fx.tuning import measure
from tgate_fx.tuning.likeness import _WEIGHTS, likeness
from tgate_fx.tuning.result import Trial, Tuning
from tgate_fx.tuning.show import plot

pytest.importorskip("torchmetrics")

PROMPTS = ["a red cat", "two dogs"]
SETTINGS = [{"gate_step": 2, "cache_weight": 1.0}, {"gate_step": 4}, {"gate_step": 2, "forecast": 2}]


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


def test_likeness_is_what_numpy_says() -> None:
    one, other = pictures(0), (pictures(0) + 0.1 * pictures(1)).clamp(0, 1)
    found = likeness(one, other)
    error = ((one.numpy() - other.numpy()) ** 2).mean((1, 2, 3))
    assert found.psnr == pytest.approx(float((10 * np.log10(1 / error)).mean()), abs=1e-4)
    assert 0.5 < found.ssim < 1
    same = likeness(one, one)
    assert (same.psnr, same.ssim) == (pytest.approx(100), pytest.approx(1))
    assert likeness(one, pictures(2)).ssim < found.ssim


@pytest.mark.skipif(importlib.util.find_spec(_WEIGHTS) is None, reason="its weights are not installed")
def test_features_tell_more_from_less() -> None:
    one = pictures(0)
    near, far = (likeness(one, (one + share * pictures(1)).clamp(0, 1)).perceptual for share in (0.05, 0.5))
    assert likeness(one, one).perceptual == 0
    assert near is not None
    assert far is not None
    assert 0 < near < far


CALL: dict[str, Any] = {"height": 24, "width": 24, "num_inference_steps": 4, "settings": [{"gate_step": 2}]}


def other_weights(module: torch.nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "scheduler": lambda pipe: setattr(pipe, "scheduler", tiny.scheduler("EulerDiscrete")),
    "FreeU": lambda pipe: pipe.enable_freeu(0.5, 0.5, 1.8, 1.8),
    "VAE": lambda pipe: other_weights(pipe.vae),
    "text encoder": lambda pipe: other_weights(pipe.text_encoder),
    "processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
    "schedule": lambda pipe: (tgate_fx.restore(pipe), tgate_fx.gate(pipe, 3, sp_interval=2)),
    "compiled": lambda pipe: (tgate_fx.restore(pipe), tgate_fx.compile(pipe, 3, backend="eager")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_measured_anew(change: str, tmp_path: Path) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    for _ in range(2):  # a generation changes nothing
        tgate_fx.tune(pipe, PROMPTS[:1], work=tmp_path, **CALL)
    CHANGES[change](pipe)
    with pytest.raises(tgate_fx.ArgumentError, match="measurements of another pipeline"):
        tgate_fx.tune(pipe, PROMPTS[:1], work=tmp_path, **CALL)


def test_another_deep_branch_or_companion_is_measured_anew(tmp_path: Path) -> None:
    deep = [tgate_fx.gate(tiny.make("sd"), 3, deepcache=tgate_fx.DeepCache(2, branch)) for branch in (0, 3)]
    tgate_fx.tune(deep[0], PROMPTS[:1], work=tmp_path / "branch", **CALL)
    with pytest.raises(tgate_fx.ArgumentError, match=says("another pipeline", "changed: deep branches")):
        tgate_fx.tune(deep[1], PROMPTS[:1], work=tmp_path / "branch", **CALL)
    entry = entry_of("StableDiffusionControlNetPipeline")
    pipe = tgate_fx.gate(entry.make(), 2)
    call = {**entry.inputs(), "settings": CALL["settings"]}
    for name in ("generator", "output_type", "latents"):
        call.pop(name, None)
    tgate_fx.tune(pipe, [None], work=tmp_path / "companion", **call)
    other_weights(pipe.controlnet)
    with pytest.raises(tgate_fx.ArgumentError, match=says("another pipeline", "changed: weights")):
        tgate_fx.tune(pipe, [None], work=tmp_path / "companion", **call)


def calls_back(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs


def test_arguments_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    latents = [torch.zeros(1, 4, 12, 12), torch.zeros(1, 4, 12, 12)]
    latents[1][0, 0, 6, 6] = 1  # which a tensor of this size does not print
    settings = [{"gate_step": 2, "latents": each} for each in latents]
    call = {**CALL, "settings": settings, "callback_on_step_end": functools.partial(calls_back)}
    first = tgate_fx.tune(pipe, PROMPTS[:1], work=tmp_path, **call)
    assert first.trials[1].psnr != first.trials[2].psnr
    again = {**call, "settings": [{**each, "latents": each["latents"].clone()} for each in settings]}
    again["callback_on_step_end"] = functools.partial(calls_back)  # the same, elsewhere in memory
    found = tgate_fx.tune(pipe, PROMPTS[:1], work=tmp_path, **again)
    assert [each.seconds for each in found.trials] == [each.seconds for each in first.trials]
    for one, other in ((torch.ones, torch.zeros), (np.ones, np.zeros)):
        assert digest(one(2)) != digest(other(2))
        assert digest(one((2, 3))) != digest(one((3, 2)))
    pixels = [Image.new("RGB", (2, 2), colour) for colour in ("red", "red", "blue")]
    assert digest(pixels[0]) == digest(pixels[1]) != digest(pixels[2])


def test_speed_ups_are_of_turns_taken_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was slower when it went on changes no ratio."""
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    generate, slow = measure._generate, [1.0]

    def timed(pipe: Any, setting: dict[str, Any], *args: Any) -> tuple[torch.Tensor, float]:
        return generate(pipe, setting, *args)[0], slow[0] * (1.0 if not setting else 0.5)

    monkeypatch.setattr(measure, "_generate", timed)
    tgate_fx.tune(pipe, PROMPTS, work=tmp_path, **CALL)
    slow[0] = 10.0
    both = [{"gate_step": 2}, {"gate_step": 3}]
    found = tgate_fx.tune(pipe, PROMPTS, work=tmp_path, **{**CALL, "settings": both})
    assert [each.speed_up for each in found.trials] == [1.0, 2.0, 2.0]


def test_default_settings_have_none_of_the_pipelines_own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_GATES", (0.5,))
    call = {"height": 24, "width": 24, "num_inference_steps": 5}
    own = {"cache_weight": 1.0, "after_gate": "guided", "full_steps": (3,), "forecast": 2}
    plain = tgate_fx.tune(tgate_fx.gate(tiny.make("sd-small"), 3), PROMPTS[:1], **call)
    ruled = tgate_fx.tune(tgate_fx.gate(tiny.make("sd-small"), 3, **own), PROMPTS[:1], **call)
    assert {each.name: each.psnr for each in plain.trials} == {each.name: each.psnr for each in ruled.trials}
    assert "gate_step=0.5, cache_weight=0.5" in {each.name for each in plain.trials}


@pytest.mark.parametrize("cut", ["", '{"setting": "{}", "pro'])
def test_it_goes_on_from_a_row_that_was_cut_off(cut: str, tmp_path: Path) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    first = tgate_fx.tune(pipe, PROMPTS, work=tmp_path, **CALL)
    file = tmp_path / "measured.jsonl"
    *rows, last = file.read_text().splitlines()
    file.write_text("\n".join(rows) + "\n" + (cut or last))
    again = tgate_fx.tune(pipe, PROMPTS, work=tmp_path, **CALL)
    assert [each.psnr for each in again.trials] == [each.psnr for each in first.trials]
    assert len([json.loads(row) for row in file.read_text().splitlines()]) == 4
    file.write_text("none\n")
    with pytest.raises(tgate_fx.ArgumentError, match=says("cannot be used", "JSONDecodeError", "another")):
        tgate_fx.tune(pipe, PROMPTS, work=tmp_path, **CALL)


def test_a_setting_whose_pictures_cannot_be_compared_is_left_out() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    settings = [{"gate_step": 2, "height": 32}, {"gate_step": 2, "num_images_per_prompt": 2}, {"gate_step": 2}]
    _, good, *others = tgate_fx.tune(pipe, PROMPTS[:1], **{**CALL, "settings": settings}).trials
    assert good.setting == {"gate_step": 2}
    assert all(each.refused is not None and "not of the ungated ones' shape" in each.refused for each in others)
    assert others[0].as_json() == {"setting": others[0].setting, "refused": others[0].refused}
    pipe.vae.decoder.conv_out.weight.data.fill_(torch.nan)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("'a red cat' is of one colour, or has values", "dtype")):
        tgate_fx.tune(pipe, PROMPTS[:1], **CALL)


def test_a_pipeline_is_measured_and_left_as_it_was() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    call = {"height": 24, "width": 24, "num_inference_steps": 5}
    before = pipe(PROMPTS[0], **call, generator=torch.Generator().manual_seed(1), output_type="latent").images
    tuning = tgate_fx.tune(pipe, PROMPTS, settings=SETTINGS, psnr=1.0, ssim=-1.0, **call)
    after = pipe(PROMPTS[0], **call, generator=torch.Generator().manual_seed(1), output_type="latent").images
    assert torch.equal(before, after)
    ungated, *others = tuning.trials
    assert (ungated.setting, ungated.speed_up, ungated.psnr) == ({}, 1.0, pytest.approx(100))
    assert sorted(map(str, (each.setting for each in others))) == sorted(map(str, SETTINGS))
    assert [each.speed_up for each in others] == sorted((each.speed_up for each in others), reverse=True)
    for each in others:
        assert each.lowest_psnr <= each.psnr <= 100
    assert tuning.recommended == max(tuning.trials, key=lambda each: each.speed_up)
    assert str(tuning).splitlines()[-1] == f"for 1 dB and SSIM -1: {tuning.recommended.name}"


def test_the_likeness_is_to_the_ungated_image_of_the_same_noise() -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    call = {"height": 24, "width": 24, "num_inference_steps": 5}
    tuning = tgate_fx.tune(pipe, PROMPTS[:1], settings=SETTINGS[:1], seed=4, **call)
    images = []
    for gate_step, rule in ((None, {}), (2, {"cache_weight": 1.0})):
        generator = torch.Generator().manual_seed(4)
        images.append(
            pipe(PROMPTS[0], **call, gate_step=gate_step, **rule, generator=generator, output_type="np").images
        )
    error = float(((images[0].astype(float) - images[1]) ** 2).mean())
    assert tuning.trials[1].psnr == pytest.approx(10 * np.log10(1 / error), abs=1e-3)


def test_a_setting_goes_before_the_call() -> None:
    """So that fewer steps can be tried too."""
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    fewer = {"gate_step": None, "num_inference_steps": 2}
    tuning = tgate_fx.tune(pipe, PROMPTS[:1], settings=[fewer], height=24, width=24, num_inference_steps=5)
    assert len(tgate_fx.report(pipe).steps) == 2
    assert tuning.trials[1].setting == fewer
    assert tuning.trials[1].psnr < 90


def test_the_fastest_above_the_floor_is_recommended() -> None:
    def trial(name: int, speed_up: float, psnr: float, ssim: float = 0.99, refused: str | None = None) -> Trial:
        return Trial({"gate_step": name}, 1 / speed_up, speed_up, psnr, ssim, refused=refused)

    trials = (Trial({}), trial(1, 3.0, 20), trial(2, 2.5, 30, 0.9), trial(3, 2.0, 29), trial(4, 1.5, 35))
    assert Tuning(trials, 28, 0.95).recommended.setting == {"gate_step": 3}
    assert Tuning(trials, 40, 0.95).recommended.setting == {}
    assert Tuning(trials[:1], 101, 1.0).recommended.setting == {}
    assert Tuning((*trials, trial(5, 9.0, 99, refused="no")), 28, 0.95).recommended.setting == {"gate_step": 3}


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), 3)
    arguments: dict[str, Any] = {"settings": SETTINGS[:1], "work": tmp_path, "height": 24, "width": 24}
    arguments["num_inference_steps"] = 4
    generate = measure._generate
    calls: list[int] = []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(measure, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        tgate_fx.tune(pipe, PROMPTS, **arguments)
    first = tgate_fx.tune(pipe, PROMPTS, **arguments)
    assert len(calls) == 5 + 3  # one to begin with, and the second prompt's
    assert tgate_fx.tune(pipe, PROMPTS, **arguments) == first
    assert len(calls) == 8
    other = says("measurements of another pipeline, or of other prompts", "another directory")
    with pytest.raises(tgate_fx.ArgumentError, match=other):
        tgate_fx.tune(pipe, PROMPTS[:1], **arguments)
    with pytest.raises(tgate_fx.ArgumentError, match=other):
        tgate_fx.tune(tgate_fx.gate(tiny.make("sd-small", seed=1), 3), PROMPTS, **arguments)


@pytest.mark.parametrize("how", ["gate", pytest.param("compile", marks=pytest.mark.slow)])
def test_other_families(how: str, tmp_path: Path) -> None:
    """Videos, guidance in separate calls, and transformers; what one cannot do is said and left out."""
    for module, name in ((wan, "WanPipeline"), (sana, "SanaPipeline")):
        entry = next(entry for entry in module.ENTRIES if entry.pipeline == name)
        pipe = entry.make()
        tgate_fx.gate(pipe, 2) if how == "gate" else tgate_fx.compile(pipe, 2, backend="eager")
        call = {**entry.inputs(), "height": 32, "width": 32}
        del call["generator"], call["output_type"]
        settings = [{"gate_step": 2, "after_gate": "guided"}, {"gate_step": 2, "after_gate": "negative"}]
        tuning = tgate_fx.tune(pipe, [None], settings=settings, **call)
        assert np.isfinite(tuning.trials[1].psnr)
        plot(tuning, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle in the centre on a plain white background\n\n")
    monkeypatch.setattr(measure, "_GATES", (0.5,))
    generate = measure._generate

    def by_rows(pipe: Any, *args: Any) -> tuple[torch.Tensor, float]:
        """Rows of the denoiser in place of seconds, which depend on what else the machine does."""
        images, _ = generate(pipe, *args)
        return images, float(sum(step.batch for step in tgate_fx.report(pipe).steps))

    monkeypatch.setattr(measure, "_generate", by_rows)
    out, picture = tmp_path / "tune.json", tmp_path / "tune.png"
    options = ("--prompts", prompts, "--steps", "4", "--json", out, "--plot", picture, "--psnr", "1", "--ssim", "0")
    assert run(monkeypatch, "tune", *options) == 0
    written = json.loads(out.read_text())
    assert written["recommended"]
    assert len(written["trials"]) == 1 + len(measure._RULES) + 1  # the ungated one, and the early gate
    assert any("full_steps" in trial["setting"] for trial in written["trials"])
    assert not any(trial["refused"] for trial in written["trials"])
    assert picture.stat().st_size > 1000
    fastest = max(written["trials"], key=lambda trial: trial["speed_up"])["setting"]
    assert written["recommended"] == fastest
    assert re.search(r"for 1 dB and SSIM 0: .*gate_step=0\.[25]", capsys.readouterr().out)


def test_what_is_refused(tmp_path: Path) -> None:
    pipe = tiny.make("sd-small")
    with pytest.raises(tgate_fx.StateError, match="is not gated"):
        tgate_fx.tune(pipe, PROMPTS)
    tgate_fx.gate(pipe, 2)
    for prompts in ([], "a cat", 5, iter(())):
        with pytest.raises(tgate_fx.ArgumentError, match=says("expected a list of at least one")):
            tgate_fx.tune(pipe, prompts)
    for setting in ({}, [], "gate_step", None, {1: 1}):
        with pytest.raises(tgate_fx.ArgumentError, match=says(f"{setting!r} is no setting", "keywords of")):
            tgate_fx.tune(pipe, PROMPTS, settings=[setting])  # type: ignore[list-item]
    for ours in ({"generator": None}, {"output_type": "pt"}):
        name = next(iter(ours))
        with pytest.raises(tgate_fx.ArgumentError, match=says(f"{name} was given in the setting", "Leave it out")):
            tgate_fx.tune(pipe, PROMPTS, settings=[{"gate_step": 3, **ours}])
        with pytest.raises(tgate_fx.ArgumentError, match=says(f"{name} was given in the call", "Leave it out")):
            tgate_fx.tune(pipe, PROMPTS, **ours)
    file = tmp_path / "file"
    file.write_text("")
    wrong: dict[str, Any] = {"psnr": "28", "ssim": 95, "seed": None, "work": 5, "settings": 5}
    for name, value in (*wrong.items(), ("psnr", float("nan")), ("seed", "0"), ("seed", -1)):
        with pytest.raises(tgate_fx.ArgumentError, match=says(f"{name}={value!r}", "expected")):
            tgate_fx.tune(pipe, PROMPTS, **{name: value})
    with pytest.raises(tgate_fx.ArgumentError, match=says("cannot be used", "expected a directory")):
        tgate_fx.tune(pipe, PROMPTS, work=file)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("takes no prompt", "by yourself")):
        tgate_fx.tune(tgate_fx.gate(tiny.make("svd"), 2), PROMPTS)
    with tgate_fx.disabled(pipe), pytest.raises(tgate_fx.StateError, match=says("within tgate_fx.disabled", "is on")):
        tgate_fx.tune(pipe, PROMPTS)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("expected images or videos of 11×11")):
        tgate_fx.tune(pipe, iter(PROMPTS), seed=np.int64(3), height=8, width=8, num_inference_steps=3)


WORDS = "a small red circle in the centre on a plain white background\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "nope"), "nope: expected a device of torch"),
        (("--dtype", "int8"), "int8: expected a dtype of torch"),
        (("--model", "no/such/folder"), "no/such/folder could not be loaded"),
        (("--prompts", "latin.txt"), "latin.txt: expected text in UTF-8"),
        (("--prompts", "empty.txt"), "expected a list of at least one"),
        (("--prompts", "words.txt", "--work", "words.txt/x"), "cannot be used"),
        (("--psnr", "nan"), "psnr=nan (float) is no floor"),
        (("--plot", "x.txt"), "expected a name that ends with .png or .pdf or .svg"),
        (("--json", "/dev/full/x"), "there is no folder"),
        (("--json", "/sys/x.json"), "/sys/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of it before anything is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "_try_all", None)
    for name, content in (("words.txt", WORDS), ("empty.txt", "\n")):
        Path(name).write_text(content)
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    assert run(monkeypatch, "tune", *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert not any("Traceback" in line for line in said)
