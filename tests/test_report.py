"""The report, and the cost of the dispatch that fills it."""

from __future__ import annotations

import subprocess
import sys

import tgate_fx
from tests import tiny


def test_before_the_first_generation() -> None:
    report = tgate_fx.report(tgate_fx.gate(tiny.sd()))
    assert report.steps == ()
    assert report.gate is None
    assert report.sites == 4
    assert report.compiled_graphs == report.recompiles == report.cache_bytes == 0


def test_step_by_step() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    report = tgate_fx.report(pipe)
    assert [(step.index, step.phase, step.batch) for step in report.steps] == [
        (0, "pre-gate", 4),
        (1, "pre-gate", 4),
        (2, "pre-gate", 4),
        (3, "post-gate", 2),
        (4, "post-gate", 2),
    ]
    assert all(0 < step.seconds < 5 for step in report.steps)
    assert report.gate == 3
    assert report.compiler == "eager"
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=2)
    assert len(tgate_fx.report(pipe).steps) == 2
    assert tgate_fx.report(pipe).gate is None


def test_cache_bytes_are_those_of_one_branch_of_the_sites_outputs() -> None:
    pipe = tgate_fx.gate(tiny.sd(), gate_step=3)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    pre, _ = tgate_fx.split(pipe.unet)
    import torch

    with torch.no_grad():
        _, cache = pre(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 7, tiny.TEXT_WIDTH))
    assert tgate_fx.report(pipe).cache_bytes == sum(tensor.nbytes for tensor in cache)
    tiny.latents(pipe, **tiny.inputs("sd", 2), num_inference_steps=5)
    assert tgate_fx.report(pipe).cache_bytes == sum(tensor.nbytes for tensor in cache)


def test_as_a_table() -> None:
    pipe = tgate_fx.compile(tiny.sd(), gate_step=1, backend="eager")
    tiny.latents(pipe, **tiny.inputs("sd"), num_inference_steps=2)
    lines = str(tgate_fx.report(pipe)).splitlines()
    assert lines[0] == "gate at step 1"
    assert "4 sites" in lines[1]
    assert "torch.compile (eager), 2 graphs compiled, 0 recompiles" in lines[1]
    assert lines[2].split() == ["step", "phase", "batch", "seconds"]
    assert [line.split()[:3] for line in lines[3:]] == [["0", "pre-gate", "2"], ["1", "post-gate", "1"]]
    assert all(line.endswith("compiled 1") for line in lines[3:])


def test_importing_is_cheap() -> None:
    """No model, pipeline or compiler is imported until it is needed."""
    check = (
        "import sys, tgate_fx; "
        "print([name for name in ('diffusers', 'transformers', 'torch._dynamo', 'torch._inductor') if name in "
        "sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
