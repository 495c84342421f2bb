"""Upstream `tgate`'s loaders, in its call form and with its defaults.

    pipe = TgateSDLoader(pipe, gate_step=10, num_inference_steps=25)
    image = pipe.tgate("a red cat", gate_step=10, num_inference_steps=25).images[0]

``pipe.tgate`` returns what upstream's returns, bit for bit where upstream is right, and takes what the pipeline's own
call takes besides. The pipeline's own call stays ungated (with DeepCache for the DeepCache loaders, as upstream), and
`tgate_fx.restore` undoes it all. Other than upstream's, these refuse keywords that they do not know, and a loader's
``gate_step`` and ``num_inference_steps`` are defaults for ``pipe.tgate`` instead of being ignored.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .class_names import class_names
from .deepcache import DeepCache
from .errors import ArgumentError, UnsupportedError
from .gated import Gated
from .keywords import check_known
from .pipeline import gate

_TGATE_V2 = {"gate_step": 10, "sp_interval": 5, "fi_interval": 1, "warm_up": 2}
_WITH_DEEPCACHE = {"gate_step": 10, "sp_interval": 1, "fi_interval": 1, "warm_up": 0}
# What diffusers' pipelines still take by way of **kwargs.
_DEPRECATED = ("callback", "callback_steps")


def TgateSDLoader(pipe: Any, **defaults: Any) -> Any:  # noqa: N802
    """Give a Stable Diffusion pipeline upstream's ``tgate`` method.

    Args:
        pipe: the pipeline; it is changed in place.
        defaults: ``gate_step`` and ``num_inference_steps`` for calls of ``pipe.tgate`` that do not say.

    Returns:
        The same pipeline object.

    Raises:
        ArgumentError: another keyword.
        UnsupportedError: the pipeline is of another class than this loader's.
        StateError: the pipeline is gated already.
    """
    return _load(pipe, ("StableDiffusionPipeline",), defaults, _TGATE_V2)


def TgateSDXLLoader(pipe: Any, **defaults: Any) -> Any:  # noqa: N802
    """Give a Stable Diffusion XL pipeline upstream's ``tgate`` method, with ``lcm=True`` for LCM-SDXL.

    Arguments, result and errors are those of `TgateSDLoader`.
    """
    return _load(pipe, ("StableDiffusionXLPipeline",), defaults, _TGATE_V2, lcm=True)


def TgatePixArtAlphaLoader(pipe: Any, **defaults: Any) -> Any:  # noqa: N802
    """Give a PixArt-alpha pipeline upstream's ``tgate`` method, with ``lcm=True`` and ``guidance_scale=0`` for its LCM.

    Arguments, result and errors are those of `TgateSDLoader`.
    """
    return _load(pipe, ("PixArtAlphaPipeline",), defaults, _TGATE_V2, lcm=True)


# The name on the page of diffusers' documentation.
TgatePixArtLoader = TgatePixArtAlphaLoader


def TgatePixArtSigmaLoader(pipe: Any, **defaults: Any) -> Any:  # noqa: N802
    """Give a PixArt-Sigma pipeline upstream's ``tgate`` method.

    Arguments, result and errors are those of `TgateSDLoader`.
    """
    return _load(pipe, ("PixArtSigmaPipeline",), defaults, _TGATE_V2, lcm=True)


def TgateSVDLoader(pipe: Any, **defaults: Any) -> Any:  # noqa: N802
    """Give a Stable Video Diffusion pipeline upstream's ``tgate`` method.

    Arguments, result and errors are those of `TgateSDLoader`.
    """
    return _load(pipe, ("StableVideoDiffusionPipeline",), defaults, _TGATE_V2)


def TgateSDDeepCacheLoader(  # noqa: N802
    pipe: Any, cache_interval: int = 3, cache_branch_id: int = 0, **defaults: Any
) -> Any:
    """Give a Stable Diffusion pipeline DeepCache, and upstream's ``tgate`` method.

    Args:
        pipe: the pipeline; it is changed in place.
        cache_interval: the deep branch is computed at every multiple of this.
        cache_branch_id: where the deep branch begins; see `DeepCache`.
        defaults: ``gate_step`` and ``num_inference_steps`` for calls of ``pipe.tgate`` that do not say.

    Returns and raises what `TgateSDLoader` does.
    """
    deepcache = DeepCache(cache_interval, cache_branch_id)
    return _load(pipe, ("StableDiffusionPipeline",), defaults, _WITH_DEEPCACHE, deepcache=deepcache)


def TgateSDXLDeepCacheLoader(  # noqa: N802
    pipe: Any, cache_interval: int = 3, cache_branch_id: int = 0, **defaults: Any
) -> Any:
    """Give a Stable Diffusion XL pipeline DeepCache, and upstream's ``tgate`` method.

    Arguments, result and errors are those of `TgateSDDeepCacheLoader`.
    """
    deepcache = DeepCache(cache_interval, cache_branch_id)
    return _load(pipe, ("StableDiffusionXLPipeline",), defaults, _WITH_DEEPCACHE, deepcache=deepcache)


def _load(
    pipe: Any,
    classes: tuple[str, ...],
    defaults: Mapping[str, Any],
    upstreams: Mapping[str, int],
    *,
    lcm: bool = False,
    deepcache: DeepCache | None = None,
) -> Any:
    check_known(defaults, ("gate_step", "num_inference_steps"))
    if not class_names(type(pipe)) & set(classes):
        raise UnsupportedError(
            f"This loader was given a {type(pipe).__name__}: expected a {' or a '.join(classes)}. "
            "tgate_fx.gate(pipe, ...) takes every supported pipeline."
        )
    gate(pipe, gate_step=None, deepcache=deepcache)
    gated = Gated.of(pipe)
    assert gated is not None
    parameters = inspect.signature(pipe.__call__).parameters
    allowed = (*parameters, *_DEPRECATED, *(["lcm"] if lcm else []))
    gated.set_attribute(pipe, "tgate", functools.partial(_tgate, pipe, {**upstreams, **defaults}, allowed))
    return pipe


def _tgate(pipe: Any, defaults: Mapping[str, Any], allowed: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """Generate as the pipeline's own call does, gated."""
    check_known(kwargs, allowed)
    if kwargs.pop("lcm", False):
        _check_unguided(pipe, args, kwargs)
    return pipe(*args, **{**defaults, **kwargs})


def _check_unguided(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise `ArgumentError` if ``lcm=True`` is said of a call with guidance, which upstream cannot run either."""
    bound: Callable[..., inspect.BoundArguments] = inspect.signature(pipe.__call__).bind_partial
    arguments = bound(*args, **kwargs)
    arguments.apply_defaults()
    scale = arguments.arguments["guidance_scale"]
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if scale > 1 and getattr(denoiser.config, "time_cond_proj_dim", None) is None:
        raise ArgumentError(
            f"lcm=True was given with guidance_scale={scale!r}: expected a consistency model, which runs without "
            "guidance. Give guidance_scale=0, or leave lcm out."
        )
