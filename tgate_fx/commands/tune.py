"""`tgate-fx tune`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .demo import PROMPTS
from .options import OutFile


@click.command()
@click.option("--model", help="A diffusers pipeline: a folder or a name on a model hub.  [default: the embedded one]")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A text file with a prompt a line.  [default: four for the embedded pipeline]",
)
@click.option("--steps", type=click.IntRange(min=2), default=25, show_default=True, help="Inference steps.")
@click.option("--psnr", type=float, default=28.0, show_default=True, help="The least likeness to ungated, in dB.")
@click.option("--ssim", type=float, default=0.95, show_default=True, help="The least structural similarity to ungated.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first image.")
@click.option("--device", default="cpu", show_default=True, help="Where to generate.")
@click.option("--dtype", default="float32", show_default=True, help="Of the weights, such as float16.")
@click.option("--compile/--no-compile", "compiled", default=False, help="Run all phases through torch.compile.")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Where to go on from, if interrupted.")
@click.option("--json", "results", type=OutFile(), help="Write the measurements there.")
@click.option("--plot", "picture", type=OutFile(), help="Draw them there, as a PNG.")
def tune(
    model: str | None,
    file: Path | None,
    steps: int,
    psnr: float,
    ssim: float,
    seed: int,
    device: str,
    dtype: str,
    compiled: bool,
    work: Path | None,
    results: Path | None,
    picture: Path | None,
) -> None:
    """Measure settings of the gate on a pipeline: seconds against likeness to the ungated images; recommend one."""
    import torch

    from .. import pipeline
    from ..tuning.measure import tune as measure
    from ..tuning.show import plot

    prompts = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file else list(PROMPTS)
    pipe = _load(model, getattr(torch, dtype, None), dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    (pipeline.compile if compiled else pipeline.gate)(pipe, gate_step=None)
    tuning = measure(pipe, prompts, psnr=psnr, ssim=ssim, seed=seed, work=work, num_inference_steps=steps)
    click.echo(str(tuning))
    if results is not None:
        rows = [asdict(trial) for trial in tuning.trials]
        results.write_text(json.dumps({"trials": rows, "recommended": tuning.recommended.setting}, indent=1) + "\n")
    if picture is not None:
        plot(tuning, picture)


def _load(model: str | None, dtype: Any, name: str) -> Any:
    import torch

    if not isinstance(dtype, torch.dtype):
        raise click.BadParameter(f"{name}: expected a dtype of torch such as float16.", param_hint="--dtype")
    if model is None:
        from .. import demo

        pipe: Any = demo.load()
    else:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(model)  # type: ignore[no-untyped-call]
    pipe.to(dtype)
    return pipe
