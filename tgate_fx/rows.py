"""Which of a denoiser's inputs follow the batch, and the rows of one guidance branch cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import UnsupportedError


@dataclass(frozen=True)
class Rows:
    """The facts of a denoiser's inputs; the names of those within dictionaries are given too.

    Attributes:
        batched: the names of the inputs whose rows are those of the batch, a multiple of them, or one for all; of lists
            and tuples, this is said of every tensor in them.
        shared: the names of the tensors that serve every row.
        channels_dim: the dimension of the latents that has the channels; those beyond the ones that the denoiser
            predicts are conditioning.
        conditioned: the name of the input that is not zero where the latents are conditioning, if there is one.
        only_attended: the names of lists that only cross-attention reads. They are left whole where that is cached, for
            a module may keep rows of its own that go with theirs (IP-Adapters of faces).
    """

    batched: frozenset[str]
    shared: frozenset[str] = frozenset()
    channels_dim: int = 1
    conditioned: str | None = None
    only_attended: frozenset[str] = frozenset()

    def own_latents(self, denoiser: Any, latents: torch.Tensor) -> torch.Tensor:
        """Return the latents without the channels of conditioning, which may differ between guidance branches."""
        predicted = getattr(denoiser.config, "out_channels", None)
        if predicted is None or predicted >= latents.shape[self.channels_dim]:
            return latents
        return latents.narrow(self.channels_dim, 0, predicted)

    def half(self, inputs: Mapping[str, Any], rows: int, *, second: bool, gated: bool) -> dict[str, Any]:
        """Return one half of every batched input.

        Args:
            inputs: the denoiser's inputs by name.
            rows: the rows of the whole batch.
            second: whether the second half is meant, or the first.
            gated: whether cross-attention is cached.

        Raises:
            UnsupportedError: it is not known how the rows of a tensor follow the batch, or it has other rows.
        """
        return {name: self._half(name, value, rows, second, gated) for name, value in inputs.items()}

    def _half(self, name: str, value: Any, rows: int, second: bool, gated: bool) -> Any:
        if name in self.shared:
            return value
        if isinstance(value, dict):
            return self.half(value, rows, second=second, gated=gated)
        if type(value) in (list, tuple):
            if gated and name in self.only_attended:
                return value
            return type(value)(self._half(name, item, rows, second, gated) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        # One timestep may serve all rows.
        if name == "timestep" and (value.ndim == 0 or value.shape[0] != rows):
            return value
        if name != "timestep" and name not in self.batched:
            raise UnsupportedError(
                f"The denoiser was given {name}, and it is not known how its rows follow the guidance batch: expected "
                f"only {', '.join(sorted(self.batched))} and timestep. Use after_gate='both', which keeps the whole "
                "batch, or gate_step=None."
            )
        if value.ndim > 0 and value.shape[0] == 1 < rows:  # one row serves all
            return value
        if value.ndim == 0 or not value.shape[0] or value.shape[0] % rows:
            raise UnsupportedError(
                f"The denoiser was given {name} of shape {list(value.shape)} beside {rows} rows of latents: expected "
                "that many rows or a multiple, half of them for each branch of guidance. Use after_gate='both', which "
                "keeps the whole batch, or gate_step=None."
            )
        middle = value.shape[0] // 2
        return value[middle:] if second else value[:middle]
