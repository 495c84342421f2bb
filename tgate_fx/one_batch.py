"""Guidance as diffusers mostly writes it: one call of the denoiser on the batch [uncond, cond]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .errors import UnsupportedError
from .guidance import GuidanceForm
from .inputs import map_tensors

_UNKNOWN = object()  # before the first call


class OneBatch(GuidanceForm):
    """Every batched input leads with [uncond, cond]; the output does too."""

    _timestep: object = _UNKNOWN

    def check(self, denoiser: Any, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See that both halves of the batch are the same latents; see `GuidanceForm.check`."""
        rows = latents.shape[0]
        # Channels beyond those that the denoiser predicts are conditioning, which may differ.
        channels = min(latents.shape[self._channels_dim], denoiser.config.out_channels)
        own = latents.narrow(self._channels_dim, 0, channels)
        if rows % 2 or not torch.equal(own[: rows // 2], own[rows // 2 :]):
            raise UnsupportedError(
                f"Guidance is on, but the denoiser was given {rows} rows that are not the same latents twice: expected "
                "the batch [uncond, cond]. This pipeline guides in another way (separate calls, three chunks); use it "
                "with gate_step=None or guidance off."
            )
        if self._branch != "both":
            self.slice_branch(inputs, rows)

    def begins_step(self, inputs: Mapping[str, Any]) -> bool:
        """Return False for a call with the very timestep tensor of the one before."""
        timestep = inputs.get("timestep")
        repeated = timestep is self._timestep and isinstance(timestep, torch.Tensor)
        self._timestep = timestep
        return not repeated

    def rows_kept(self, rows: int) -> int:
        """Return half of them."""
        return rows // 2

    def slice_branch(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """Return the first half of every batched input for "negative", the second for "positive"."""
        return {name: self._slice(name, value, rows) for name, value in inputs.items()}

    def _slice(self, name: str, value: Any, rows: int) -> Any:
        if isinstance(value, torch.Tensor):
            if name == "timestep" and (value.ndim == 0 or value.shape[0] != rows):
                return value
            if name in self._batched or name == "timestep":
                half = value.shape[0] // 2
                return value[:half] if self._branch == "negative" else value[half:]
        elif isinstance(value, dict):
            return self.slice_branch(value, rows)
        elif not isinstance(value, (list, tuple)) or not any(isinstance(item, torch.Tensor) for item in value):
            return value
        raise UnsupportedError(
            f"The denoiser was given {name}, and it is not known how its rows follow the guidance batch: expected only "
            f"{', '.join(sorted(self._batched))} and timestep. Use after_gate='both', which keeps the whole batch, or "
            "gate_step=None."
        )

    def give_back(self, output: Any) -> Any:
        """Return the output once for each branch: guidance over two equal branches gives back exactly that output."""
        return map_tensors(lambda tensor: torch.cat([tensor, tensor]), output)
