"""What the gate costs in quality, and what it saves, on the embedded pipeline.

    python -m benchmarks.embedded.quality generate --work DIR   # hours; stop it and start it again as you like
    python -m benchmarks.embedded.quality report --work DIR     # writes JSON, tables and a plot of what is complete

Every point generates pictures of the same held-out captions from the same noise. The classifier reads what they show,
and each is compared with the ungated picture of its caption. ``generate`` leaves out the points that the committed
results have of these weights, so that it goes on from them on any machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

import click
import diffusers
import numpy as np
import torch
from tqdm import tqdm

from tgate_fx import demo
from tgate_fx.bench.machine import processor
from tgate_fx.demo.scenes import scenes

from .data import normalised, pictures
from .judge import frechet_distance, load_classifier, read, right_answers
from .quality_plots import plot
from .quality_points import STEPS, Pipelines, Point, points
from .quality_tables import page

_work = click.option("--work", type=click.Path(path_type=Path), required=True, help="Where what was generated is.")

RESULTS = Path(__file__).parent.parent / "results" / "quality.json"
_SEED = 31
_BATCH = 50
_REFERENCE = 5000  # drawings that the Fréchet distance is measured to


@click.group()
def app() -> None:
    """What the gate costs in quality, and what it saves."""


@app.command()
@_work
@click.option("--count", default=1000, show_default=True, help="Pictures a point.")
@click.option("--worker", default=0, show_default=True, help="Which of several processes this is, from 0.")
@click.option("--workers", default=1, show_default=True, help="How many processes share the work.")
def generate(work: Path, count: int, worker: int, workers: int) -> None:
    """Generate every point's pictures, and keep what the classifier reads in them."""
    work.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in _committed() if row["pictures"] == count}
    pipelines, classifier = Pipelines(), load_classifier()
    asked, captions = held_out(count)
    for point in tqdm([each for each in points() if each.name not in done], desc="points"):
        for start in tqdm(range(worker * _BATCH, count, workers * _BATCH), desc=point.name, leave=False):
            chosen = slice(start, min(start + _BATCH, count))
            for each in (point.reference, point):
                path = _part(work, each, start)
                if path.exists():
                    continue
                images, report = pipelines.generate(each, captions[chosen], list(range(chosen.start, chosen.stop)))
                features, answers = read(classifier, images * 2 - 1)
                kept: dict[str, Any] = {
                    "features": features,
                    "gate": np.array([-1 if report.gate is None else report.gate]),
                }
                kept["rows"] = np.array([sum(step.batch for step in report.steps) / len(images) / STEPS])
                if each == each.reference:
                    kept["images"] = images.numpy()
                else:
                    kept["psnr"] = _psnr(images.numpy(), np.load(_part(work, each.reference, start))["images"])
                unfinished = path.with_suffix(".unfinished.npz")
                kept |= right_answers(asked[chosen], answers)
                np.savez(unfinished, **kept)
                unfinished.rename(path)


def _part(work: Path, point: Point, start: int) -> Path:
    return work / f"{point.name}.{start:05d}.npz"


def _psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In dB, of every picture [N, 3, H, W] in [0, 1]."""
    result: np.ndarray = -10 * np.log10(np.square(images.astype(float) - others).mean((1, 2, 3)))
    return result


def held_out(count: int) -> tuple[list[Any], list[str]]:
    """Scenes that were kept out of training, and a caption of each."""
    asked = scenes(count, seed=_SEED, held_out=True)
    rng = random.Random(_SEED)
    return asked, [scene.caption(rng) for scene in asked]


def _weights() -> str:
    """The name of the denoiser's weights: the first digits of their file's SHA-256."""
    (file,) = (demo.WEIGHTS / "unet").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _committed() -> list[dict[str, Any]]:
    """The points that the results have of these weights."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows: list[dict[str, Any]] = results["points"] if results.get("weights") == _weights() else []
    return rows


