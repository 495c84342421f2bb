"""What figures are measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..compiled import private
from ..compiled.cpu import cpuinfo

_PACKAGES = ("torch", "diffusers", "transformers", "tgate_fx", "tgate", "DeepCache", "openvino")


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the processor, its threads, the GPU if that is measured, and the versions of what is measured."""
    return {
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}),
        "cpu": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": bool({"avx512_bf16", "amx_bf16"} & set(cpuinfo("flags").split())),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_gib(), 1),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
    }


def processor() -> str:
    """Return the processor's name, family and model; a virtual machine may hide the rest."""
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    family, model = cpuinfo("cpu family"), cpuinfo("model\t")
    return f"{name} (family {family}, model {model})" if family and model else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_gib(device: str = "cpu") -> float:
    """Return all of this machine's or its GPU's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def peak_gib(device: str) -> float:
    """Return the most memory that this process had at once, ever or since `forget_peak`.

    On a GPU that is what torch's allocator has taken, with what CUDA graphs work in, which belongs to no tensor.
    """
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the most that the process had which started this one
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak(device: str) -> None:
    """Let `peak_gib` begin anew, where the system can do that: on Linux, and on a GPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


_GEMM_SIDES = {"cpu": 2048, "cuda": 8192}


def gemm_gflops(dtype: torch.dtype, device: str = "cpu", rounds: int = 7) -> float:
    """Return the GFLOP/s of a product of two square matrices: the median of a few, by the library that is faster.

    ``torch.mm`` takes MKL for float32; oneDNN, which compiled linear layers may take, is often faster.
    """
    side = _GEMM_SIDES[device]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    products: list[Callable[[], torch.Tensor]] = [lambda: torch.mm(left, right)]
    if device == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        products.append(lambda: private.onednn_product(left, right))
    return max(2 * side**3 / _median_seconds(product, rounds, device) / 1e9 for product in products)


def _median_seconds(run: Callable[[], object], rounds: int, device: str) -> float:
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])
