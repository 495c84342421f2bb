"""From the start of a process to its first image: compiled from nothing, from torch's caches, and ahead of time.

    python -m benchmarks.cold_start --arch sd15 --size 32
    python -m benchmarks.cold_start --device cuda --arch sdxl --size 128 --steps 25 --gate-step 10

Each way runs in new processes; the clock starts before the process does, and the process imports everything, loads the
weights of denoiser and VAE from files, and makes two pictures from embedded prompts. Writes
benchmarks/results/cold_start.json, or cold_start-cuda.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import tgate_fx
from tgate_fx.bench.machine import machine, peak_gib
from tgate_fx.bench.workload import Workload

RESULTS = Path(__file__).parent / "results"


class Way(NamedTuple):
    """One way to a first image.

    Attributes:
        what: in words.
        settings: for `tgate_fx.compile`; None for `tgate_fx.gate`.
        does: "compile", "save" or "load".
        finds: the way that ran before, whose caches of torch's or whose artifact it finds.
        only_on: the device that it is for; None for every one.
    """

    what: str
    settings: dict[str, Any] | None
    does: str = "compile"
    finds: str | None = None
    only_on: str | None = None


_REGIONAL: dict[str, Any] = {"regional": True}
_GRAPHS: dict[str, Any] = {"mode": "reduce-overhead"}
_WAYS = {
    "eager": Way("gated, eager", None),
    "compiled": Way("compiled from nothing", {}),
    "cached": Way("compiled with torch's caches filled", {}, finds="compiled"),
    "save": Way("tgate_fx.save", {}, "save"),
    "loaded": Way("tgate_fx.load", {}, "load", "save"),
    "regional": Way("regional, from nothing", _REGIONAL),
    "regional-cached": Way("regional with torch's caches filled", _REGIONAL, finds="regional"),
    "regional-save": Way("tgate_fx.save of regions", _REGIONAL, "save"),
    "regional-loaded": Way("tgate_fx.load of regions", _REGIONAL, "load", "regional-save"),
    "unfrozen": Way("compiled without freezing, from nothing", {"options": {"freezing": False}}, only_on="cpu"),
    "graphs": Way("CUDA graphs, from nothing", _GRAPHS, only_on="cuda"),
    "graphs-cached": Way("CUDA graphs with torch's caches filled", _GRAPHS, finds="graphs", only_on="cuda"),
    "graphs-save": Way("tgate_fx.save of CUDA graphs", _GRAPHS, "save", only_on="cuda"),
    "graphs-loaded": Way("tgate_fx.load of CUDA graphs", _GRAPHS, "load", "graphs-save", "cuda"),
}
_DTYPES = {"cpu": "float32", "cuda": "float16"}


def child(way: Way, name: str, workload: Workload, work: Path, started: float) -> None:
    """One process: print what it measured as JSON."""
    times: dict[str, Any] = {}

    def mark(what: str) -> None:
        times[what] = time.time() - started

    pipe = workload.pipeline(work / "denoiser.pt")
    pipe.register_modules(vae=load_vae(work / "vae").to(workload.device, workload.torch_dtype))
    mark("pipeline")
    (gate,) = workload.gates
    if way.does == "load":
        tgate_fx.load(pipe, work / f"artifact-{way.finds}")
    elif way.settings is None:
        tgate_fx.gate(pipe, gate_step=gate)
    else:
        tgate_fx.compile(pipe, gate_step=gate, **way.settings)
    if way.does == "save":
        artifact = tgate_fx.save(pipe, work / f"artifact-{name}", **workload.inputs)
        mark("saved")
        files = [path for path in artifact.rglob("*") if path.is_file()]
        times["artifact_gib"] = sum(path.stat().st_size for path in files) / 2**30
    else:
        for image in ("first", "second"):
            begun = time.perf_counter()
            latents = workload.latents(pipe, workload.steps)
            on_cpu = latents.float().cpu().numpy()  # which waits for a GPU
            denoised = time.perf_counter()
            picture(pipe, latents).save(work / f"{name}.png")
            times[f"{image}_image_seconds"] = time.perf_counter() - begun
            times[f"{image}_decoding_seconds"] = time.perf_counter() - denoised
            mark(f"{image}_image")
        report = tgate_fx.report(pipe)
        for phase in ("pre-gate", "post-gate"):
            times[phase] = min(step.seconds for step in report.steps if step.phase == phase)
        times["graphs"] = report.compiled_graphs
        np.save(work / f"{name}.npy", on_cpu)
    times["peak_gib"] = peak_gib(workload.device)
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


def run(name: str, options: list[str], work: Path) -> dict[str, Any]:
    """Run one way in a process of its own, with torch's caches of its kind."""
    way = _WAYS[name]
    cache = work / f"cache-{way.finds if way.does == 'compile' and way.finds else name}"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TMPDIR": str(work)}
    command = [sys.executable, "-m", "benchmarks.cold_start", *options, "--work", str(work), "--way", name]
    result = subprocess.run(
        [*command, "--started", str(time.time())], env=environment, capture_output=True, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if line.startswith("measured:"):
            measured: dict[str, Any] = json.loads(line.removeprefix("measured:"))
            return measured
    raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")


@click.command()
@click.option("--arch", default="sd15", show_default=True)
@click.option("--device", type=click.Choice(sorted(_DTYPES)), default="cpu", show_default=True)
@click.option("--size", default=32, show_default=True, help="Latents per side.")
@click.option("--steps", default=6, show_default=True)
@click.option("--gate-step", "gate", default=3, show_default=True)
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where weights and artifacts go; a new folder if left out."
)
@click.option("--way", "name", type=click.Choice(list(_WAYS)), hidden=True)
@click.option("--started", type=float, default=0.0, hidden=True)
def main(
    arch: str, device: str, size: int, steps: int, gate: int, work: Path | None, name: str | None, started: float
) -> None:
    """Measure cold starts."""
    workload = Workload(arch, size, steps, (gate,), _DTYPES[device], device)
    if name is not None:
        assert work is not None
        child(_WAYS[name], name, workload, work, started)
        return
    options = ["--arch", arch, "--device", device, "--size", str(size), "--steps", str(steps), "--gate-step", str(gate)]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder)
        workload.save_denoiser(place / "denoiser.pt")
        save_vae(place / "vae")
        measured = {}
        for each, way in _WAYS.items():
            if way.only_on not in (None, device):
                continue
            print(f"{way.what} ...", flush=True)
            measured[each] = run(each, options, place)
            print(json.dumps(measured[each]), flush=True)
            if way.does != "save" and each != "eager":
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
        "machine": machine(device),
    }
    file = "cold_start.json" if device == "cpu" else f"cold_start-{device}.json"
    (RESULTS / file).write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title=f"{arch}, {size}x{size} latents, {steps} steps, gate {gate}")
    for heading in ("", "first image after s", "second image s", "pre-gate step s", "post-gate step s", "GiB"):
        table.add_column(heading)
    for each, times in measured.items():
        if _WAYS[each].does != "save":
            columns = (times["first_image"], times["second_image_seconds"], times["pre-gate"], times["post-gate"])
            table.add_row(_WAYS[each].what, *[f"{value:.2f}" for value in columns], f"{times['peak_gib']:.1f}")
    Console().print(table)
    print(f"cold compile {compiling:.0f} s; loaded to the first image: {result['loaded_share']:.2f} of that")


if __name__ == "__main__":
    main()
