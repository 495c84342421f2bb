"""Classifier-free guidance as a denoiser sees it: whether it is on, and the contract of how its branches arrive."""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .errors import UnsupportedError

# Keywords of a pipeline's __call__ that give away guidance which no `GuidanceForm` knows.
_OTHER_GUIDANCE = {
    "image_guidance_scale": "classifier-free guidance in three chunks (text, image, neither)",
    "pag_scale": "perturbed-attention guidance, which adds a branch of its own to the batch",
    "sag_scale": "self-attention guidance, which calls the denoiser twice a step",
    "sld_guidance_scale": "safety guidance, which adds a third branch to the batch",
    "editing_prompt": "semantic guidance, which adds a branch for each edit to the batch",
}


class GuidanceForm(abc.ABC):
    """How the branches of guidance reach a denoiser: seen from one generation, call by call.

    Args:
        batched: the names of the inputs whose rows are those of the batch, or a multiple of them.
        channels_dim: the dimension of the latents that has the channels.
        branch: which branch goes on after the gate: "negative", "positive" or "both".
    """

    def __init__(self, batched: Collection[str], channels_dim: int, branch: str) -> None:
        self._batched = batched
        self._channels_dim = channels_dim
        self._branch = branch

    @abc.abstractmethod
    def check(self, denoiser: Any, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See, at the first step of a guided generation, that the branches do arrive in this way.

        Raises:
            UnsupportedError: they do not, or the branch that goes on cannot be cut out of every input.
        """

    @abc.abstractmethod
    def begins_step(self, inputs: Mapping[str, Any]) -> bool:
        """Return whether this call of the denoiser is the first one of a step; ask once for each call."""

    @abc.abstractmethod
    def rows_kept(self, rows: int) -> int:
        """Return how many of a call's rows belong to the branch that goes on."""

    @abc.abstractmethod
    def slice_branch(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
        """Return the inputs of the branch that goes on.

        Args:
            inputs: the denoiser's inputs by name, of all branches.
            rows: the rows of the whole call.

        Raises:
            UnsupportedError: a tensor of which it is not known how its rows follow the batch.
        """

    @abc.abstractmethod
    def give_back(self, output: Any) -> Any:
        """Return what the pipeline gets for the output of one branch, so that its guidance gives back just that."""


def guidance_is_on(pipe: Any, guidance_scale: Any) -> bool:
    """Return whether the pipeline guides at this step.

    Most pipelines have a property that says so, which may change while they run; the others decide once, by
    ``guidance_scale > 1`` (Imagen's convention, arXiv:2205.11487).
    """
    active = getattr(pipe, "do_classifier_free_guidance", None)
    if active is None:
        active = guidance_scale is not None and guidance_scale > 1
    return bool(active)


def check_known_guidance(pipe: Any, parameters: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if the pipeline's ``__call__`` takes guidance of a kind that cannot be gated."""
    for keyword, reason in _OTHER_GUIDANCE.items():
        if keyword in parameters:
            raise UnsupportedError(
                f"{type(pipe).__name__} uses {reason}: expected classifier-free guidance as one batch of an "
                "unconditional and a conditional branch. Use this pipeline ungated."
            )
