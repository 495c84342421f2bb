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

from ..errors import UnsupportedError
from ..forward_patch import ForwardPatch
from ..private import has_hooks, wrapped
from . import private

# Pipelines of diffusers whose loop changes nothing on a denoiser, as a test sees too. (StableDiffusionGLIGENPipeline's
# does.)
_LOOPS = frozenset(
    (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableVideoDiffusionPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "KolorsPipeline",
        "KolorsImg2ImgPipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "HunyuanDiTPipeline",
        "LuminaPipeline",
        "SanaPipeline",
        "SanaControlNetPipeline",
        "SanaSprintPipeline",
        "SanaSprintImg2ImgPipeline",
        "SanaVideoPipeline",
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVideoToVideoPipeline",
        "WanVACEPipeline",
        "LTXPipeline",
        "LTXImageToVideoPipeline",
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "CosmosTextToWorldPipeline",
        "Cosmos2TextToImagePipeline",
        "StableAudioPipeline",
    )
)
_NETWORKS = ("unet", "transformer", "transformer_2", "controlnet")  # what a loop calls

# Packages whose code changes nothing from step to step: of modules, processors and schedulers, and what these build on.
_PACKAGES = frozenset(("torch", "diffusers", "transformers", "peft", "huggingface_hub"))
_STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)


def runs_only_known_code(pipe: Any, pipeline_class: type[Any], denoiser: nn.Module) -> bool:
    """Return whether only known code runs between two steps of this pipeline.

    That is the code of its class, its scheduler, the modules of its denoisers and ControlNets and their attention
    processors, with nothing patched into these classes or objects, and no hooks.
    """
    if pipeline_class.__name__ not in _LOOPS:
        return False
    networks = [denoiser, *[getattr(pipe, name, None) for name in _NETWORKS]]
    modules = list({each: None for network in networks if isinstance(network, nn.Module) for each in network.modules()})
    processors = [vars(module)["processor"] for module in modules if "processor" in vars(module)]
    classes = {pipeline_class, *[type(each) for each in (pipe.scheduler, *modules, *processors)]}
    return (
        not any(map(has_hooks, modules))
        and all(map(_is_known_class, classes))
        and all(map(_has_nothing_patched_in, (pipe, pipe.scheduler, *modules, *processors)))
    )


def check_no_global_hooks() -> None:
    """Raise `UnsupportedError` if hooks for all modules are registered: torch.compile takes no notice of these."""
    if private.has_global_hooks():
        raise UnsupportedError(
            "Forward hooks are registered for all modules (register_module_forward_hook): expected none, since "
            "compiled graphs do not run them. Remove them, or use tgate_fx.gate(pipe, ...), which gates without "
            "compiling."
        )


def _is_known_class(cls: type[Any]) -> bool:
    """Return whether a class and all it inherits from, down to each method, come from known packages."""
    return all(
        _is_known_name(base.__module__) and all(map(_is_known_function, vars(base).values())) for base in cls.__mro__
    )


def _has_nothing_patched_in(thing: Any) -> bool:
    """Return whether no function of unknown origin was put on this object."""
    return all(map(_is_known_function, getattr(thing, "__dict__", {}).values()))


def _is_known_function(value: Any) -> bool:
    """Return whether a value is nothing to call, or comes from known packages, with all that it wraps."""
    while value is not None:
        while type(value) in _WITHIN or isinstance(value, ForwardPatch):
            value = getattr(value, _WITHIN.get(type(value), "original_forward"))
        if isinstance(value, (type, nn.Module)) or not callable(value):
            return True
        is_function = isinstance(value, types.FunctionType)
        if not _is_known_name(value.__globals__.get("__name__", "") if is_function else type(value).__module__):
            return False
        value = wrapped(value)
    return True


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
    return package in _PACKAGES or package in _STANDARD_LIBRARY or package == __package__.partition(".")[0]
