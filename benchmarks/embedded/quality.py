"""What the gate costs in quality, and gains in time, on the embedded pipeline.

    python -m benchmarks.embedded.quality generate --work DIR   # hours; stop it and start it again as you like
    python -m benchmarks.embedded.quality time --work DIR       # minutes; on an otherwise idle machine
    python -m benchmarks.embedded.quality report --work DIR     # writes the JSON and the plot

Every point generates pictures of the same held-out captions from the same noise, with 25 steps: gated at several steps
with each rule for what goes on after the gate, ungated, and with diffusers' own SDCFGCutoffCallback, which drops
guidance at the same step and goes on with the conditional branch.
"""

from __future__ import annotations

import json
import random
import statistics
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import diffusers
import numpy as np
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from tqdm import tqdm

import tgate_fx
from tgate_fx import demo
from tgate_fx.bench.machine import processor
from tgate_fx.demo.scenes import scenes

from .data import normalised, pictures
from .judge import frechet_distance, load_classifier, read, right_answers

_work = click.option("--work", type=click.Path(path_type=Path), required=True, help="Where what was generated is.")

STEPS = 25
GATES = (1, 2, 3, 5, 8, 10, 15, 20)
RULES = ("negative", "positive", "both")
RESULTS = Path(__file__).parent.parent / "results" / "quality.json"
_SEED = 31
_BATCH = 50
_REFERENCE = 5000  # drawings that the Fréchet distance is measured to


class Point(NamedTuple):
    """One way to generate: ``rule`` is "ungated", "cutoff", or what goes on after the gate."""

    rule: str
    gate: int | None

    @property
    def name(self) -> str:
        return self.rule if self.gate is None else f"{self.rule}-{self.gate}"


def points() -> list[Point]:
    """Every point, those that are compared most first."""
    rules = (*RULES[:1], "cutoff", *RULES[1:])
    return [Point("ungated", None), *[Point(rule, gate) for rule in rules for gate in sorted(GATES, key=_nearness)]]


def _nearness(gate: int) -> int:
    return abs(gate - 10)


class Cutoff(SDCFGCutoffCallback):  # type: ignore[misc]
    """Diffusers' callback for a batch: the original keeps the last prompt alone."""

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> Any:
        both = callback_kwargs["prompt_embeds"]
        kept = super().callback_fn(pipeline, step_index, timestep, callback_kwargs)
        if kept["prompt_embeds"] is not both:
            kept["prompt_embeds"] = both.chunk(2)[1]
        return kept


class Pipelines:
    """A pipeline for each rule, all with the same weights."""

    def __init__(self) -> None:
        plain = demo.load()
        self._by_rule: dict[str, Any] = {"ungated": plain, "cutoff": plain}
        for rule in RULES:
            pipe = diffusers.StableDiffusionPipeline(**plain.components, requires_safety_checker=False)
            self._by_rule[rule] = tgate_fx.gate(pipe, gate_step=None, after_gate=rule)
        for pipe in self._by_rule.values():
            pipe.set_progress_bar_config(disable=True)

    def generate(self, point: Point, captions: list[str], seeds: list[int]) -> torch.Tensor:
        """Pictures in [-1, 1]: [N, 3, 64, 64]."""
        how: dict[str, Any] = {}
        if point.rule == "cutoff":
            assert point.gate is not None
            # It takes effect after the step with this index: the step `gate` is the first without guidance.
            how["callback_on_step_end"] = Cutoff(cutoff_step_ratio=None, cutoff_step_index=point.gate - 1)
        elif point.gate is not None:
            how["gate_step"] = point.gate
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        result = self._by_rule[point.rule](
            captions, num_inference_steps=STEPS, generator=generators, output_type="pt", **how
        )
        images: torch.Tensor = result.images
        return images * 2 - 1


@click.group()
def app() -> None:
    """What the gate costs in quality, and gains in time."""


@app.command()
@_work
@click.option("--count", default=1000, show_default=True, help="Pictures a point.")
def generate(work: Path, count: int) -> None:
    """Generate every point's pictures and keep what the classifier reads in them."""
    work.mkdir(parents=True, exist_ok=True)
    pipelines, classifier = Pipelines(), load_classifier()
    asked, captions = held_out(count)
    for point in tqdm(points(), desc="points"):
        for start in tqdm(range(0, count, _BATCH), desc=point.name, leave=False):
            path = work / f"{point.name}.{start:05d}.npz"
            if path.exists():
                continue
            chosen = slice(start, min(start + _BATCH, count))
            images = pipelines.generate(point, captions[chosen], list(range(chosen.start, chosen.stop)))
            features, answers = read(classifier, images)
            right = right_answers(asked[chosen], answers)
            part = path.with_suffix(".part.npz")
            np.savez(part, features=features, **right)
            part.rename(path)


