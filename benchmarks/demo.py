"""Generate pictures with and without the gate, write them side by side as tgate-demo.png, and print the step times.

The pipeline is a small Stable Diffusion with RANDOM weights: its pictures are noise. They show what the gate changes in
time and in the result, not what a trained model would draw.

    python -m benchmarks.demo
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from PIL import Image

import tgate_fx
from tests import tiny

STEPS = 25
GATES = (None, 15, 10, 5)
SIZE = 64


def main() -> None:
    pipe = tiny.sd(block_out_channels=(64, 128), layers_per_block=2, attention_head_dim=16)
    tgate_fx.gate(pipe)
    print(
        f"Random weights: a Stable Diffusion pipeline of {sum(p.numel() for p in pipe.unet.parameters()):,} parameters."
    )
    columns: list[Image.Image] = []
    ungated = 0.0
    print(f"{'gate':>7}  {'s/image':>8}  {'gain':>6}  {'pre-gate step':>13}  {'post-gate step':>14}")
    generate(pipe, None)  # warm-up
    for gate in GATES:
        columns.append(generate(pipe, gate))
        steps = tgate_fx.report(pipe).steps
        seconds = sum(step.seconds for step in steps)
        ungated = ungated or seconds
        medians = [phase_median(steps, phase) for phase in ("pre-gate", "post-gate")]
        print(
            f"{gate or 'ungated':>7}  {seconds:>8.3f}  {ungated / seconds:>5.2f}x  {medians[0]:>13}  {medians[1]:>14}"
        )
    grid = Image.new("RGB", (sum(image.width for image in columns), columns[0].height))
    for index, image in enumerate(columns):
        grid.paste(image, (index * image.width, 0))
    grid.save("tgate-demo.png")
    print("tgate-demo.png: ungated, then gates " + ", ".join(str(gate) for gate in GATES[1:]))


def generate(pipe: Any, gate: int | None) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    size = {"height": SIZE, "width": SIZE}
    image: Image.Image = pipe(
        "a red cat", num_inference_steps=STEPS, generator=generator, gate_step=gate, **size
    ).images[0]
    return image


def phase_median(steps: tuple[tgate_fx.StepReport, ...], phase: str) -> str:
    seconds = [step.seconds for step in steps if step.phase == phase]
    return f"{1000 * statistics.median(seconds):.1f} ms" if seconds else "-"


if __name__ == "__main__":
    main()
