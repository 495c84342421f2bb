"""Many generations of one compiled pipeline, no two alike: no recompiles, no growth, nothing wrong.

    python -m benchmarks.soak

Prompts of different length, seeds, guidance scales, gates, numbers of steps, schedulers, negative prompts, callbacks,
and errors thrown in the middle are drawn at random; two resolutions take turns. Each result is compared with that of a
new pipeline, gated eagerly. Writes benchmarks/results/soak.json.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from tqdm import trange

import tgate_fx
from tgate_fx import demo
from tgate_fx.bench.machine import machine, peak_gib
from tgate_fx.demo.scenes import random_scene

RESULTS = Path(__file__).parent / "results" / "soak.json"
SCHEDULERS = (
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


class MidwayError(RuntimeError):
    """The error that is thrown in the middle of some generations."""


def soak(
    make: Callable[[], Any],
    generations: int,
    *,
    warm: int,
    tolerance: float,
    sizes: tuple[int, int],
    seed: int = 0,
    **compile_settings: Any,
) -> dict[str, Any]:
    """Run that many generations of one compiled pipeline.

    Args:
        make: makes a new pipeline, always with the same weights.
        generations: how many to run after the warm-up.
        warm: generations before those that count, beside those of `tgate_fx.warmup`.
        tolerance: how far latents may be from the new pipeline's, of the largest of these; 0 for equal.
        sizes: heights in pixels of the images, which take turns; the first is the width of all.
        seed: of what is drawn at random.
        compile_settings: handed to `tgate_fx.compile`.

    Returns:
        What was measured: ``recompiles``, ``errors_thrown``, ``largest_difference``, ``caches_moved``, and over the
        second half ``traced_growth_bytes`` (of Python's allocations) and ``resident_growth_mib``.
    """
    pipe = tgate_fx.compile(make(), gate_step=4, **compile_settings)
    for height in sizes:
        for guidance_scale in (5.0, 1.0):
            tgate_fx.warmup(pipe, height=height, width=sizes[0], guidance_scale=guidance_scale)
    graphs, addresses = tgate_fx.report(pipe).compiled_graphs, _addresses(pipe)
    rng = random.Random(seed)
    measured: dict[str, Any] = {"errors_thrown": 0, "largest_difference": 0.0}
    memory = resident = 0
    for index in trange(warm + generations):
        if index == warm:
            tracemalloc.start()
        if index == warm + generations // 2:
            gc.collect()
            memory, resident = tracemalloc.get_traced_memory()[0], _resident()
        _generate_both(pipe, make, (sizes[index % 2], sizes[0]), rng, measured)
        if measured["largest_difference"] > tolerance:
            raise AssertionError(f"generation {index} is {measured['largest_difference']} away from a new pipeline's")
    gc.collect()
    return {
        "generations": generations,
        **measured,
        "recompiles": tgate_fx.report(pipe).compiled_graphs - graphs,
        "graphs": graphs,
        "caches_moved": _addresses(pipe)[: len(addresses)] != addresses,
        "traced_growth_bytes": tracemalloc.get_traced_memory()[0] - memory,
        "resident_growth_mib": (_resident() - resident) / 2**20,
    }


def _generate_both(
    pipe: Any, make: Callable[[], Any], size: tuple[int, int], rng: random.Random, measured: dict[str, Any]
) -> None:
    steps = rng.randint(5, 9)
    call: dict[str, Any] = {
        "prompt": random_scene(rng).caption(rng),
        "negative_prompt": random_scene(rng).caption(rng) if rng.random() < 0.5 else None,
        "height": size[0],
        "width": size[1],
        "guidance_scale": rng.choice([1.0, rng.uniform(1.1, 15.0)]),
        "num_inference_steps": steps,
        "gate_step": rng.choice([None, *range(1, steps + 1), rng.uniform(0.1, 0.9)]),
        "output_type": "latent",
    }
    if rng.random() < 0.3:
        call["callback_on_step_end"] = lambda pipeline, index, timestep, values: values
    scheduler = getattr(diffusers, rng.choice(SCHEDULERS))
    number = rng.randrange(2**31)
    if rng.random() < 0.2:
        _throw_midway(pipe, call, rng.randrange(steps - 1), scheduler)
        measured["errors_thrown"] += 1
    latents = _latents(pipe, call, number, scheduler)
    expected = _latents(tgate_fx.gate(make(), gate_step=4), call, number, scheduler)
    difference = float((latents - expected).abs().max() / expected.abs().max())
    measured["largest_difference"] = max(measured["largest_difference"], difference)


def _latents(pipe: Any, call: dict[str, Any], seed: int, scheduler: type[Any]) -> torch.Tensor:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    latents: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(seed)).images
    return latents


def _throw_midway(pipe: Any, call: dict[str, Any], at: int, scheduler: type[Any]) -> None:
    def throw(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == at:
            raise MidwayError
        return values

    try:
        _latents(pipe, {**call, "callback_on_step_end": throw}, 0, scheduler)
    except MidwayError:
        return
    raise AssertionError("the error that was thrown in the middle did not come out")


def _addresses(pipe: Any) -> list[int]:
    return [buffer.data_ptr() for buffer in pipe._tgate.cache.buffers()]


def _resident() -> int:
    """The bytes of memory that this process has now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return int(peak_gib() * 2**30)


@click.command()
@click.option("--generations", default=200, show_default=True)
@click.option("--backend", default="inductor", show_default=True, help="Of torch.compile.")
def main(generations: int, backend: str) -> None:
    """Soak the embedded pipeline."""

    def make() -> Any:
        pipe = demo.load()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    started = time.perf_counter()
    measured = soak(make, generations, warm=20, tolerance=1e-3, sizes=(64, 48), backend=backend)
    result = {"backend": backend, "seconds": time.perf_counter() - started, **measured, "machine": machine()}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if measured["recompiles"] or measured["caches_moved"]:
        raise SystemExit("graphs were compiled again, or caches moved")


if __name__ == "__main__":
    main()
