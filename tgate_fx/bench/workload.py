"""What every contender is given: one model with the same random weights, the same inputs, the same steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..macs.architectures import ARCHITECTURES
from .models import MODELS, SIDES


@dataclass(frozen=True)
class Workload:
    """One model and how it is run.

    Attributes:
        arch: a name in `MODELS`.
        size: latents per side; None for the model's own, the only one that videos have.
        steps: of an image.
        gates: the gate steps that gated contenders are timed with.
        dtype: of weights and latents, such as "float32".
        device: "cpu" or "cuda", where the weights of UNets are channels last, as diffusers advises.
        batch: images of a call.

    Raises:
        ArgumentError: a size was given, and the model has its own.
    """

    arch: str
    size: int | None
    steps: int
    gates: tuple[int, ...]
    dtype: str
    device: str = "cpu"
    batch: int = 1

    def __post_init__(self) -> None:
        ARCHITECTURES[self.arch].latent_shape(self.size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image or video."""
        return ARCHITECTURES[self.arch].latent_shape(self.size)

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def save_denoiser(self, path: Path) -> float:
        """Write a denoiser with random weights to a file; how many GiB it takes."""
        torch.manual_seed(0)
        # nn.Module's own, since diffusers' warns of modules that are better kept in float32 even if there are none.
        torch.save(nn.Module.to(ARCHITECTURES[self.arch].build("cpu"), self.torch_dtype), path)
        return path.stat().st_size / 2**30

    def pipeline(self, denoiser: Path) -> Any:
        """Return the pipeline around a denoiser that `save_denoiser` wrote, ready to be called with `inputs`."""
        # The file is this run's own. Mapped, its weights are in memory once for all processes.
        module: nn.Module = torch.load(denoiser, mmap=True, weights_only=False)
        if self.device == "cuda":
            module = nn.Module.to(module, self.device)
            if hasattr(module, "down_blocks"):
                module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        pipe = MODELS[self.arch].pipeline(module)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call: embedded prompts and the image's size."""
        architecture = ARCHITECTURES[self.arch]
        noise = torch.Generator().manual_seed(1)

        def embedding(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=noise).to(self.device, self.torch_dtype)

        text = {f"{side}_embeds": embedding(1, architecture.tokens, architecture.text_width) for side in SIDES}
        height, width = (8 * side for side in self.latent_shape[-2:])
        return {**text, **MODELS[self.arch].inputs(embedding, architecture), "height": height, "width": width}

    def latents(self, call: Callable[..., Any], steps: int, *, seed: int = 0, **more: Any) -> torch.Tensor:
        """Return the latents that a call of a pipeline ends with, given `inputs` and ``more``."""
        result = call(
            **self.inputs,
            num_inference_steps=steps,
            generator=torch.Generator(self.device).manual_seed(seed),
            output_type="latent",
            return_dict=False,
            **{MODELS[self.arch].batch: self.batch},
            **more,
        )
        latents: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
        return latents
