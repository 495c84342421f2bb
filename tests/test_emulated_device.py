"""Every pipeline on a device beside the CPU, emulated: right there, and the host waits no more between the steps."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import tgate_fx
from tests import emulated_device, tiny, zoo
from tests.emulated_device import DEVICE, OnDevice
from tests.test_compile import relative_error
from tests.test_families import ENTRIES, FIRST, GATE, by_hooks

pytestmark = pytest.mark.skipif(not emulated_device.IS_AVAILABLE, reason="this torch cannot emulate a device")

# What cannot be moved to the device.
LEFT_OUT = {
    "BlipDiffusionControlNetPipeline": "the tests' model of a subject is on the CPU",
    "BlipDiffusionPipeline": "the tests' model of a subject is on the CPU",
    "LTX2DFRTemporalRefinePipeline": "draws random numbers on the device, which are not emulated",
    "SemanticStableDiffusionPipeline": "torch.quantile squeezes a tensor in place, which is not emulated",
    "StableDiffusionPipeline IP-Adapters FaceID Plus": "the tests put embeddings in its projection",
    "StableDiffusionPipelineSafe": "numpy reads a picture from the device, which is not emulated",
}
PARTS = 8  # processes for all of them

# Without, with and after a gate: what a step may wait for differs.
RULES: list[dict[str, Any]] = [
    {"gate_step": 3, "cache_weight": 1.0, "after_gate": "guided", "forecast": 2, "full_steps": (5,)},
    {"gate_step": 3, "sp_interval": 2, "fi_interval": 2},
    {"gate_step": 3, "deepcache": tgate_fx.DeepCache(interval=2, branch=0, order=1)},
    {"gate_step": None, "guidance": (2, 5)},
]


def here(value: Any) -> torch.Tensor:
    return value.held if isinstance(value, OnDevice) else torch.as_tensor(value)


def moved(entry: zoo.Entry) -> zoo.Entry:
    """The same with everything that is not an image on the device, as its own text encoder would put it there."""

    def inputs() -> dict[str, Any]:
        given = entry.inputs()
        stays = [name for name in given if ("image" in name or "video" in name) and "embeds" not in name]
        put = tree_map(lambda each: each.to(DEVICE) if isinstance(each, torch.Tensor) else each, given)
        return {**put, **{name: given[name] for name in stays}}

    return dataclasses.replace(entry, inputs=inputs)


def waits_of(generate: Any) -> tuple[torch.Tensor, Counter[str]]:
    """What is generated, and what the host waits for meanwhile."""
    emulated_device.waits.clear()
    result = here(generate())
    return result, Counter(emulated_device.waits)


def check_entry(entry: zoo.Entry) -> None:
    """Gated, the pipeline gives what plain hooks give on the device, and waits no more than ungated, but at first."""
    entry = moved(entry)
    pipe = entry.make().to(DEVICE)
    _, plain = waits_of(lambda: entry.run(pipe))
    expected, _ = by_hooks(pipe, entry, GATE)
    tgate_fx.gate(pipe, GATE, after_gate=entry.after_gate, **entry.settings)
    result, gated = waits_of(lambda: entry.run(pipe))
    assert relative_error(result, here(expected)) < 1e-5
    more = gated - plain
    loops = len(tgate_fx.report(pipe).steps) // (entry.loop or zoo.STEPS) or 1
    # Whether both branches arrive as is assumed, once for each network; and how many steps there will be.
    assert more.pop("a comparison", 0) <= loops * (len(entry.denoisers) + len(entry.companions))
    assert more.pop("a list", 0) <= loops
    assert more.pop("a number", 0) <= loops
    assert not more


def check_rule(rule: dict[str, Any]) -> None:
    """The steps of a rule wait no more than ungated ones: twice as many make the same difference."""
    kwargs = {**tiny.inputs("sd-small"), "output_type": "latent"}
    for scheduler in ("DDIM", "EulerDiscrete"):
        waits = []
        for gate in (lambda pipe, **_: pipe, tgate_fx.gate):
            pipe = tiny.make("sd-small")
            config = {"prediction_type": "v_prediction"}
            pipe.scheduler = type(tiny.scheduler(scheduler)).from_config(tiny.scheduler(scheduler).config, **config)
            pipe = gate(pipe.to(DEVICE), **rule)
            few, many = (
                waits_of(lambda pipe=pipe, steps=steps: pipe(**kwargs, num_inference_steps=steps).images)[1]
                for steps in (8, 16)
            )
            waits.append(many - few)
        assert not waits[1] - waits[0], f"{rule} with {scheduler}: {waits}"


def main(names: list[str]) -> None:
    """Check these entries; without any, the rules."""
    torch.set_num_threads(1)
    emulated_device.register()
    for rule in RULES if not names else ():
        check_rule(rule)
    for entry in ENTRIES:
        if entry.pipeline in names:
            print(entry.pipeline, flush=True)
            check_entry(entry)


def run_apart(names: list[str]) -> None:
    """In a process of its own, for torch never forgets a device."""
    code = f"from tests.test_emulated_device import main; main({names!r})"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.stdout[-500:]}\n{run.stderr[-3000:]}"


def test_the_first_pipelines_are_right_on_a_device() -> None:
    run_apart(list(FIRST))


def test_no_rule_waits_between_the_steps() -> None:
    run_apart([])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_pipeline_is_right_on_a_device(part: int) -> None:
    run_apart([entry.pipeline for entry in ENTRIES if entry.pipeline not in {*LEFT_OUT, *FIRST}][part::PARTS])
