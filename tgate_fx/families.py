"""The facts that differ between pipelines, as data: what is gated, how guidance is batched, what leads with the batch.

diffusers writes classifier-free guidance as one call of the denoiser on the batch [uncond, cond]. Everything here
serves to cut one branch out of such a batch, and to refuse whatever is not such a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import StateError, UnsupportedError

# Denoiser classes whose gated pipelines are tested against an oracle.
DENOISERS = ("UNet2DConditionModel", "PixArtTransformer2DModel", "UNetSpatioTemporalConditionModel")

# Keywords of a pipeline's __call__ that give away a batch which is not [uncond, cond].
_NOT_PLAIN_GUIDANCE = {
    "image_guidance_scale": "classifier-free guidance in three chunks (text, image, neither)",
    "pag_scale": "perturbed-attention guidance, which adds a branch of its own to the batch",
    "sag_scale": "self-attention guidance, which calls the denoiser twice a step",
    "sld_guidance_scale": "safety guidance, which adds a third branch to the batch",
    "editing_prompt": "semantic guidance, which adds a branch for each edit to the batch",
}

# The denoiser's inputs that carry the text, which no step reads once every cross-attention is cached.
TEXT = ("encoder_hidden_states", "encoder_attention_mask")

# The denoiser's first input.
LATENTS = ("sample", "hidden_states")

# Inputs of a denoiser whose rows are those of the batch, or a multiple of them.
_BATCHED = frozenset(
    (
        *LATENTS,
        *TEXT,
        "attention_mask",
        "timestep_cond",
        # in added_cond_kwargs: SDXL, PixArt
        "text_embeds",
        "time_ids",
        "resolution",
        "aspect_ratio",
        "added_time_ids",  # Stable Video Diffusion
    )
)

# Denoisers whose latents are [batch, frames, channels, height, width]; all others lead with [batch, channels].
_FRAMES_BEFORE_CHANNELS = ("UNetSpatioTemporalConditionModel",)


# Denoisers that compute their position embeddings from the size of the latents as Python numbers.
_SIZES_ARE_NUMBERS = ("PixArtTransformer2DModel",)


def check_dynamic(denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if no graph of this whole model serves latents of every size."""
    name = type(denoiser).__name__
    if name in _SIZES_ARE_NUMBERS:
        raise UnsupportedError(
            f"dynamic=True was given for a {name}, which computes its position embeddings from the size as numbers, so "
            "that every size takes graphs of its own: expected a model without that. Add regional=True, under which "
            "the blocks serve all sizes, or leave dynamic out."
        )


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """The attribute name and the module of the pipeline's denoiser.

    Raises:
        UnsupportedError: there is none that tgate_fx can gate, or it is compiled in place already.
    """
    name = type(pipe).__name__
    for attribute in ("unet", "transformer"):
        denoiser = getattr(pipe, attribute, None)
        if isinstance(denoiser, nn.Module):
            check_not_compiled(attribute, denoiser)
            check_no_deepcache_helper(denoiser)
            if not any(base.__name__ in DENOISERS for base in type(denoiser).__mro__):
                raise UnsupportedError(
                    f"{name}.{attribute} is a {type(denoiser).__name__}: expected one of {', '.join(DENOISERS)}, the "
                    "denoisers that are tested. tgate_fx.split(denoiser) works on any model with cross-attention."
                )
            return attribute, denoiser
    raise UnsupportedError(
        f"{name} has no denoiser: expected a diffusers pipeline with a unet or a transformer to gate."
    )


