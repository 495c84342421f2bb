"""The door to private and undocumented names of torch, accelerate and diffusers that are on modules and pipelines.

Those of torch.compile have a door of their own, and so have those of artifacts. Each function says what it is for and
what happens where a name is gone: mostly a slower right answer, or an `UnsupportedError` when `tgate_fx.compile` is
called. All were checked on torch 2.9, 2.11, 2.13 and 2.15, accelerate 1.0 and 1.15, and diffusers 0.35 and 0.42. Names
are looked up when they are needed, since some take seconds to import.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch
from torch import nn

# accelerate's hooks replace `module.forward` and keep the one they found here: beneath them is the place that survives
# their being removed and added again (diffusers does so after every generation with CPU offload). Without the name,
# what is put on a module that has such a hook is lost with the hook, and the gate is refused at the next generation.
BENEATH_HOOK = "_old_forward"

# What torch and diffusers keep on every module to say where it came from, or what is described apart. With another
# name, artifacts are refused for a difference that does not count.
MODULE_STATE = frozenset(("_modules", "_parameters", "_buffers", "_internal_dict", "_is_hf_initialized"))

# diffusers' pipelines record here how many steps a call runs (``num_timesteps`` only reads it). With another name, a
# number that an earlier call recorded is not told from this call's own.
STEP_COUNT = "_num_timesteps"

_UNTRACEABLE_HOOKS = ("group_offloading", "layerwise_casting")


def find(path: str) -> Any:
    """Return what a dotted name stands for, importing modules on the way; None if there is no such thing."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 2):
        if not hasattr(found, part) and isinstance(found, types.ModuleType):
            try:
                importlib.import_module(".".join(parts[:index]))
            except ImportError:
                return None
        found = getattr(found, part, None)
        if found is None:
            return None
    return found


def is_compiled_in_place(module: nn.Module) -> bool:
    """Return whether torch.compile runs this module, past any forward that is put on it. Without the names: the gate is
    refused after a generation that went past it.
    """
    state = vars(module)  # asked of every module at every generation, where getattr would take long to find nothing
    return "_orig_mod" in state.get("_modules", ()) or state.get("_compiled_call_impl") is not None


def caching_hooks(module: nn.Module) -> list[str]:
    """Return the names of diffusers' hooks on a module that keep something from one step for the next: its caches.
    Without the names: none are seen, and what a cache leaves out is noticed where it disagrees with the gate.
    """
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", {})
    return [name for name, hook in hooks.items() if getattr(hook, "_is_stateful", False)]


def untraceable(module: nn.Module) -> list[str]:
    """Return what is on a module that Dynamo cannot trace: "accelerate" for a hook of its that may move weights,
    "device_map" for one that moves inputs only, and the names of diffusers' hooks and of tomesd's class. Without the
    names: the first generation raises a `CompileError` that names the cause in Dynamo's words.
    """
    state = vars(module)
    found = [name for name in getattr(state.get("_diffusers_hook"), "hooks", ()) if name in _UNTRACEABLE_HOOKS]
    hook = state.get("_hf_hook")
    if hook is not None:
        stays = all(getattr(each, "offload", True) is False for each in getattr(hook, "hooks", (hook,)))
        found.append("device_map" if stays else "accelerate")
    if type(module).__name__ == "ToMeBlock":
        found.append("ToMeBlock")
    return found


def has_hooks(module: nn.Module) -> bool:
    """Return whether forward hooks are on a module. Without the names: always, so that guards are checked."""
    return any(getattr(module, name, True) for name in ("_forward_hooks", "_forward_pre_hooks"))


def takes_loras(denoiser: nn.Module) -> bool:
    """Return whether a model takes LoRAs of diffusers', and with them a call's scale. Without the name: it does not,
    and each such scale takes graphs of its own where no LoRA is loaded.
    """
    return hasattr(denoiser, "_hf_peft_config_loaded") or hasattr(denoiser, "peft_config")


def wrapped(function: Any) -> Any:
    """Return what a function says that it wraps, None if nothing. Without torch's name for its own wrappers: what they
    say by Python's.
    """
    return getattr(function, "_torchdynamo_orig_callable", None) or getattr(function, "__wrapped__", None)


def settle_cache_hooks(module: nn.Module) -> None:
    """Put on a model what diffusers' pipelines put on it at the end of their first generation, where they reset caches.

    A forward that reads the model's own dtype looks at that attribute, and graphs are guarded by it. Without the name
    such graphs are compiled once more in the second generation.
    """
    reset = getattr(module, "_reset_stateful_cache", None)
    if reset is not None:
        reset()


def version_of(tensor: torch.Tensor) -> int | None:
    """Return how often a tensor was written to, None if that is not counted: its bits are read all the same."""
    version: int | None = None if tensor.is_inference() else getattr(tensor, "_version", None)
    return version


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that this tensor will not move. Without the name: they copy it at every step."""
    mark = find("torch._dynamo.mark_static_address")
    if mark is not None:
        mark(tensor)


def repeated_blocks(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the class names of the blocks that a model of diffusers repeats. Without the name: none are named."""
    return tuple(getattr(denoiser, "_repeated_blocks", None) or ())


def scales_lora_late() -> bool:
    """Return whether diffusers' UNet applies a call's scale of LoRAs after its first layers, as it did up to 0.35.

    Without the name these layers are not scaled under `tgate_fx.compile`.
    """
    return find("diffusers.utils.peft_utils.apply_lora_scale") is None


def progress_bar_config(pipe: Any) -> dict[str, Any]:
    """Return the settings of a pipeline's progress bar. Without the name: none, which `warmup` then leaves."""
    return dict(getattr(pipe, "_progress_bar_config", {}))
