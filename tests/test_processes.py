"""Gated pipelines in worker processes and threads of one program, and on several machines."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend

CALL = {"height": 16, "width": 16, "num_inference_steps": 6}


def compiled() -> Any:
    return tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend="eager")


def generate(pipe: Any, seed: int) -> torch.Tensor:
    return tiny.latents(pipe, **{**tiny.inputs("sd"), **CALL, "seed": seed})


def spawned(seed: int) -> np.ndarray[Any, Any]:
    """What a spawned worker does: it makes a pipeline of its own."""
    torch.set_num_threads(1)
    return generate(compiled(), seed).numpy()


_inherited: Any = None


def forked(seed: int) -> np.ndarray[Any, Any]:
    """What a forked worker does: it goes on with the pipeline that it was forked with, graphs included."""
    with torch.compiler.set_stance("fail_on_recompile"):
        return generate(_inherited, seed).numpy()


@pytest.mark.slow
def test_spawned_workers_have_pipelines_of_their_own() -> None:
    expected = generate(tgate_fx.gate(tiny.make("sd-small"), gate_step=2), 3).numpy()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(pool.apply(spawned, (3,)), expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_workers_inherit_a_compiled_pipeline() -> None:
    global _inherited
    _inherited = compiled()
    expected = [generate(_inherited, seed).numpy() for seed in (3, 4)]
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for got, wanted in zip(pool.map(forked, (3, 4), chunksize=1), expected, strict=True):
                assert np.array_equal(got, wanted)
        assert np.array_equal(generate(_inherited, 3).numpy(), expected[0])
    finally:
        _inherited = None


def test_a_gated_pipeline_is_not_sent_to_a_worker() -> None:
    refused = pytest.raises(tgate_fx.StateError, match="neither copied nor pickled")
    with multiprocessing.get_context("spawn").Pool(1) as pool, refused:
        pool.apply(type, (compiled(),))


def test_generations_of_two_pipelines_run_at_once() -> None:
    pipes = [tgate_fx.gate(tiny.make("sd-small"), gate_step=2) for _ in range(2)]
    expected = tiny.latents(pipes[0], **tiny.inputs("sd-small"), num_inference_steps=4)
    met = threading.Barrier(2, timeout=60)

    def meet(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        met.wait()
        return {}

    call = {**tiny.inputs("sd-small"), "num_inference_steps": 4, "callback_on_step_end": meet}
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda pipe: tiny.latents(pipe, **call), pipes):
            assert torch.equal(got, expected)


@pytest.mark.slow
def test_pipelines_in_two_threads_compile_at_once() -> None:
    expected = [generate(tgate_fx.gate(tiny.make("sd-small"), gate_step=2), seed) for seed in range(2)]
    backends = [CountingBackend(), CountingBackend()]
    pipes = [tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend=backend) for backend in backends]
    ready, got = threading.Barrier(2), [[], []]  # type: tuple[threading.Barrier, list[list[torch.Tensor]]]

    def work(index: int) -> None:
        ready.wait()
        for _ in range(3):
            got[index].append(generate(pipes[index], index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, backend in enumerate(backends):
        assert len(got[index]) == 3
        assert all(torch.equal(latents, expected[index]) for latents in got[index])
        assert len(backend.graphs) == 2


@pytest.mark.slow
def test_two_gloo_processes_generate_what_one_does(tmp_path: Path) -> None:
    """The example in benchmarks/distributed.py, with one process and with two."""
    options = ["--count", "3", "--steps", "3", "--no-compile"]
    for processes in (1, 2):
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        out = tmp_path / str(processes)
        command = [*run, "-m", "benchmarks.distributed", "--out", str(out), *options]
        # Two processes would have one thread each, one would have more and round in another way.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert f"3 images from {processes} processes" in result.stdout
    for number in range(3):
        pictures = []
        for processes in ("1", "2"):
            with Image.open(tmp_path / processes / f"{number}.png") as image:
                pictures.append(np.asarray(image))
        assert np.array_equal(*pictures)
