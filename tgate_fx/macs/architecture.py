"""What is said of a model so that it can be counted: its denoiser and what that is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError

PROMPT = 64  # tokens of a prompt, where a pipeline does not pad it


def nothing_more(rows: int) -> dict[str, Any]:
    """Return no inputs besides latents, timestep and text."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """A denoiser's class and configuration, and what it is given.

    Attributes:
        title: what people call the model.
        cls: name of the class in diffusers.
        config: what differs from the class's defaults.
        tokens: how many tokens of text its pipeline hands over, each as wide as `text_width`.
        text_width: channels of a token.
        added: for a number of rows, the inputs besides latents, timestep and text, or in place of these.
        latents: the shape of the latents of a row; if None, of an image of 4 channels and the configuration's size.
        guided: whether its pipeline guides unless told otherwise.
    """

    title: str
    cls: str
    config: dict[str, Any]
    tokens: int
    text_width: int
    added: Callable[[int], dict[str, Any]] = nothing_more
    latents: tuple[int, ...] | None = None
    guided: bool = True

    def build(self, device: str = "meta") -> nn.Module:
        """Return the denoiser, with weights that are random or, on the meta device, none."""
        import diffusers

        with torch.device(device):
            denoiser: nn.Module = getattr(diffusers, self.cls)(**self.config)
        if device == "meta":
            nn.Module.to(denoiser, device)  # tables that were made of numpy's arrays
        return denoiser.eval().requires_grad_(False)

    def latent_shape(self, size: int | None = None) -> tuple[int, ...]:
        """Return the shape of the latents of a row: channels, frames of a video, height, width.

        Args:
            size: latents per side, if they are those of an image that may have any size.

        Raises:
            ArgumentError: a size was given, and the latents have their own shape.
        """
        if self.latents is None:
            side: int = self.config["sample_size"] if size is None else size
            return (4, side, side)
        if size is not None:
            raise ArgumentError(
                f"size={size} was given for {self.title}: expected none, since its latents have one shape only, "
                f"{'×'.join(map(str, self.latents))}."
            )
        return self.latents

    def inputs(self, rows: int, size: int | None = None, device: str = "meta") -> dict[str, Any]:
        """Return the denoiser's inputs, by name: random on a real device.

        Args:
            rows: how many rows of latents.
            size: see `latent_shape`.
            device: where they are.

        Raises:
            ArgumentError: see `latent_shape`.
        """
        shape = self.latent_shape(size)
        with torch.device(device):
            return {
                "sample" if "UNet" in self.cls else "hidden_states": torch.randn(rows, *shape),
                "timestep": torch.full((rows,), 500.0),
                "encoder_hidden_states": torch.randn(rows, self.tokens, self.text_width),
                **self.added(rows),
            }
