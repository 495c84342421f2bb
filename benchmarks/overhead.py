"""What tgate_fx and torch.compile's guards cost at each step, with the model's own arithmetic taken out.

Protocol: the pipeline is compiled by a backend that computes nothing (its graphs return tensors made beforehand), so
that a step's time is what is spent around the graph. A generation with a callback checks guards at every step, one
without does so at a phase's first step; figures are medians over the steps after the first of each phase.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

import tgate_fx
from benchmarks.architectures import TEXT_ENCODERS, stable_diffusion
from tests import tiny
from tgate_fx.bench.machine import machine


def nothing(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """Compile a graph to one that returns ready-made zeros of the right shapes."""
    (outputs,) = graph.graph.output_node().args
    examples = [node.meta["example_value"] for node in outputs]
    ready = tuple(torch.zeros(tuple(example.shape), dtype=example.dtype) for example in examples)
    return lambda *args: ready


def step_microseconds(pipe: Any, steps: int, **kwargs: Any) -> dict[str, float]:
    """The median microseconds of a step, by phase, leaving out each phase's first."""
    for _ in range(2):
        pipe("a cat", height=64, width=64, num_inference_steps=steps, output_type="latent", **kwargs)
    phases: dict[str, list[float]] = {}
    for step in tgate_fx.report(pipe).steps:
        phases.setdefault(step.phase, []).append(1e6 * step.seconds)
    return {phase: statistics.median(values[1:]) for phase, values in phases.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=["tiny", *TEXT_ENCODERS], action="append")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "steps": args.steps, "microseconds": {}}
    print(figures["machine"])
    print(f"{'':>6}  {'guards':>16}  {'pre-gate':>12}  {'post-gate':>12}")
    for arch in args.arch or ["tiny", "sd15"]:
        pipe = tiny.sd() if arch == "tiny" else stable_diffusion(arch)
        pipe.set_progress_bar_config(disable=True)
        tgate_fx.compile(pipe, gate_step=args.steps // 2, backend=nothing)
        for said, extra in (
            ("at every step", {"callback_on_step_end": lambda *_: {}}),
            ("once a phase", {}),
        ):
            medians = step_microseconds(pipe, args.steps, **extra)
            figures["microseconds"].setdefault(arch, {})[f"guards {said}"] = medians
            row = "  ".join(f"{medians[phase]:>9.0f} µs" for phase in ("pre-gate", "post-gate"))
            print(f"{arch:>6}  {said:>16}  {row}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