def held_out(count: int) -> tuple[list[Any], list[str]]:
    """Scenes that were kept out of training, and a caption of each."""
    asked = scenes(count, seed=_SEED, held_out=True)
    rng = random.Random(_SEED)
    return asked, [scene.caption(rng) for scene in asked]


@app.command()
@_work
@click.option("--rounds", default=7, show_default=True, help="Pictures to time at every point.")
def time(work: Path, rounds: int) -> None:
    """Time one picture at every point, the points taking turns."""
    pipelines = Pipelines()
    _, captions = held_out(1)
    seconds: dict[str, list[float]] = {point.name: [] for point in points()}
    for index in tqdm(range(rounds + 1)):
        for point in points():
            started = clock.perf_counter()
            pipelines.generate(point, captions, [0])
            if index:  # the first round warms up
                seconds[point.name].append(clock.perf_counter() - started)
    (work / "seconds.json").write_text(json.dumps(seconds))


@app.command()
@_work
def report(work: Path) -> None:
    """Put everything together: the JSON and the plot."""
    classifier = load_classifier()
    reference, right_in_drawings = _drawn(classifier, _REFERENCE, seed=_SEED + 1)
    floor, _ = _drawn(classifier, 1000, seed=_SEED + 2)
    seconds = json.loads((work / "seconds.json").read_text())
    rows = []
    for point in points():
        parts = [np.load(path) for path in sorted(work.glob(f"{point.name}.[0-9]*.npz"))]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
        features = joined.pop("features")
        right = np.stack(list(joined.values()))
        rows.append(
            {
                "rule": point.rule,
                "gate": point.gate,
                "pictures": len(features),
                "accuracy": float(np.nanmean(right)),
                "standard_error": _standard_error(right),
                "all_right": float(np.mean(np.nanmin(right, axis=0))),
                "by_attribute": {name: float(np.nanmean(values)) for name, values in joined.items()},
                "frechet": frechet_distance(features, reference),
                "seconds": statistics.median(seconds[point.name]),
                "seconds_spread": [min(seconds[point.name]), max(seconds[point.name])],
            }
        )
    result = {
        "what": "embedded pipeline, held-out captions, one prompt at a time for seconds",
        "steps": STEPS,
        "classifier": {"drawings": _REFERENCE, "accuracy": right_in_drawings},
        "frechet_floor": frechet_distance(floor, reference),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "diffusers": diffusers.__version__,
        "points": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    _plot(result)
    for row in rows:
        print(
            f"{row['rule']:>9} {row['gate'] or '':>3}  {row['accuracy']:.3f} ± {row['standard_error']:.3f}  "
            f"FD {row['frechet']:.2f}  {row['seconds']:.2f} s"
        )


def _standard_error(right: np.ndarray) -> float:
    """Of the share of right attributes [attributes, pictures], with pictures as the unit that was sampled."""
    hits, asked = np.nansum(right, axis=0), np.sum(~np.isnan(right), axis=0)
    share = hits.sum() / asked.sum()
    residual = hits - share * asked
    return float(np.sqrt((residual**2).sum()) / asked.sum())


def _drawn(classifier: Any, count: int, *, seed: int) -> tuple[np.ndarray, float]:
    """The features of drawings of held-out scenes, and the share of attributes that the classifier gets right."""
    drawn = scenes(count, seed=seed, held_out=True)
    features, answers = read(classifier, normalised(pictures(drawn, seed)))
    return features, float(np.nanmean(np.stack(list(right_answers(drawn, answers).values()))))


def _series(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for rule in (*RULES, "cutoff"):
        yield rule, sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["gate"])


def _plot(result: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    ungated = next(row for row in result["points"] if row["rule"] == "ungated")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    names = {"cutoff": "diffusers' CFG cutoff"} | {rule: f"gated, {rule}" for rule in RULES}
    for axis, key, label in ((axes[0], "accuracy", "attributes right"), (axes[1], "frechet", "Fréchet distance")):
        for rule, rows in _series(result["points"]):
            axis.plot([row["seconds"] for row in rows], [row[key] for row in rows], "o-", label=names[rule])
            for row in rows if rule == "negative" else ():
                axis.annotate(str(row["gate"]), (row["seconds"], row[key]), textcoords="offset points", xytext=(4, 4))
        axis.plot([ungated["seconds"]], [ungated[key]], "k*", markersize=12, label="ungated")
        axis.set(xlabel=f"seconds a picture, {result['steps']} steps", ylabel=label)
    axes[1].axhline(result["frechet_floor"], color="gray", linestyle=":", label="drawings against drawings")
    axes[1].set_yscale("log")
    axes[0].legend()
    axes[1].legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    app()
