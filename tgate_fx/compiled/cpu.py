"""The processor that code is compiled for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


def processor(device: torch.device) -> dict[str, str]:
    """Return what code for a device is compiled for: the kind of processor, its instructions, and on a CPU the threads.

    Inductor writes the number of threads into its loops and into the arrays in which they leave their parts of a sum.
    """
    if device.type == "cuda":
        return {
            "device": "cuda",
            "name": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    return {
        "device": device.type,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
        "threads": str(torch.get_num_threads()),
    }


def cpuinfo(key: str) -> str:
    """Return what Linux says of the first processor under this key; empty if it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


@functools.cache
def _instructions() -> str:
    """Return the vector and matrix instructions that Linux says this processor has."""
    kinds = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()  # x86 or ARM
    return " ".join(sorted(flag for flag in flags if flag.startswith(kinds)))