def check_not_compiled(attribute: str, denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if torch.compile runs this module already, past any instance-level forward."""
    if hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None:
        raise UnsupportedError(
            f"pipe.{attribute} is compiled by torch.compile already, so its gate would never be seen: expected the "
            "plain module. Load the pipeline without compiling it, then call tgate_fx.compile(pipe), which compiles "
            "each phase."
        )


def upstreams_branch(pipe: Any) -> str:
    """Which guidance branch upstream `tgate` goes on with after the gate.

    Its loader for Stable Video Diffusion calls what it keeps negative, but takes it from the encoder without guidance:
    it is the image itself, the positive branch.
    """
    return "positive" if type(getattr(pipe, "unet", None)).__name__ in _FRAMES_BEFORE_CHANNELS else "negative"


def check_no_deepcache_helper(denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if the `DeepCache` package's helper is enabled on this denoiser."""
    for slot in ("forward", "_old_forward"):
        function = vars(denoiser).get(slot)
        if getattr(function, "__module__", "") == "DeepCache.extension.deepcache":
            helpers = [cell.cell_contents for cell in getattr(function, "__closure__", ()) or ()]
            params: dict[str, int] = next((helper.params for helper in helpers if hasattr(helper, "params")), {})
            interval = params.get("cache_interval", 3)
            branch = 3 * params.get("cache_block_id", 0) + params.get("cache_layer_id", 0)
            raise UnsupportedError(
                "A DeepCacheSDHelper is enabled on this pipeline: expected none, since its cache and the gate would "
                "undo each other. Call helper.disable(), and give "
                f"deepcache=tgate_fx.DeepCache(interval={interval}, branch={branch}) to tgate_fx.gate or "
                "tgate_fx.compile."
            )


def check_guidance_form(pipe: Any, parameters: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if the pipeline's ``__call__`` takes a guidance that is not one batch [uncond, cond]."""
    for keyword, reason in _NOT_PLAIN_GUIDANCE.items():
        if keyword in parameters:
            raise UnsupportedError(
                f"{type(pipe).__name__} uses {reason}: expected classifier-free guidance as one batch of an "
                "unconditional and a conditional branch. Use this pipeline ungated."
            )


def guidance_active(pipe: Any, guidance_scale: Any) -> bool:
    """Whether the pipeline batches classifier-free guidance at this step.

    Most pipelines have a property that says so, which may change while they run; the others decide once, by
    ``guidance_scale > 1`` (Imagen's convention, arXiv:2205.11487).
    """
    active = getattr(pipe, "do_classifier_free_guidance", None)
    if active is None:
        active = guidance_scale is not None and guidance_scale > 1
    return bool(active)


def check_guidance_batch(denoiser: Any, latents: torch.Tensor) -> None:
    """Raise `UnsupportedError` unless the two halves of the denoiser's input are the same latents.

    Args:
        denoiser: what the latents are given to.
        latents: [2B, channels, ...], the denoiser's first input under classifier-free guidance. Channels beyond those
            that the denoiser predicts are conditioning, which may differ.
    """
    rows = latents.shape[0]
    dim = 2 if type(denoiser).__name__ in _FRAMES_BEFORE_CHANNELS else 1
    own = latents.narrow(dim, 0, min(latents.shape[dim], denoiser.config.out_channels))
    if rows % 2 or not torch.equal(own[: rows // 2], own[rows // 2 :]):
        raise UnsupportedError(
            f"Guidance is on, but the denoiser was given {rows} rows that are not the same latents twice: expected the "
            "batch [uncond, cond]. This pipeline guides in another way (separate calls, three chunks); use it with "
            "gate_step=None or guidance off."
        )


def one_branch(inputs: Mapping[str, Any], branch: str, rows: int) -> dict[str, Any]:
    """The inputs of one guidance branch.

    Args:
        inputs: the denoiser's inputs by name; every batched one leads with [uncond, cond].
        branch: "negative" for the first half of the batch, "positive" for the second.
        rows: the rows of the whole batch (2B).

    Raises:
        UnsupportedError: a tensor whose place in the batch is not known.
    """
    return {name: _branch_of(name, value, branch, rows) for name, value in inputs.items()}


def _branch_of(name: str, value: Any, branch: str, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        if name == "timestep" and (value.ndim == 0 or value.shape[0] != rows):
            return value
        if name in _BATCHED or name == "timestep":
            half = value.shape[0] // 2
            return value[:half] if branch == "negative" else value[half:]
    elif isinstance(value, dict):
        return one_branch(value, branch, rows)
    elif not isinstance(value, (list, tuple)) or not any(isinstance(item, torch.Tensor) for item in value):
        return value
    raise UnsupportedError(
        f"The denoiser was given {name}, and it is not known how its rows follow the guidance batch: expected only "
        f"{', '.join(sorted(_BATCHED))} and timestep. Use after_gate='both', which keeps the whole batch, or "
        "gate_step=None."
    )


def both_branches(output: Any) -> Any:
    """The denoiser's output once for each branch: guidance over two equal branches gives back exactly that output."""
    if isinstance(output, torch.Tensor):
        return torch.cat([output, output])
    if isinstance(output, dict):  # diffusers' output classes
        return type(output)(**{key: both_branches(value) for key, value in output.items()})
    if isinstance(output, tuple):
        return tuple([both_branches(value) for value in output])
    return output


def step_count(pipe: Any) -> int | None:
    """How many times the denoising loop that has just begun will call the denoiser, or None if unknown.

    Pipelines that cut their timesteps short (image-to-image, ``denoising_end``) record what is left in
    ``_num_timesteps``; the others run all of their scheduler's timesteps from its begin index on.
    """
    recorded = vars(pipe).get("_num_timesteps")
    if recorded is not None:
        return int(recorded)
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    if timesteps is None:
        return None
    return len(timesteps) - (getattr(pipe.scheduler, "begin_index", None) or 0)


def first_input(inputs: Mapping[str, Any]) -> tuple[str, torch.Tensor]:
    """The name and value of the latents among the denoiser's inputs."""
    for name in LATENTS:
        if isinstance(inputs.get(name), torch.Tensor):
            return name, inputs[name]
    raise StateError(
        f"The denoiser was given {', '.join(inputs)}: expected its latents as {' or '.join(LATENTS)}. Call the "
        "pipeline as diffusers documents it."
    )


@contextmanager
def fresh_step_count(pipe: Any) -> Iterator[None]:
    """While this lasts, a recorded number of steps is one that the generation itself has recorded."""
    before = vars(pipe).pop("_num_timesteps", None)
    try:
        yield
    finally:
        if before is not None:
            vars(pipe).setdefault("_num_timesteps", before)
