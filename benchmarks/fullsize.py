"""Generate with a full-size pipeline, gated and compiled, and print what a step costs in each phase.

Protocol: random weights (a step costs the same); one process; the eager and the compiled pipeline share one denoiser
and take turns; the first generation of each is a warm-up, of which only the compile time is reported; a phase's figure
is the median over its steps in all later generations. Results must agree before anything is printed.

    python -m benchmarks.fullsize --arch sd15 --latent 32 --steps 6 --gate 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

import tgate_fx
from benchmarks.architectures import TEXT_ENCODERS, stable_diffusion
from tgate_fx.bench.machine import peak_gib, processor

PROMPT = "a photograph of an astronaut riding a horse on the moon, highly detailed"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {"cpu": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def generate(pipe: Any, args: argparse.Namespace, output_type: str) -> tuple[Any, float]:
    """One generation: its result and its seconds."""
    started = time.perf_counter()
    result = pipe(
        args.prompt,
        height=args.latent * pipe.vae_scale_factor,
        width=args.latent * pipe.vae_scale_factor,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        return_dict=False,
    )[0]
    return result, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TEXT_ENCODERS, default="sd15")
    parser.add_argument("--latent", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gate", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="timed generations of each")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    compiled = stable_diffusion(args.arch)
    eager = StableDiffusionPipeline(**compiled.components, requires_safety_checker=False)
    pipes = {"eager": tgate_fx.gate(eager, args.gate), "compiled": tgate_fx.compile(compiled, args.gate)}
    print(f"{args.arch}, latents {args.latent}x{args.latent}, {args.steps} steps, gate {args.gate}")
    print(f"{len(tgate_fx.sites(compiled))} sites")

    steps: dict[str, dict[str, list[float]]] = {name: {"pre-gate": [], "post-gate": []} for name in pipes}
    warm_up, peak, latents = {}, {}, {}
    for round_ in range(args.rounds + 1):
        for name, pipe in pipes.items():
            latents[name], seconds = generate(pipe, args, "latent")
            if round_ == 0:
                warm_up[name], peak[name] = seconds, peak_gib()
                continue
            for step in tgate_fx.report(pipe).steps:
                steps[name][step.phase].append(step.seconds)
    error = float((latents["eager"] - latents["compiled"]).abs().max() / latents["eager"].abs().max())
    if not error < 1e-3:
        raise SystemExit(f"The compiled pipeline disagrees with the eager one: relative error {error:.2e}.")
    images, total = generate(compiled, args, "np")

    figures: dict[str, Any] = {
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "machine": machine(),
        "compiler": tgate_fx.report(compiled).compiler,
        "seconds": {
            name: {phase: statistics.median(values) for phase, values in phases.items() if values}
            for name, phases in steps.items()
        },
        "all_seconds": steps,
        "first_generation_seconds": warm_up,
        "peak_gib": peak,
        "relative_error": error,
    }
    print(f"{'':>10}  {'pre-gate':>9}  {'post-gate':>9}  {'first run':>9}  {'peak':>9}")
    for name, medians in figures["seconds"].items():
        row = "  ".join(f"{medians.get(phase, float('nan')):>7.2f} s" for phase in ("pre-gate", "post-gate"))
        print(f"{name:>10}  {row}  {warm_up[name]:>7.1f} s  {peak[name]:>5.2f} GiB")
    print(f"compiled and eager latents differ by {error:.1e} of the largest; {tgate_fx.report(compiled).compiler}")
    print(f"a compiled generation with text encoder and VAE: {total:.1f} s, image {images.shape[1]}x{images.shape[2]}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
