"""How long the first image takes after another LoRA was switched to: eagerly, compiled, and compiled and frozen.

    python -m benchmarks.lora_switch

The embedded pipeline, on which two LoRAs of random weights take turns by hotswap. Writes
benchmarks/results/lora_switch.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import peft
import torch
from tqdm import tqdm

import tgate_fx
from tgate_fx import demo
from tgate_fx.bench.machine import machine

RESULTS = Path(__file__).parent / "results" / "lora_switch.json"
STEPS, GATE, RANK = 10, 4, 8
PROMPT = "a large red star in the centre on a striped white background"
HOW: dict[str, dict[str, Any] | None] = {
    "gate, eager": None,
    "compile, not frozen": {"options": {"freezing": False}},
    "compile, frozen": {},
}


def lora(seed: int) -> dict[str, torch.Tensor]:
    """The weights of a LoRA for all attentions of the embedded UNet."""
    unet = demo.load().unet
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    unet.add_adapter(config, "a")
    return {
        f"unet.{name}": 0.1 * value for name, value in peft.get_peft_model_state_dict(unet, adapter_name="a").items()
    }


def copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New tensors: those that are loaded become the adapter's parameters, which the next hotswap writes to."""
    return {name: value.clone() for name, value in weights.items()}


def measure(settings: dict[str, Any] | None, weights: list[dict[str, torch.Tensor]], switches: int) -> dict[str, Any]:
    """Seconds of images before a switch, of the switch itself, and of the first image after it."""
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_lora_hotswap(target_rank=RANK)
    pipe.load_lora_weights(copied(weights[0]), adapter_name="one")
    if settings is None:
        tgate_fx.gate(pipe, GATE)
    else:
        tgate_fx.compile(pipe, GATE, **settings)

    def image() -> float:
        started = time.perf_counter()
        pipe(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="pt")
        return time.perf_counter() - started

    first = image()
    before = [image() for _ in range(3)]
    graphs = tgate_fx.report(pipe).compiled_graphs
    swapping, after = [], []
    for index in range(1, switches + 1):
        given = copied(weights[index % 2])
        started = time.perf_counter()
        pipe.load_lora_weights(given, adapter_name="one", hotswap=True)
        swapping.append(time.perf_counter() - started)
        after.append(image())
    return {
        "first_image": first,
        "image": statistics.median(before),
        "switch": statistics.median(swapping),
        "image_after_a_switch": statistics.median(after),
        "all_images_after_a_switch": after,
        "graphs_for_a_switch": (tgate_fx.report(pipe).compiled_graphs - graphs) / switches,
    }


@click.command()
@click.option("--switches", default=4, show_default=True, help="How often to switch.")
def main(switches: int) -> None:
    """Measure switches of a LoRA."""
    weights = [lora(0), lora(1)]
    rows = {name: measure(settings, weights, switches) for name, settings in tqdm(HOW.items())}
    RESULTS.write_text(json.dumps({"steps": STEPS, "gate": GATE, "rows": rows, "machine": machine()}, indent=1) + "\n")
    for name, row in rows.items():
        print(
            f"{name:<20} first image {row['first_image']:.1f} s, image {row['image']:.2f} s, switch "
            f"{row['switch']:.3f} s, image after it {row['image_after_a_switch']:.2f} s, "
            f"{row['graphs_for_a_switch']:g} graphs"
        )


if __name__ == "__main__":
    main()
