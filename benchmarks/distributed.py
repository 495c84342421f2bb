"""Prompts spread over several processes, of one machine or many: each has a gated pipeline of its own.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.distributed --out images

Nothing is exchanged while images are generated, so any number of processes may take part; the first one collects them.
With GPUs, `PartialState` gives each process its own and the backend is nccl; here it is gloo.
"""

from __future__ import annotations

import random
from pathlib import Path

import click
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL.Image import Image

import tgate_fx
from tgate_fx import demo
from tgate_fx.demo.scenes import random_scene


def generate(prompts: list[str], *, steps: int, compiled: bool) -> list[Image]:
    """An image of every prompt, in every process; the same ones for any number of processes."""
    # Loading while a process group exists keeps the group's threads until the interpreter ends, where gloo may abort.
    pipe = demo.load()
    state = PartialState(cpu=not torch.cuda.is_available())
    pipe.to(state.device)
    pipe.set_progress_bar_config(disable=not state.is_main_process)
    if compiled:
        tgate_fx.compile(pipe, gate_step=0.4)
    else:
        tgate_fx.gate(pipe, gate_step=0.4)
    with state.split_between_processes(list(enumerate(prompts))) as mine:
        images = [
            pipe(prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)).images[0]
            for seed, prompt in mine
        ]
    collected: list[Image] = gather_object(images)
    return collected


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder for the images.")
@click.option("--count", default=6, show_default=True, help="Of images.")
@click.option("--steps", default=25, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True)
def main(out: Path, count: int, steps: int, compiled: bool) -> None:
    """Generate images in several processes."""
    rng = random.Random(0)
    prompts = [random_scene(rng).caption(rng) for _ in range(count)]
    images = generate(prompts, steps=steps, compiled=compiled)
    state = PartialState()
    if state.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(out / f"{number}.png")
        print(f"{len(images)} images from {state.num_processes} processes in {out}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
