"""From the start of a process to its first image: compiled from nothing, from torch's caches, and ahead of time.

    python -m benchmarks.cold_start --arch sd15 --size 32

Each way runs in new processes; the clock starts before the process does, and the process imports everything, loads the
weights of denoiser and VAE from files, and makes two pictures from embedded prompts. Writes
benchmarks/results/cold_start.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "cold_start.json"
# What each way does, in the order in which they run; "cached" finds what "compiled" has left in torch's caches.
WAYS = {
    "eager": "gated, eager",
    "compiled": "compiled from nothing",
    "cached": "compiled with torch's caches filled",
    "save": "tgate_fx.save",
    "loaded": "tgate_fx.load",
    "regional": "regional, from nothing",
    "regional-cached": "regional with torch's caches filled",
    "unfrozen": "compiled without freezing, from nothing",
}

_FINDS_CACHES_OF = {"cached": "compiled", "regional-cached": "regional"}


def child(way: str, arch: str, size: int, steps: int, gate: int, work: Path, started: float) -> None:
    """One process: print what it measured as JSON."""
    times: dict[str, Any] = {}

    def mark(name: str) -> None:
        times[name] = time.time() - started

    import tgate_fx
    from tgate_fx.bench.machine import peak_gib
    from tgate_fx.bench.workload import Workload

    workload = Workload(arch, size, steps, (gate,), "float32")
    pipe = workload.pipeline(work / "denoiser.pt")
    pipe.register_modules(vae=load_vae(work / "vae"))
    mark("pipeline")
    if way == "eager":
        tgate_fx.gate(pipe, gate_step=gate)
    elif way == "loaded":
        tgate_fx.load(pipe, work / "artifact")
    else:
        options = {"freezing": False} if way == "unfrozen" else None
        tgate_fx.compile(pipe, gate_step=gate, regional=way.startswith("regional"), options=options)
    if way == "save":
        tgate_fx.save(pipe, work / "artifact", **workload.inputs)
        mark("saved")
        files = [path for path in (work / "artifact").rglob("*") if path.is_file()]
        times["artifact_gib"] = sum(path.stat().st_size for path in files) / 2**30
    else:
        for name in ("first", "second"):
            begun = time.perf_counter()
            latents = workload.latents(pipe, steps)
            denoised = time.perf_counter()
            picture(pipe, latents).save(work / f"{way}.png")
            times[f"{name}_image_seconds"] = time.perf_counter() - begun
            times[f"{name}_decoding_seconds"] = time.perf_counter() - denoised
            mark(f"{name}_image")
        report = tgate_fx.report(pipe)
        for phase in ("pre-gate", "post-gate"):
            times[phase] = min(step.seconds for step in report.steps if step.phase == phase)
        times["graphs"] = report.compiled_graphs
        np.save(work / f"{way}.npy", latents.numpy())
    times["peak_gib"] = peak_gib("cpu")
    print("measured:" + json.dumps(times))


def save_vae(folder: Path) -> None:
    """A VAE with random weights, of the size that Stable Diffusion's and PixArt's have."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    ).save_pretrained(folder)


def load_vae(folder: Path) -> Any:
    """The VAE that `save_vae` wrote."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder)


@torch.inference_mode()
def picture(pipe: Any, latents: torch.Tensor) -> Any:
    """What a pipeline makes of its last latents: the decoded PIL image."""
    image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return pipe.image_processor.postprocess(image, output_type="pil")[0]


def run(way: str, options: list[str], work: Path) -> dict[str, Any]:
    """Run one way in a process of its own, with torch's caches of its kind."""
    cache = work / f"cache-{_FINDS_CACHES_OF.get(way, way)}"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(work)}
    command = [sys.executable, "-m", "benchmarks.cold_start", *options, "--work", str(work), "--way", way]
    result = subprocess.run(
        [*command, "--started", str(time.time())], env=environment, capture_output=True, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith("measured:"):
            measured: dict[str, Any] = json.loads(line.removeprefix("measured:"))
            return measured
    raise SystemExit(f"{way} failed:\n{result.stderr[-3000:]}")


@click.command()
@click.option("--arch", default="sd15", show_default=True)
@click.option("--size", default=32, show_default=True, help="Latents per side.")
@click.option("--steps", default=6, show_default=True)
@click.option("--gate-step", "gate", default=3, show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where weights and artifacts go; a new folder if left out."
)
@click.option("--way", type=click.Choice(list(WAYS)), hidden=True)
@click.option("--started", type=float, default=0.0, hidden=True)
def main(arch: str, size: int, steps: int, gate: int, work: Path | None, way: str | None, started: float) -> None:
    """Measure cold starts."""
    if way is not None:
        assert work is not None
        child(way, arch, size, steps, gate, work, started)
        return
    from tgate_fx.bench.machine import machine
    from tgate_fx.bench.workload import Workload

    options = ["--arch", arch, "--size", str(size), "--steps", str(steps), "--gate-step", str(gate)]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder)
        Workload(arch, size, steps, (gate,), "float32").save_denoiser(place / "denoiser.pt")
        save_vae(place / "vae")
        measured = {}
        for each in WAYS:
            print(f"{WAYS[each]} ...", flush=True)
            measured[each] = run(each, options, place)
            print(json.dumps(measured[each]), flush=True)
            if each not in ("eager", "save"):
                expected, got = np.load(place / "eager.npy"), np.load(place / f"{each}.npy")
                measured[each]["error"] = float(np.abs(got - expected).max() / np.abs(expected).max())
    compiling = measured["compiled"]["first_image_seconds"] - measured["compiled"]["second_image_seconds"]
    result = {
        "arch": arch,
        "latents": size,
        "steps": steps,
        "gate": gate,
        "cold_compile_seconds": compiling,
        "loaded_share": measured["loaded"]["first_image"] / compiling,
        "ways": measured,
        "machine": machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title=f"{arch}, {size}x{size} latents, {steps} steps, gate {gate}")
    for heading in ("", "first image after s", "second image s", "pre-gate step s", "post-gate step s", "GiB"):
        table.add_column(heading)
    for each, times in measured.items():
        if each != "save":
            columns = (times["first_image"], times["second_image_seconds"], times["pre-gate"], times["post-gate"])
            table.add_row(WAYS[each], *[f"{value:.2f}" for value in columns], f"{times['peak_gib']:.1f}")
    Console().print(table)
    print(f"cold compile {compiling:.0f} s; loaded to the first image: {result['loaded_share']:.2f} of that")


if __name__ == "__main__":
    main()
