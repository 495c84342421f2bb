"""`tgate-fx tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .demo import PROMPTS
from .options import PLOTS, OutFile, check_installed


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
@click.option("--plot", "picture", type=OutFile(*PLOTS), help="Draw them into this picture.")
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
    from .. import pipeline
    from ..tuning.measure import tune as measure
    from ..tuning.show import plot

    check_installed("torchmetrics", *(["matplotlib"] if picture is not None else []), extra="tune")
    prompts = _lines(file) if file else list(PROMPTS)
    pipe = _load(model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    (pipeline.compile if compiled else pipeline.gate)(pipe, gate_step=None)
    tuning = measure(pipe, prompts, psnr=psnr, ssim=ssim, seed=seed, work=work, num_inference_steps=steps)
    click.echo(str(tuning))
    if results is not None:
        rows = [trial.as_json() for trial in tuning.trials]
        results.write_text(json.dumps({"trials": rows, "recommended": tuning.recommended.setting}, indent=1) + "\n")
    if picture is not None:
        plot(tuning, picture)


def _lines(file: Path) -> list[str]:
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{file}: expected text in UTF-8 ({error}).", param_hint="--prompts") from error


def _load(model: str | None, device: str, dtype: str) -> Any:
    """Return a pipeline where it is to run; raise `click.BadParameter` for what of these there is not."""
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise click.BadParameter(f"{dtype}: expected a dtype of torch such as float16.", param_hint="--dtype")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a name of none, or of one that this torch does not have
        why = str(error).partition("\n")[0]
        raise click.BadParameter(
            f"{device}: expected a device of torch such as cuda ({why}).", param_hint="--device"
        ) from error
    if model is None:
        from .. import demo

        pipe: Any = demo.load()
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            why = str(error).partition("\n")[0]
            raise click.BadParameter(f"{model} could not be loaded: {why}", param_hint="--model") from error
    return pipe.to(device, kind)
