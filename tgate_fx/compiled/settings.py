"""The settings of torch.compile, and their meaning on each device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import ArgumentError, UnsupportedError
from . import private

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def _has_cuda_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def options_with_mode(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what inductor itself takes, which knows no modes: the options that a mode stands for, and those given."""
    return {**(private.mode_options(mode) if mode else {}), **(options or {})}


def _nothing() -> None:
    """Is what torch.compile is given to look at settings."""


@dataclass(frozen=True)
class CompileSettings:
    """What is handed on to torch.compile; ``fullgraph`` is always on.

    On a CPU, inductor's ``freezing`` is on unless ``mode`` or ``options["freezing"]`` says otherwise: it packs the
    weights for the CPU's kernels, and without it inductor is no faster than eager there. It is off for a denoiser with
    quantized weights. ``backend="openvino"`` is `tgate_fx.compiled.openvino`, which always holds the weights; its
    ``options`` are properties of OpenVINO's.
    """

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    dynamic: bool | None = None
    options: Mapping[str, Any] | None = None
    regional: bool = False

    def __post_init__(self) -> None:
        """Refuse what torch.compile does not take, and what OpenVINO, regions and torch's cudagraphs cannot do."""
        self._check_kinds()
        if self.backend == "cudagraphs":
            raise UnsupportedError(
                'backend="cudagraphs" was given, whose replays overwrite what they gave before: expected CUDA graphs '
                'of inductor, whose results are copied in time. Give mode="reduce-overhead" in place of it.'
            )
        if isinstance(self.backend, str) and self.backend != "openvino":
            self._check_by_torch(self.backend)
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

    def _check_kinds(self) -> None:
        options = self.options
        is_options = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
        for name, is_right, expected in (
            ("backend", isinstance(self.backend, str) or callable(self.backend), "a backend's name, or a function"),
            ("mode", self.mode is None or isinstance(self.mode, str), "a mode's name, or None"),
            ("dynamic", self.dynamic is None or isinstance(self.dynamic, bool), "True, False or None"),
            ("options", options is None or is_options, "a dict of options by name, or None"),
            ("regional", isinstance(self.regional, bool), "True or False"),
        ):
            if not is_right:
                value = getattr(self, name)
                raise ArgumentError(f"{name}={value!r} ({type(value).__name__}) was given: expected {expected}.")

    def _check_by_torch(self, backend: str) -> None:
        """Raise `ArgumentError` for a backend, mode or option that torch.compile does not know; it compiles nothing."""
        given: list[dict[str, Any]] = [{"mode": self.mode}, {"options": dict(self.options or {}) or None}]
        for setting in given if backend == "inductor" else ({},):
            try:
                torch.compile(_nothing, backend=backend, **setting)
            except Exception as error:  # of many kinds
                said = " ".join(f"{name}={value!r}" for name, value in {"backend": backend, **setting}.items() if value)
                why = str(error).partition(", known options")[0]
                raise ArgumentError(
                    f"torch.compile does not take {said}: {why}. Expected one of torch.compiler.list_backends(), and "
                    "modes and options of inductor's."
                ) from error

    def options_for(self, device: torch.device) -> dict[str, Any] | None:
        """Return the ``options`` for graphs on this device."""
        options = dict(self.options or {})
        if self._may_freeze_by_default() and device.type == "cpu" and private.can_freeze():
            options.setdefault("freezing", True)
        return options or None

    def for_quantized_weights(self) -> CompileSettings:
        """Return these settings without the freezing that nobody asked for: see `frozen_weights.can_be_read`."""
        if not self._may_freeze_by_default():
            return self
        return replace(self, options={"freezing": False, **(self.options or {})})

    def _may_freeze_by_default(self) -> bool:
        return self.backend == "inductor" and self.mode is None and not self.regional

    def freezes(self, device: torch.device) -> bool:
        """Return whether compiled graphs on this device hold the weights as they were when compiled."""
        if self.backend == "openvino":
            return True
        return self.backend == "inductor" and bool((self.options_for(device) or {}).get("freezing"))

    def uses_cuda_graphs(self, device: torch.device) -> bool:
        """Return whether graphs on this device may be CUDA-graph replays, whose outputs the next replay overwrites."""
        options = self.options or {}
        return _has_cuda_graphs(device) and (self.mode in _CUDA_GRAPH_MODES or bool(options.get("triton.cudagraphs")))

    def needs_static_addresses(self, device: torch.device) -> bool:
        """Return whether graphs on this device read their caches in place; frozen ones would hold them as constants."""
        return self.uses_cuda_graphs(device) and not self.freezes(device)

    def ahead_of_time(self, device: torch.device) -> dict[str, Any] | None:
        """Return inductor's options for compiling ahead of time on this device.

        None if code compiled so would not be what these settings ask for: a CUDA graph is recorded when it runs, and
        regions and graphs of all sizes need torch.compile around them.

        Raises:
            UnsupportedError: nothing that these settings compile can be kept.
        """
        if self.backend != "inductor":
            raise UnsupportedError(
                f"A pipeline compiled with backend={self.backend!r} cannot be saved: expected inductor. Compile it "
                "with that."
            )
        if not (self.regional or self.dynamic or self.uses_cuda_graphs(device)):
            return options_with_mode(self.mode, self.options_for(device))
        if self.freezes(device):
            raise UnsupportedError(
                f"A pipeline compiled with dynamic={self.dynamic!r} and freezing cannot be saved: expected one of "
                'them, since frozen weights are kept in packages of one shape. Give options={"freezing": False}.'
            )
        return None

    def describe(self, device: torch.device) -> str:
        """Return the settings in force on this device, in words."""
        backend = self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", "custom backend")
        settings = [f"mode={self.mode}"] if self.mode else []
        settings += [f"{key}={value}" for key, value in (self.options_for(device) or {}).items()]
        settings += [name for name in ("dynamic", "regional") if getattr(self, name)]
        return f"torch.compile ({', '.join([str(backend), *settings])})"
