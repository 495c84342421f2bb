"""T-GATE written down as plainly as possible, for what upstream has no loader for or gets wrong.

It shares no code with tgate_fx: forward hooks replace the cross-attentions' outputs, and a stand-in for the denoiser
cuts the batch.
"""

from __future__ import annotations

from typing import Any

import torch


class ReferenceDenoiser:
    """Stands in for a pipeline's denoiser and gates it at step ``gate``."""

    def __init__(self, denoiser: torch.nn.Module, gate: int, *, guided: bool, after_gate: str = "negative") -> None:
        self._denoiser = denoiser
        self._gate = gate
        self._guided = guided
        self._after_gate = after_gate
        self._cache: dict[str, torch.Tensor] = {}
        self.calls = 0
        for name, module in denoiser.named_modules():
            if name.endswith("attn2"):
                module.register_forward_hook(self._hook(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if self.calls >= self._gate:
                return self._cache[name]
            if self.calls == self._gate - 1:
                self._cache[name] = output
                if self._guided and self._after_gate != "both":
                    uncond, cond = output.chunk(2)
                    self._cache[name] = (uncond + cond) / 2
            return None

        return hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cut = self.calls >= self._gate and self._guided and self._after_gate != "both"
        if cut:
            args = tuple(self._half(arg) for arg in args)
            kwargs = {name: self._half(value) for name, value in kwargs.items()}
        output = self._denoiser(*args, **kwargs)
        self.calls += 1
        return (torch.cat([output[0]] * 2),) if cut else output

    def _half(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._half(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value.chunk(2)[0 if self._after_gate == "negative" else 1]
        return value


def gate(pipe: Any, gate_step: int, *, guided: bool, after_gate: str = "negative") -> Any:
    """Put a `ReferenceDenoiser` in the place of the pipeline's denoiser."""
    attribute = "unet" if hasattr(pipe, "unet") else "transformer"
    vars(pipe)[attribute] = ReferenceDenoiser(getattr(pipe, attribute), gate_step, guided=guided, after_gate=after_gate)
    return pipe
