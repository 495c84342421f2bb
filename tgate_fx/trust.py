"""Whether anything may change a denoiser's modules between two steps of a generation.

A compiled graph holds what the modules were when it was traced. Guards find out whether that is still so; checking them
at every step can only be left out where nothing but known code runs between the steps.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from .errors import UnsupportedError
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

# Packages whose code changes nothing from step to step: of modules, processors and schedulers, and what these build on.
_PACKAGES = frozenset(("torch", "diffusers", "transformers", "peft", "huggingface_hub"))
_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def known_to_leave_modules_alone(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether only known code runs between two steps of this pipeline.

    That is the code of its class, its scheduler, the denoiser's modules and their attention processors, with nothing
    patched into these classes or objects, and no hooks.
    """
    plain = type(pipe).__mro__[1]  # the class that was gated
    if plain.__name__ not in _LOOPS:
        return False
    modules = list(denoiser.modules())
    processors = [vars(module)["processor"] for module in modules if "processor" in vars(module)]
    classes = {plain, *[type(each) for each in (pipe.scheduler, *modules, *processors)]}
    return (
        not any(getattr(module, hooks) for module in modules for hooks in _HOOKS)
        and all(map(_is_known_class, classes))
        and all(map(_has_nothing_patched_in, (pipe, pipe.scheduler, *modules, *processors)))
    )


def check_no_global_hooks() -> None:
    """Raise `UnsupportedError` if hooks for all modules are registered: torch.compile takes no notice of these."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        raise UnsupportedError(
            "Forward hooks are registered for all modules (register_module_forward_hook): expected none, since "
            "compiled graphs do not run them. Remove them, or use tgate_fx.gate(pipe, ...), which gates without "
            "compiling."
        )


def _is_known_class(cls: type[Any]) -> bool:
    """Whether a class and all it inherits from, down to each method, come from known packages."""
    return all(
        _is_known_name(base.__module__) and all(map(_is_known_function, vars(base).values())) for base in cls.__mro__
    )


def _has_nothing_patched_in(thing: Any) -> bool:
    """Whether no function of unknown origin was put on this object."""
    return all(map(_is_known_function, getattr(thing, "__dict__", {}).values()))


def _is_known_function(value: Any) -> bool:
    """Whether a value is no function, or one that was defined in a known package (whatever it says it wraps)."""
    while type(value) in _WITHIN or isinstance(value, Replacement):
        value = getattr(value, _WITHIN.get(type(value), "inner"))
    return not isinstance(value, types.FunctionType) or _is_known_name(value.__globals__.get("__name__", ""))


# What a function may be within, and the attribute that has it.
_WITHIN: dict[type[Any], str] = {
    types.MethodType: "__func__",
    functools.partial: "func",
    property: "fget",
    classmethod: "__func__",
    staticmethod: "__func__",
}


def _is_known_name(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _PACKAGES or package in _STANDARD_LIBRARY or package == __package__
