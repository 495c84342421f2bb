"""Many generations of one compiled pipeline, no two alike: no recompiles, no growth, nothing wrong.

    python -m benchmarks.soak

Prompts of different length, seeds, guidance scales, gates, numbers of steps, schedulers, negative prompts, callbacks,
and errors thrown in the middle are drawn at random; two resolutions take turns. Each result is compared with that of a
new pipeline, gated eagerly; in the end the first few are generated again, and must be equal to what they were. Writes
benchmarks/results/soak.json.
"""

from __future__ import annotations

import gc
import json
import random
import resource
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from tqdm import tqdm

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


_AGAIN = 5  # generations that are run again in the end


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
    rng = random.Random(seed)
    cases = [_draw((sizes[index % 2], sizes[0]), rng) for index in range(warm + generations)]
    # First, so that the memory measured below is the compiled pipeline's alone: loading a model leaves some behind.
    expected = [_latents(tgate_fx.gate(make(), gate_step=4), case) for case in tqdm(cases, "new pipelines")]
    pipe = tgate_fx.compile(make(), gate_step=4, **compile_settings)
    for height in sizes:
        for guidance_scale in (5.0, 1.0):
            tgate_fx.warmup(pipe, height=height, width=sizes[0], guidance_scale=guidance_scale)
    graphs, addresses = tgate_fx.report(pipe).compiled_graphs, _addresses(pipe)
    largest = 0.0
    memory = resident = 0
    again = {}
    for index, case in enumerate(tqdm(cases, "compiled")):
        if index == warm:
            tracemalloc.start()
        if index == warm + generations // 2:
            gc.collect()
            memory, resident = tracemalloc.get_traced_memory()[0], _resident()
        if case.throw_at is not None:
            _throw_midway(pipe, case)
        latents = _latents(pipe, case)
        if warm <= index < warm + _AGAIN:
            again[index] = latents
        difference = float((latents - expected[index]).abs().max() / expected[index].abs().max())
        if difference > tolerance:
            raise AssertionError(f"generation {index} is {difference} away from a new pipeline's")
        largest = max(largest, difference)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - memory, (_resident() - resident) / 2**20
    tracemalloc.stop()  # everything takes several times as long under it
    for index, latents in again.items():
        if not torch.equal(_latents(pipe, cases[index]), latents):
            raise AssertionError(f"generation {index} is another after {generations} more")
    return {
        "generations": generations,
        "errors_thrown": sum(case.throw_at is not None for case in cases[warm:]),
        "largest_difference": largest,
        "recompiles": tgate_fx.report(pipe).compiled_graphs - graphs,
        "graphs": graphs,
        # The first generation with a callback adds buffers, for a branch of its own.
        "caches_moved": not set(addresses) <= set(_addresses(pipe)),
        "traced_growth_bytes": grown[0],
        "resident_growth_mib": grown[1],
    }


@dataclass(frozen=True)
class _Case:
    """One generation: its arguments, and after which step an earlier try of it fails, if at all."""

    call: dict[str, Any]
    scheduler: type[Any]
    seed: int
    throw_at: int | None


def _draw(size: tuple[int, int], rng: random.Random) -> _Case:
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
    return _Case(call, scheduler, rng.randrange(2**31), rng.randrange(steps - 1) if rng.random() < 0.2 else None)


def _latents(pipe: Any, case: _Case) -> torch.Tensor:
    pipe.scheduler = case.scheduler.from_config(pipe.scheduler.config)
    latents: torch.Tensor = pipe(**case.call, generator=torch.Generator().manual_seed(case.seed)).images
    return latents


def _throw_midway(pipe: Any, case: _Case) -> None:
    def throw(pipeline: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == case.throw_at:
            raise MidwayError
        return values

    try:
        _latents(pipe, replace(case, call={**case.call, "callback_on_step_end": throw}))
    except MidwayError:
        return
    raise AssertionError("the error that was thrown in the middle did not come out")


def _addresses(pipe: Any) -> list[int]:
    return [buffer.data_ptr() for each in pipe._tgate.networks for buffer in each.cache.buffers()]


def _resident() -> int:
    """The bytes of memory that this process has now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return int(peak_gib("cpu") * 2**30)


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
    if measured["traced_growth_bytes"] > 2**18 or measured["resident_growth_mib"] > 8:
        raise SystemExit("memory grew")


if __name__ == "__main__":
    main()
