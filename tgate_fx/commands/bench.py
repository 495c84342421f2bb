"""`tgate-fx bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from ..bench.models import MODELS
from ..bench.workload import Workload
from .options import PLOTS, OutFile, check_gated, check_installed

# The packages that contenders of these names need.
_PACKAGES = {"tgate": "tgate", "deepcache": "DeepCache", "openvino": "openvino"}


@click.command()
@click.option(
    "--arch",
    type=click.Choice(list(MODELS)),
    default="demo",
    show_default=True,
    help="The model, with random weights.",
)
@click.option("--size", type=click.IntRange(min=8), help="Latents per side, if not the model's own.")
@click.option("--steps", type=click.IntRange(min=2), default=25, show_default=True, help="Steps of an image.")
@click.option(
    "--gate-step",
    "gates",
    type=click.IntRange(min=1),
    multiple=True,
    default=(10, 5),
    show_default=True,
    help="First gated step; repeat it for more rows.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of weights and latents. [default: float32; float16 on a GPU]",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images of a call.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Images of each row.")
@click.option("--only", "only", multiple=True, help="One contender; repeat it for more. All of them if left out.")
@click.option("--ladder", is_flag=True, help="Only what shows where the speed-up comes from, one step after the other.")
@click.option("--json", "json_out", type=OutFile(), help="Write everything that was measured to this file.")
@click.option("--plot", "plot_out", type=OutFile(*PLOTS), help="Draw the results into this picture.")
def bench(
    arch: str,
    size: int | None,
    steps: int,
    gates: tuple[int, ...],
    device: str,
    dtype: str | None,
    batch: int,
    rounds: int,
    only: tuple[str, ...],
    ladder: bool,
    json_out: Path | None,
    plot_out: Path | None,
) -> None:
    """Time tgate_fx, diffusers and their peers on one model, taking turns; every result is checked first.

    Needs an otherwise idle machine. The denoiser runs as in a pipeline, without text encoder and VAE.
    """
    for gate in gates:
        check_gated(gate, steps)
    only = tuple(dict.fromkeys(only))
    from ..bench import plots, tables
    from ..bench.contenders import CONTENDERS, LADDER, applicable, reference_of
    from ..bench.race import Race, race
    from ..bench.results import results

    unknown = [name for name in only if name not in CONTENDERS]
    if unknown or (only and ladder):
        raise click.UsageError(f"--only {' '.join(only)}: expected of {', '.join(CONTENDERS)}, and no --ladder.")
    names = applicable(only or tuple(LADDER if ladder else CONTENDERS), arch, device)
    if only and len(names) < len(only):
        all_names = " ".join(applicable(tuple(CONTENDERS), arch, device))
        raise click.UsageError(
            f"--only {' '.join(only)}: expected what there is for --arch {arch} --device {device}, {all_names}."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no GPU with CUDA. Leave it out to measure on the CPU.")
    run = " ".join([*names, *[str(reference_of(name, arch)) for name in names]])
    needed = {package for part, package in _PACKAGES.items() if part in run}
    needed |= {"matplotlib"} if plot_out is not None else set()
    check_installed(*needed, extra="bench")
    dtype = dtype or ("float16" if device == "cuda" else "float32")
    workload = Workload(arch, size, steps, tuple(dict.fromkeys(gates)), dtype, device, batch)
    measured: dict[str, Any] = {}

    def keep(run: Race) -> None:
        measured.update(results(run, workload, rounds))
        if json_out is not None:
            json_out.write_text(json.dumps(measured, indent=1) + "\n")

    race(names, workload, rounds, keep)
    tables.show(measured)
    if not measured["rows"]:
        raise click.ClickException("no contender was timed to the end, for the reasons above.")
    if plot_out is not None:
        plots.plot(measured, plot_out)
    if set(applicable(tuple(LADDER), arch, device)) <= set(names):
        tables.show_ladder(measured)
