"""What tgate_fx and torch.compile's guards cost at each step, with the model's own arithmetic taken out.

Protocol: the pipeline is compiled by a backend that computes nothing (its graphs return tensors made beforehand), so
that a step's time is what is spent around the graph. A generation with a callback checks guards at every step, one
without does so at a phase's first step; figures are medians over the steps after the first of each phase.

    python -m benchmarks.overhead

Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

import tgate_fx
from tests import tiny
from tgate_fx.architectures import ARCHITECTURES
from tgate_fx.bench.machine import machine
from tgate_fx.bench.workload import PIPELINES, Workload

RESULTS = Path(__file__).parent / "results" / "overhead.json"


def nothing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile a graph to one that returns ready-made zeros of the right shapes."""
    (outputs,) = graph.graph.output_node().args
    examples = [node.meta["example_value"] for node in outputs]
    ready = tuple(torch.zeros(tuple(example.shape), dtype=example.dtype) for example in examples)
    return lambda *args: ready


Generate = Callable[..., object]


def tiny_pipeline() -> tuple[Any, Generate]:
    """The tests' smallest pipeline, batch 2 under guidance; and how an image is generated."""
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe, functools.partial(pipe, "a cat", height=64, width=64, output_type="latent")


def full_pipeline(arch: str) -> tuple[Any, Generate]:
    """A model at full size, without text encoder and VAE; its latents do not matter, as nothing is computed."""
    pipe = PIPELINES[arch](ARCHITECTURES[arch].build("cpu"))
    pipe.set_progress_bar_config(disable=True)
    workload = Workload(arch, 8, 0, (), "float32")

    def generate(num_inference_steps: int, **kwargs: Any) -> object:
        return workload.latents(pipe, num_inference_steps, **kwargs)

    return pipe, generate


def step_microseconds(pipe: Any, generate: Generate, steps: int, **kwargs: Any) -> dict[str, float]:
    """The median microseconds of a step, by phase, leaving out each phase's first."""
    for _ in range(2):
        generate(num_inference_steps=steps, **kwargs)
    phases: dict[str, list[float]] = {}
    for step in tgate_fx.report(pipe).steps:
        phases.setdefault(step.phase, []).append(1e6 * step.seconds)
    return {phase: statistics.median(values[1:]) for phase, values in phases.items()}


@click.command()
@click.option("--arch", "archs", type=click.Choice(["tiny", *PIPELINES]), multiple=True, default=("tiny", "sd15"))
@click.option("--steps", type=click.IntRange(min=4), default=100, show_default=True)
def main(archs: tuple[str, ...], steps: int) -> None:
    """Measure it."""
    torch.set_grad_enabled(False)
    figures: dict[str, Any] = {"machine": machine(), "steps": steps, "microseconds": {}}
    print(f"{'':>6}  {'guards':>16}  {'pre-gate':>12}  {'post-gate':>12}")
    for arch in archs:
        pipe, generate = tiny_pipeline() if arch == "tiny" else full_pipeline(arch)
        tgate_fx.compile(pipe, gate_step=steps // 2, backend=nothing)
        for said, extra in (
            ("at every step", {"callback_on_step_end": lambda *_: {}}),
            ("once a phase", {}),
        ):
            medians = step_microseconds(pipe, generate, steps, **extra)
            figures["microseconds"].setdefault(arch, {})[f"guards {said}"] = medians
            row = "  ".join(f"{medians[phase]:>9.0f} µs" for phase in ("pre-gate", "post-gate"))
            print(f"{arch:>6}  {said:>16}  {row}")
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