@app.command()
@_work
@click.option("--count", default=1000, show_default=True, help="Pictures of a point that is complete.")
def report(work: Path, count: int) -> None:
    """Put all that is complete together: the JSON, the tables and the plot."""
    classifier = load_classifier()
    reference, right_in_drawings = _drawn(classifier, _REFERENCE, seed=_SEED + 1)
    floor, _ = _drawn(classifier, count, seed=_SEED + 2)
    rows = {row["name"]: row for row in _committed()}
    measured = functools.cache(lambda point: _measured(work, point, count))  # many points have one reference
    for point in points():
        own, ungated = measured(point), measured(point.reference)
        if own and ungated:
            rows[point.name] = _row(point, own, ungated, reference)
    result = {
        "what": "embedded pipeline, held-out captions, batches of 50",
        "weights": _weights(),
        "steps": STEPS,
        "classifier": {"drawings": _REFERENCE, "accuracy": right_in_drawings},
        "frechet_floor": frechet_distance(floor, reference),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "torch": torch.__version__},
        "diffusers": diffusers.__version__,
        "points": [rows[point.name] for point in points() if point.name in rows],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page(result, len(points())))
    plot(result, RESULTS.with_suffix(".png"))
    print(f"{len(rows)} of {len(points())} points are in {RESULTS.with_suffix('.md')}")


class _Measured(NamedTuple):
    """What was kept of a point's pictures, but not these.

    Attributes:
        features: the classifier's, one row a picture.
        gate: for each batch, the gate step that held; -1 for none.
        rows: for each batch, the rows a step.
        psnr: in dB, of each picture; None of ungated ones.
        right: by attribute, for each picture 1 where right, 0 where not, NaN where its caption says nothing.
    """

    features: np.ndarray
    gate: np.ndarray
    rows: np.ndarray
    psnr: np.ndarray | None
    right: dict[str, np.ndarray]


def _measured(work: Path, point: Point, count: int) -> _Measured | None:
    """Put the batches of a point together; None unless it is complete."""
    paths = [_part(work, point, start) for start in range(0, count, _BATCH)]
    if not all(path.exists() for path in paths):
        return None
    parts = [np.load(path) for path in paths]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files if key != "images"}
    features, gate, rows = (joined.pop(name) for name in ("features", "gate", "rows"))
    return _Measured(features, gate, rows, joined.pop("psnr", None), joined)


def _row(point: Point, measured: _Measured, ungated: _Measured, reference: np.ndarray) -> dict[str, Any]:
    """What a point's pictures show, also beside the ungated ones of the same captions and noise."""
    right = np.stack(list(measured.right.values()))
    lost = None if point == point.reference else np.stack([ungated.right[name] for name in measured.right]) - right
    psnr = measured.psnr
    return {
        "name": point.name,
        "rule": point.rule,
        "gate": point.gate,
        "scheduler": point.scheduler,
        "guidance_scale": point.scale,
        "pictures": len(measured.features),
        "accuracy": float(np.nanmean(right)),
        "standard_error": _standard_error(right),
        "lost": None if lost is None else float(np.nanmean(lost)),
        "lost_standard_error": None if lost is None else _standard_error(lost),
        "all_right": float(np.mean(np.nanmin(right, axis=0))),
        "by_attribute": {name: float(np.nanmean(values)) for name, values in measured.right.items()},
        "frechet": frechet_distance(measured.features, reference),
        "psnr": None if psnr is None else float(psnr.mean()),
        "psnr_standard_error": None if psnr is None else float(psnr.std(ddof=1) / np.sqrt(len(psnr))),
        "rows": float(measured.rows.mean()),
        "opened": float(measured.gate.mean()) if point.gate == "auto" else None,
    }


def _standard_error(right: np.ndarray) -> float:
    """Of the mean over attributes and pictures [attributes, pictures], with pictures as the unit that was sampled."""
    hits, asked = np.nansum(right, axis=0), np.sum(~np.isnan(right), axis=0)
    share = hits.sum() / asked.sum()
    residual = hits - share * asked
    return float(np.sqrt((residual**2).sum()) / asked.sum())


def _drawn(classifier: Any, count: int, *, seed: int) -> tuple[np.ndarray, float]:
    """The features of drawings of held-out scenes, and the share of attributes that the classifier gets right."""
    drawn = scenes(count, seed=seed, held_out=True)
    features, answers = read(classifier, normalised(pictures(drawn, seed)))
    return features, float(np.nanmean(np.stack(list(right_answers(drawn, answers).values()))))


if __name__ == "__main__":
    app()
