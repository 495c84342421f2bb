"""What tgate_fx and torch.compile's guards cost at each step, with the model's own arithmetic taken out.

Protocol: the pipeline is compiled by a backend that computes nothing (its graphs return tensors made beforehand), so
that a step's time is what is spent around the graph. A generation with a callback checks guards at every step, one
without does so at a phase's first step; figures are medians over the steps after the first of each phase. Where guards
are checked once a phase, a step is also told apart: what torch's compiled function takes, which hands every weight and
cached tensor to the graph, and the rest, which is tgate_fx's own dispatch.

    python -m benchmarks.overhead

Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import tgate_fx
from tests import tiny
from tgate_fx.bench.machine import machine
from tgate_fx.bench.models import MODELS
from tgate_fx.bench.workload import Workload
from tgate_fx.compiled.variant import Variant
from tgate_fx.macs.architectures import ARCHITECTURES

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
    pipe = MODELS[arch].pipeline(ARCHITECTURES[arch].build("cpu"))
    pipe.set_progress_bar_config(disable=True)
    workload = Workload(arch, 8 if ARCHITECTURES[arch].latents is None else None, 0, (), "float32")

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


class _Timed:
    """In the place of `Variant.unguarded`: the same function, its calls timed."""

    def __init__(self, seconds: list[float]) -> None:
        self._seconds = seconds

    def __set__(self, variant: Variant, function: Callable[..., Any] | None) -> None:
        def timed(*args: Any) -> Any:
            assert function is not None
            started = time.perf_counter()
            result = function(*args)
            self._seconds.append(time.perf_counter() - started)
            return result

        vars(variant)["unguarded"] = None if function is None else timed

    def __get__(self, variant: Variant, owner: type[Variant]) -> Callable[..., Any] | None:
        timed: Callable[..., Any] | None = vars(variant)["unguarded"]
        return timed


@contextmanager
def _compiled_functions_timed() -> Iterator[list[float]]:
    """While this lasts, the seconds of every call of a compiled function whose guards are not checked are listed."""
    seconds: list[float] = []
    with mock.patch.object(Variant, "unguarded", _Timed(seconds), create=True):
        yield seconds


def dispatch_microseconds(pipe: Any, generate: Generate, steps: int) -> dict[str, float]:
    """The median microseconds of a step by phase, without those within its compiled function; gated at half the steps.

    Guards are checked at the first step of each phase, which is left out.
    """
    with _compiled_functions_timed() as compiled:
        step_microseconds(pipe, generate, steps)
        inside = [1e6 * seconds for seconds in compiled[2 - steps :]]  # of the last generation
    phases: dict[str, list[float]] = {}
    guarded: set[str] = set()
    for step in tgate_fx.report(pipe).steps:
        if step.phase in guarded:
            phases.setdefault(step.phase, []).append(1e6 * step.seconds - inside.pop(0))
        guarded.add(step.phase)
    return {phase: statistics.median(values) for phase, values in phases.items()}


@click.command()
@click.option("--arch", "archs", type=click.Choice(["tiny", *MODELS]), multiple=True, default=("tiny", "sd15"))
@click.option("--steps", type=click.IntRange(min=4), default=100, show_default=True)
def main(archs: tuple[str, ...], steps: int) -> None:
    """Measure it."""
    torch.set_grad_enabled(False)
    figures: dict[str, Any] = {"machine": machine(), "steps": steps, "microseconds": {}}
    print(f"{'':>6}  {'':>26}  {'pre-gate':>12}  {'post-gate':>12}")

    def show(arch: str, name: str, medians: dict[str, float]) -> None:
        figures["microseconds"].setdefault(arch, {})[name] = medians
        row = "  ".join(f"{medians[phase]:>9.0f} µs" for phase in ("pre-gate", "post-gate"))
        print(f"{arch:>6}  {name:>26}  {row}")

    for arch in archs:
        pipe, generate = tiny_pipeline() if arch == "tiny" else full_pipeline(arch)
        tgate_fx.compile(pipe, gate_step=steps // 2, backend=nothing)
        every_step: dict[str, Any] = {"callback_on_step_end": lambda *_: {}}
        show(arch, "guards at every step", step_microseconds(pipe, generate, steps, **every_step))
        show(arch, "guards once a phase", step_microseconds(pipe, generate, steps))
        show(arch, "of it the dispatch", dispatch_microseconds(pipe, generate, steps))
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
