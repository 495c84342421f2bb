"""Whether anything may change a denoiser's modules between two steps of a generation.

A compiled graph holds what the modules were when it was traced. Guards find out whether that is still so; checking them
at every step can only be left out where nothing but known code runs between the steps.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .slots import Replacement

# Pipelines of diffusers whose loop changes nothing on the denoiser. (StableDiffusionGLIGENPipeline's does.)
_LOOPS = frozenset(
    (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "StableVideoDiffusionPipeline",
    )
)

# Packages whose modules, processors and schedulers change nothing from step to step.
_PACKAGES = frozenset(("torch", "diffusers", "transformers", "peft"))

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def known_to_leave_modules_alone(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether only known code runs between two steps of this pipeline: its class, scheduler, modules and hooks."""
    plain = type(pipe).__mro__[1]  # the class that was gated
    if plain.__name__ not in _LOOPS or not _is_known(plain):
        return False
    scheduler = pipe.scheduler
    if not _is_known(type(scheduler)) or any(callable(value) for value in vars(scheduler).values()):
        return False
    if any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS):
        return False
    return all(_is_plain(module) for module in denoiser.modules())


def _is_plain(module: nn.Module) -> bool:
    """Whether a module runs known code alone: its class, its attention processor, its forward, and no hooks."""
    processor = getattr(module, "processor", None)
    if not (_is_known(type(module)) and _is_known(type(module).forward)):
        return False
    if processor is not None and not _is_known(type(processor)):
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    forward = vars(module).get("forward")
    while isinstance(forward, Replacement):
        forward = forward.inner
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def _is_known(code: Any) -> bool:
    """Whether this class or function comes from a package that is known."""
    return code.__module__.partition(".")[0] in _PACKAGES
