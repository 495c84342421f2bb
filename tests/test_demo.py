"""The embedded pipeline: its scenes, what judges its pictures, its weights, and the command that shows it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tgate_fx
from benchmarks.embedded import models
from benchmarks.embedded.data import normalised, pictures
from benchmarks.embedded.drawing import draw
from benchmarks.embedded.judge import frechet_distance, load_classifier, read, right_answers
from benchmarks.embedded.quality_points import RULES, Point, points
from benchmarks.embedded.quality_tables import page
from tests.conftest import check_refused, run
from tgate_fx import demo
from tgate_fx.demo.compare import unknown_words
from tgate_fx.demo.scenes import Scene, Thing, random_scene, scenes

QUALITY = Path(__file__).parent.parent / "benchmarks" / "results" / "quality.json"
SCENE = Scene("side by side", (Thing("small", "red", "circle"), Thing("large", "blue", "star")), "pink", "striped")


def test_a_caption_says_all_that_a_scene_has() -> None:
    captions = {SCENE.caption(random.Random(seed)) for seed in range(20)}
    assert captions == {
        "a small red circle left of a large blue star on a striped pink background",
        "a large blue star right of a small red circle on a striped pink background",
    }
    assert SCENE.attributes() == {
        "layout": "side by side",
        "background": "pink",
        "texture": "striped",
        **{"size 0": "small", "colour 0": "red", "shape 0": "circle"},
        **{"size 1": "large", "colour 1": "blue", "shape 1": "star"},
    }
    rng = random.Random(0)
    for scene in (random_scene(rng) for _ in range(200)):
        said = scene.caption(rng)
        named = {name: value for name, value in scene.attributes().items() if name != "layout"}
        assert all(value in said for value in named.values())


def test_what_is_held_out_is_never_trained_on() -> None:
    def combinations(kept: list[Scene]) -> set[tuple[Thing, str, str]]:
        return {(thing, scene.background, scene.texture) for scene in kept for thing in scene.things}

    trained, held_out = (scenes(3000, seed=4, held_out=value) for value in (False, True))
    assert not any(scene.held_out for scene in trained)
    assert all(scene.held_out for scene in held_out)
    alone = [scene for scene in held_out if len(scene.things) == 1]
    assert len(combinations(alone)) > 20
    assert not combinations(alone) & combinations(trained)


def test_drawings_follow_from_their_seed() -> None:
    first, again, other = (draw(SCENE, random.Random(seed)) for seed in (1, 1, 2))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_classifier_reads_drawings() -> None:
    asked = scenes(300, seed=11, held_out=True)
    _, answers = read(load_classifier(), normalised(pictures(asked, 11)))
    right = np.stack(list(right_answers(asked, answers).values()))
    assert np.nanmean(right) > 0.98
    # Judged by other scenes' captions it is right by chance only.
    wrong = np.stack(list(right_answers(asked[1:] + asked[:1], answers).values()))
    assert np.nanmean(wrong) < 0.5


def test_frechet_distance_of_gaussians_that_are_known() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20_000, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    # Between N(0, 1) and N(2, 9) in each of 4 dimensions: 4 * (2² + (3 - 1)²).
    assert frechet_distance(features, 3 * rng.normal(size=(20_000, 4)) + 2) == pytest.approx(32, rel=0.05)


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = demo.load()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_weights_are_those_that_the_training_script_describes(pipe: Any) -> None:
    for ours, theirs in ((pipe.unet, models.denoiser()), (pipe.vae, models.autoencoder())):
        assert {name: value.shape for name, value in ours.state_dict().items()} == {
            name: value.shape for name, value in theirs.state_dict().items()
        }
    assert pipe.tokenizer.get_vocab() == models.vocabulary()[0]
    for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"):
        scheduler = getattr(diffusers, name)
        made, trained = (scheduler.from_config(each.config).config for each in (pipe.scheduler, models.scheduler()))
        for key in ("beta_schedule", "beta_start", "beta_end", "prediction_type", "steps_offset"):
            assert made.get(key) == trained.get(key)
        assert not made.get("clip_sample")  # latents are not within [-1, 1]
        assert not trained.get("clip_sample")
    sizes = [path.stat().st_size for path in demo.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(sizes) < 25e6


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mean", "conditional", "guided"])
def test_as_many_attributes_of_32_captions_are_right_as_was_measured(pipe: Any, rule: str) -> None:
    measured = {row["name"]: row for row in json.loads(QUALITY.read_text())["points"]}
    asked = scenes(32, seed=99, held_out=True)
    rng = random.Random(99)
    captions = [scene.caption(rng) for scene in asked]
    generators = [torch.Generator().manual_seed(seed) for seed in range(32)]
    tgate_fx.gate(pipe, gate_step=5, **RULES[rule])
    try:
        images = pipe(captions, num_inference_steps=25, generator=generators, output_type="pt").images
    finally:
        tgate_fx.restore(pipe)
    _, answers = read(load_classifier(), images * 2 - 1)
    right = float(np.nanmean(np.stack(list(right_answers(asked, answers).values()))))
    point = measured[Point(rule, 5).name]
    spread = point["standard_error"] * math.sqrt(point["pictures"] / 32)
    assert right == pytest.approx(point["accuracy"], abs=3 * spread)
    assert (right < 0.85) is (rule == "mean")


def test_the_tables_of_quality_are_those_of_the_results() -> None:
    written = QUALITY.with_suffix(".md").read_text()
    assert written == page(json.loads(QUALITY.read_text()), len(points()))


def test_what_a_rule_loses_is_counted_picture_by_picture() -> None:
    measured = {row["name"]: row for row in json.loads(QUALITY.read_text())["points"]}
    for point in points():
        row, ungated = measured.get(point.name), measured.get(point.reference.name)
        if row is None or ungated is None or row is ungated:
            continue
        assert row["lost"] == pytest.approx(ungated["accuracy"] - row["accuracy"], abs=1e-9)
        apart = math.hypot(row["standard_error"], ungated["standard_error"])
        assert 0 < row["lost_standard_error"] < apart


def test_words_that_it_does_not_know(pipe: Any) -> None:
    rng = random.Random(0)
    assert not any(unknown_words(pipe.tokenizer, random_scene(rng).caption(rng)) for _ in range(200))
    assert unknown_words(pipe.tokenizer, "a red cat, on a hill") == ["cat,", "hill"]


def test_the_demo_writes_a_picture_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.png"
    prompt = "a large red star in the centre on a plain white background"
    options = ("--prompt", prompt, "--gate-step", "3", "--gate-step", "0.25", "--steps", "8", "--out", out)
    assert run(monkeypatch, "demo", *options) == 0
    with Image.open(out) as image:
        assert image.width > 5 * 192
        assert image.height > 192
    said = capsys.readouterr().out
    for part in (
        "ungated",
        "gate 3, mean",
        "gate 3, guided",
        "gate 0.25, guided",
        "1.00x",
        "post-gate step",
        str(out.name),
    ):
        assert part in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "1"), "'--steps': 1 is not in the range"),
        (("--gate-step", "soon"), "'soon': expected a step such as 10, a share of the steps such as 0.4"),
        (("--gate-step", "25"), "--gate-step 25 of --steps 25: expected less"),
        (("--gate-step", "0.9", "--steps", "2"), "--gate-step 0.9 of --steps 2: expected less"),
        (("--gate-step", "none"), "--gate-step none: expected a step"),
        (("--out", "x.txt"), "x.txt: expected a name that ends with .png"),
        (("--gate-step", "0"), "gate_step=0 (int) is not a gate step: expected an int ≥ 1"),
        (("--gate-step", "1.5"), "gate_step=1.5 (float) is not a gate step"),
        (("--out", "no/such/folder/x.png"), "there is no folder"),
        (("--prompt", "a red cat"), "was not trained on (cat): expected such as"),
        (("--prompt", " "), "has words that"),
        (("--fast",), "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(monkeypatch, capsys, message, "demo", *options)
    assert not list(tmp_path.iterdir())
