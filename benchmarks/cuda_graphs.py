"""Gated pipelines under real CUDA graphs: the same results, no copies of caches, and what a step takes.

    python -m benchmarks.cuda_graphs --arch sdxl --dtype bfloat16

For a machine with a GPU; tests check the same under an emulation on the CPU. For each mode of torch.compile it compares
several generations with the eager gated pipeline, looks for recompiles and for graphs that were recorded again, and
prints a table.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import tgate_fx
from tgate_fx.bench.models import MODELS
from tgate_fx.bench.workload import Workload

MODES = (None, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.2}  # of the largest latent


def generate(pipe: Any, workload: Workload, seed: int) -> torch.Tensor:
    """The latents of one image."""
    return workload.latents(pipe, workload.steps, seed=seed, gate_step=workload.gates[0]).float()


def recordings() -> int:
    """How many CUDA graphs torch has recorded on this device so far."""
    trees = importlib.import_module("torch._inductor.cudagraph_trees")
    manager = trees.get_container(torch.cuda.current_device()).tree_manager
    return 0 if manager is None else manager.new_graph_id().id


def row(mode: str | None, workload: Workload, denoiser: Path) -> tuple[list[str], bool]:
    """One mode's row of the table, and whether all is right."""
    eager = tgate_fx.gate(workload.pipeline(denoiser))
    pipe = tgate_fx.compile(workload.pipeline(denoiser), mode=mode)
    expected = [generate(eager, workload, seed) for seed in range(4)]
    generate(pipe, workload, 0)  # compiles
    generate(pipe, workload, 0)  # records
    generate(pipe, workload, 0)
    counts = torch._dynamo.utils.counters["inductor"]
    recorded, copied = recordings(), counts["cudagraph_recorded_non_static_inputs"]
    difference = 0.0
    for seed, wanted in enumerate(expected):
        got = generate(pipe, workload, seed)
        difference = max(difference, float((got - wanted).abs().max() / wanted.abs().max()))
    report = tgate_fx.report(pipe)
    again = max(recordings() - recorded - 1, 0)  # asking takes a number too, where there is anything to ask
    right = difference <= _TOLERANCE[workload.dtype] and report.recompiles == 0 and again == 0
    if mode in ("reduce-overhead", "max-autotune"):  # which may also run without CUDA graphs, and say so in a log only
        right = right and recorded > 0 and counts["cudagraph_skips"] == 0
    seconds = {
        phase: [step.seconds for step in report.steps if step.phase == phase] for phase in ("pre-gate", "post-gate")
    }
    cells = [
        str(mode),
        f"{difference:.1e}",
        str(report.compiled_graphs),
        str(again),
        str(copied),
        *[f"{1000 * min(each):.2f}" for each in seconds.values()],
        "yes" if right else "NO",
    ]
    return cells, right


@click.command()
@click.option("--arch", type=click.Choice(list(MODELS)), default="sd15", show_default=True)
@click.option("--size", type=click.IntRange(min=8), help="Latents per side, if not the model's own.")
@click.option("--steps", default=25, show_default=True)
@click.option("--gate-step", default=10, show_default=True)
@click.option("--dtype", type=click.Choice(list(_TOLERANCE)), default="float16", show_default=True)
def main(arch: str, size: int | None, steps: int, gate_step: int, dtype: str) -> None:
    """Check gated pipelines under CUDA graphs."""
    if not torch.cuda.is_available():
        raise click.UsageError(
            "This needs a GPU with CUDA, and torch finds none. The same is checked under an emulation by "
            "pytest tests/test_cuda_graphs.py."
        )
    workload = Workload(arch, size, steps, (gate_step,), dtype, "cuda")
    table = Table(title=f"{arch}, latents {workload.latent_shape[1:]}, {dtype}, {torch.cuda.get_device_name()}")
    headings = (
        "mode",
        "difference",
        "graphs",
        "recorded again",
        "inputs copied",
        "pre-gate ms",
        "post-gate ms",
        "right",
    )
    for heading in headings:
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        denoiser = Path(folder) / "denoiser.pt"
        workload.save_denoiser(denoiser)
        wrong = []
        for mode in MODES:
            cells, right = row(mode, workload, denoiser)
            table.add_row(*cells)
            wrong += [] if right else [str(mode)]
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.cuda.empty_cache()
    Console().print(table)
    if wrong:
        raise SystemExit(f"not right: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
