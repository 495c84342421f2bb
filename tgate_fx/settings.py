"""What torch.compile is given, and what that means on each device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UnsupportedError

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def _has_cuda_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def inductor_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What inductor itself takes, which knows no modes: the options that a mode stands for, and those given."""
    return {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}


@dataclass(frozen=True)
class CompileSettings:
    """What is handed on to torch.compile; ``fullgraph`` is always on.

    On a CPU, inductor's ``freezing`` is on unless ``mode`` or ``options["freezing"]`` says otherwise: it packs the
    weights for the CPU's kernels, and without it inductor is no faster than eager there. ``backend="openvino"`` is
    `tgate_fx.openvino`, which always holds the weights; its ``options`` are properties of OpenVINO's.
    """

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None
    regional: bool = False

    def __post_init__(self) -> None:
        """Refuse what OpenVINO and regions cannot do."""
        if self.regional and (self.options or {}).get("freezing"):
            raise UnsupportedError(
                'regional=True and options={"freezing": True} were both given: expected one of them, since a frozen '
                "graph holds the weights of one block, and would not serve those that are like it. Leave regional out "
                "to compile whole phases."
            )
        if self.backend != "openvino":
            return
        given = [name for name in ("mode", "dynamic", "regional") if getattr(self, name)]
        if given:
            raise UnsupportedError(
                f'backend="openvino" and {given[0]}={getattr(self, given[0])!r} were both given: expected whole phases '
                f"of one shape, and no mode. Leave {given[0]} out, or use inductor."
            )
        if importlib.util.find_spec("openvino") is None:
            raise UnsupportedError(
                'backend="openvino" was given, and OpenVINO is not installed: expected the package openvino. '
                "pip install 'tgate_fx[openvino]'."
            )

    def options_for(self, device: torch.device) -> dict[str, Any] | None:
        """The ``options`` for graphs on this device."""
        options = dict(self.options or {})
        if self.backend == "inductor" and self.mode is None and device.type == "cpu" and not self.regional:
            options.setdefault("freezing", True)
        return options or None

    def freezes(self, device: torch.device) -> bool:
        """Whether compiled graphs on this device hold the weights as they were when compiled."""
        if self.backend == "openvino":
            return True
        return self.backend == "inductor" and bool((self.options_for(device) or {}).get("freezing"))

    def replays(self, device: torch.device) -> bool:
        """Whether graphs on this device may be CUDA-graph replays, whose outputs the next replay overwrites."""
        options = self.options or {}
        return _has_cuda_graphs(device) and (self.mode in _CUDA_GRAPH_MODES or bool(options.get("triton.cudagraphs")))

    def fixes_addresses(self, device: torch.device) -> bool:
        """Whether graphs on this device read their caches where they are; a frozen one would hold them as constants."""
        return self.replays(device) and not self.freezes(device)

    def describe(self, device: torch.device) -> str:
        """The settings in force on this device, in words."""
        backend = self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", "custom backend")
        said = [f"mode={self.mode}"] if self.mode else []
        said += [f"{key}={value}" for key, value in (self.options_for(device) or {}).items()]
        said += [name for name in ("dynamic", "regional") if getattr(self, name)]
        return f"torch.compile ({', '.join([str(backend), *said])})"
