"""Classifier-free guidance as a denoiser sees it: whether it is on, and the contract of how its branches arrive."""

from __future__ import annotations

import abc
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from . import private
from .cache import StaticCache
from .errors import UnsupportedError
from .roles import Kind
from .rows import Rows
from .schedule import Schedule

_UNKNOWN = object()  # before the first call

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

# Pipelines that take such a keyword but guide in that way only when given an image, which their first step shows.
_ONLY_WITH_IMAGE = ("DreamLitePipeline", "DreamLiteMobilePipeline")


class GuidanceForm(abc.ABC):
    """How the branches of guidance reach a network: seen from one generation, call by call.

    Args:
        denoiser: the network's module.
        rows: which of its inputs follow the batch.
        branch: which branch goes on after the gate: "negative", "positive" or "both".
        weight: of the conditional branch in what is cached of both.

    Attributes:
        calls: how many calls a step may have.
        branches: which branches may go on after the gate alone.
    """

    calls: ClassVar[int] = 1
    branches: ClassVar[tuple[str, ...]] = ("negative", "positive")

    def __init__(self, denoiser: nn.Module, rows: Rows, branch: str, weight: float) -> None:
        self._denoiser = denoiser
        self._rows = rows
        self._branch = branch
        self._weight = weight
        self._timestep: object = _UNKNOWN
        self._call = 0

    def place(self, inputs: Mapping[str, Any], guided: bool) -> int:
        """Return which call of its step this is, from 0; ask once for each call.

        Calls of one step are given the very same tensor as their timestep.

        Args:
            inputs: the denoiser's inputs by name.
            guided: whether the pipeline guides now.
        """
        timestep = inputs.get("timestep")
        repeated = timestep is self._timestep and isinstance(timestep, torch.Tensor)
        self._timestep = timestep
        self._call = self._call + 1 if repeated else 0
        return self._call

    @abc.abstractmethod
    def check(self, inputs: Mapping[str, Any], latents: torch.Tensor) -> None:
        """See, at each call of the first step of a guided generation, that the branches do arrive in this way.

        Raises:
            UnsupportedError: they do not, or the branch that goes on cannot be cut out of every input.
        """

    @abc.abstractmethod
    def check_complete(self) -> None:
        """See, when the step after the first one of a guided generation begins, that every branch came.

        Raises:
            UnsupportedError: one did not.
        """

    @abc.abstractmethod
    def rows_kept(self, rows: int) -> int:
        """Return how many of a call's rows belong to the branch that goes on."""

    @abc.abstractmethod
    def one_branch(self, inputs: dict[str, Any], rows: int, *, gated: bool) -> dict[str, Any]:
        """Return the inputs of the branch that goes on.

        Args:
            inputs: the denoiser's inputs by name, as the first call of a step has them.
            rows: the rows of that call.
            gated: whether its cross-attention is cached.

        Raises:
            UnsupportedError: a tensor of which it is not known how its rows follow the batch.
        """

    @abc.abstractmethod
    def has_other_branch(self, guided: bool) -> bool:
        """Return whether this call, of a step that is guided or not, has a branch that does not go on."""

    @abc.abstractmethod
    def merge(
        self, cache: StaticCache, kind: Kind, captured: Sequence[torch.Tensor], first: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """Keep what such a call captured, blended of both branches, their mean in T-GATE's cache; return the buffers.

        Args:
            cache: where to keep it.
            kind: which kind of site it comes from.
            captured: one tensor for each site.
            first: the buffers of what the first call of the step captured, if this is not the first.

        Raises:
            UnsupportedError: the branches differ in shape.
        """

    @abc.abstractmethod
    def pair(self, result: Any, first: Any) -> tuple[Any, Any]:
        """Return what the conditional branch gave and what the other one did, after such a call, before it is merged.

        Args:
            result: the output of this call, or what it captured.
            first: the same of the first call of the step, which may be this one.
        """

    @abc.abstractmethod
    def give_back(self, output: Any, difference: Any) -> tuple[Any, ...]:
        """Return what each of the step's calls gets for the output of the branch that goes on.

        Args:
            output: of that branch.
            difference: by how much it is ahead of the other branch; None if that gets the same, so that guidance over
                both gives back just that.
        """


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
        self._scale: torch.Tensor | None = None
        self._version: int | None = None
        self._is_on = False

    def __call__(self) -> bool:
        """Return it."""
        scale = getattr(self._pipe, "guidance_scale", None)
        version = private.version_of(scale) if isinstance(scale, torch.Tensor) else None
        if version is None:  # a number, or a tensor of which writes are not counted
            return _guidance_is_on(self._pipe, self._given)
        if scale is not self._scale or version != self._version:
            self._scale, self._version = scale, version
            self._is_on = _guidance_is_on(self._pipe, self._given)
        return self._is_on


def _guidance_is_on(pipe: Any, guidance_scale: Any) -> bool:
    """Return whether the pipeline guides now.

    Most pipelines have a property that says so, which may change while they run; some have one of the scale itself; the
    others decide once. The scale guides if it is > 1 (Imagen's convention, arXiv:2205.11487), but for the
    pipelines named above.
    """
    names = {base.__name__ for base in type(pipe).__mro__}
    if names & _NEVER_GUIDE:
        return False
    if names & _GUIDE_BELOW_ONE:
        return bool(guidance_scale is not None and guidance_scale != 1)
    active = getattr(pipe, "do_classifier_free_guidance", None)
    if active is None:
        guidance_scale = getattr(pipe, "guidance_scale", guidance_scale)
        active = guidance_scale is not None and guidance_scale > 1
    return bool(active)


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
    return name != "audio_cover_strength" or bound("task_type") == "cover"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={reprlib.repr(value)}" for name, value in values.items())
