"""Classifier-free guidance as a pipeline has it: whether it is on, and which kinds cannot be gated."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import private
from .class_names import class_names
from .errors import UnsupportedError
from .schedule import Schedule

# Keywords of a pipeline's __call__ that give away guidance which no `GuidanceForm` knows.
_OTHER_GUIDANCE = {
    "use_cross_attn_mask": "LEDITS++, which reads the attention maps of every step",
    "sag_scale": "self-attention guidance, which calls the denoiser twice a step",
    "view_batch_size": "views of a panorama, whose guidance branches are interleaved in one batch",
    "parallel": "parallel sampling, with several timesteps in one batch",
    "motion_field_strength_x": "attention across frames, which counts on the rows of both guidance branches",
    "max_iter_to_alter": "Attend-and-Excite, which changes the latents by the attention maps of every step",
    "cross_attention_guidance_amount": "guidance by the attention maps of every step",
    "gligen_normalize_constant": "grounding by images, for which it calls the denoiser twice a step on both branches",
}

# And those which have more branches in one batch: it can be kept whole.
_MORE_BRANCHES = {
    "image_guidance_scale": "classifier-free guidance in three chunks (text, image, neither)",
    "pag_scale": "perturbed-attention guidance, which adds a branch of its own to the batch",
    "sld_guidance_scale": "safety guidance, which adds a third branch to the batch",
    "editing_prompt": "semantic guidance, which adds a branch for each edit to the batch",
}


class _Setting(NamedTuple):
    """A keyword of a pipeline's call by which steps come to differ from those that can be gated.

    Attributes:
        neutral: the value with which they do not.
        differs: tells of another value, given that one, whether they do.
        what: what the keyword does.
    """

    neutral: float | None
    differs: Callable[[Any, Any], bool]
    what: str


_PERTURBED = _Setting(0.0, operator.gt, "calls the denoiser once more at every step, with some attention left out")
_ISOLATED = _Setting(1.0, operator.gt, "calls the denoiser once more at every step, with video and sound kept apart")
_SOME_STEPS = "guides at some of the steps only"

# LTX 2, whose keywords for sound are those for the video if they are None or 0; Kandinsky 6; ACE-Step.
_SETTINGS = {
    "stg_scale": _PERTURBED,
    "audio_stg_scale": _PERTURBED,
    "modality_scale": _ISOLATED,
    "audio_modality_scale": _ISOLATED,
    "video_tiles": _Setting(None, operator.is_not, "calls the denoiser once for each tile at every step"),
    "sample_audio": _Setting(True, operator.ne, "leaves out the blocks for sound, whose cross-attention is cached too"),
    "cfg_interval_start": _Setting(0.0, operator.gt, _SOME_STEPS),
    "cfg_interval_end": _Setting(1.0, operator.lt, _SOME_STEPS),
    "audio_cover_strength": _Setting(1.0, operator.lt, "calls the denoiser once more at every step, without the cover"),
}

# Pipelines that never guide: if they have a scale, it is embedded.
_NEVER_GUIDE = frozenset(
    (
        "DreamLiteMobilePipeline",
        "SanaSprintImg2ImgPipeline",
        "SanaSprintPipeline",
        "StableAudio3AudioToAudioPipeline",
        "StableAudio3InpaintPipeline",
    )
)

# Pipelines without a property that says whether they guide, which do so at every scale but 1.
_GUIDE_BELOW_ONE = frozenset(("LDMTextToImagePipeline",))

# Pipelines that give both branches to the denoiser at every scale.
_ALWAYS_GUIDE = frozenset(("DreamLitePipeline",))

# Pipelines that decide at the start, whatever becomes of the scale that they have as a property.
_DECIDE_ONCE = frozenset(
    (
        "AceStepPipeline",
        "AllegroPipeline",
        "LattePipeline",
        "LuminaPipeline",
        "SanaWMPipeline",
        "StableDiffusionControlNetXSPipeline",
        "StableDiffusionXLControlNetXSPipeline",
    )
)

# Pipelines that embed an image like a class, in the conditional branch alone.
_EMBED_AN_IMAGE = frozenset(("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"))

# Pipelines that take such a keyword but guide in that way only when given an image, which their first step shows.
_ONLY_WITH_IMAGE = ("DreamLitePipeline", "DreamLiteMobilePipeline")


class GuidanceIsOn:
    """Tells whether the pipeline guides at this step.

    A scale of each frame (Stable Video Diffusion) is on the device: it is read once, so that no step waits for it.

    Args:
        pipe: in the middle of its call.
        guidance_scale: what the call was given.
    """

    def __init__(self, pipe: Any, guidance_scale: Any) -> None:
        self._pipe = pipe
        self._given = guidance_scale
        self._is_fixed = bool(class_names(type(pipe)) & _DECIDE_ONCE)
        self._scale: torch.Tensor | None = None
        self._version: int | None = None
        self._is_on: bool | None = None  # once it is known

    def __call__(self) -> bool:
        """Return it."""
        if self._is_fixed and self._is_on is not None:
            return self._is_on
        scale = getattr(self._pipe, "guidance_scale", None)
        version = private.version_of(scale) if isinstance(scale, torch.Tensor) else None
        # A number, or a tensor of which writes are not counted, has no version, and is read each time.
        if self._is_on is None or version is None or scale is not self._scale or version != self._version:
            self._scale, self._version = scale, version
            self._is_on = _guidance_is_on(self._pipe, self._given)
        return self._is_on


def _guidance_is_on(pipe: Any, guidance_scale: Any) -> bool:
    """Return whether the pipeline guides now.

    Most pipelines have a property that says so, which may change while they run; some have one of the scale itself; the
    others decide once. The scale guides if it is > 1 (Imagen's convention, arXiv:2205.11487), but for the
    pipelines named above.
    """
    names = class_names(type(pipe))
    if names & _NEVER_GUIDE:
        return False
    if names & _ALWAYS_GUIDE:
        return True
    if names & _GUIDE_BELOW_ONE:
        return bool(guidance_scale is not None and guidance_scale != 1)
    active = getattr(pipe, "do_classifier_free_guidance", None)
    if active is None:
        guidance_scale = getattr(pipe, "guidance_scale", guidance_scale)
        active = guidance_scale is not None and guidance_scale > 1
    return bool(active)


def unconditional_is_empty(pipe: Any, bound: Callable[[str], Any]) -> bool:
    """Return whether the other branch has zeros where the conditional one has something beside the text.

    Args:
        pipe: the pipeline.
        bound: returns what the call binds to a parameter of this name; None if there is none.
    """
    return bound("gligen_boxes") is not None or bool(class_names(type(pipe)) & _EMBED_AN_IMAGE)


def check_known_guidance(pipe: Any, parameters: Mapping[str, Any], schedule: Schedule) -> None:
    """Raise `UnsupportedError` if the pipeline's ``__call__`` takes guidance of a kind that cannot be gated so."""
    name = type(pipe).__name__
    if name in _ONLY_WITH_IMAGE:
        return
    for keyword, reason in _OTHER_GUIDANCE.items():
        if keyword in parameters:
            raise UnsupportedError(
                f"{name} uses {reason}: expected classifier-free guidance, in one batch or in a call for each branch. "
                "Use this pipeline ungated."
            )
    for keyword, reason in _MORE_BRANCHES.items():
        if keyword in parameters and schedule.one_branch:
            raise UnsupportedError(
                f"{name} uses {reason}, and after_gate={schedule.after_gate!r} keeps one: expected an unconditional "
                "and a conditional branch for that. Give after_gate='both', which keeps the whole batch and all "
                "guidance, without guidance=..., or use this pipeline ungated."
            )


def check_settings(pipe: Any, bound: Callable[[str], Any]) -> None:
    """Raise `UnsupportedError` if a call of the pipeline has a setting with which it cannot be gated.

    Args:
        pipe: the pipeline.
        bound: returns what the call binds to a parameter of this name; None if there is none.
    """
    given = {name: bound(name) for name in _SETTINGS}
    differing = {
        name: value
        for name, value in given.items()
        if value is not None
        and _SETTINGS[name].differs(value, _SETTINGS[name].neutral)
        and _has_effect(pipe, name, bound)
    }
    if differing:
        what = " and ".join(dict.fromkeys(_SETTINGS[name].what for name in differing))
        raise UnsupportedError(
            f"{type(pipe).__name__} was called with {_listed(differing)}, with which it {what}: expected "
            f"{_listed({name: _SETTINGS[name].neutral for name in differing})}. Give it so, or use gate_step=None."
        )


def _has_effect(pipe: Any, name: str, bound: Callable[[str], Any]) -> bool:
    """Return whether such a keyword does anything in this call."""
    if name.startswith("cfg_interval"):
        scale = bound("guidance_scale")
        return bool(scale is not None and scale > 1 and not pipe.is_turbo)
    if name != "audio_cover_strength":
        return True
    return bound("task_type") == "cover" or bound("audio_codes") is not None  # which make it one


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in values.items())
