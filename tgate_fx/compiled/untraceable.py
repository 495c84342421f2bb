"""What may be on a module that torch.compile cannot take into a graph: said before anything is compiled."""

from __future__ import annotations

from torch import nn

from .. import private
from ..errors import UnsupportedError
from ..forward_patch import ForwardPatch

_GATE = "use tgate_fx.gate, which does not compile"

# What each of them is, and the way out, by the name that `private.untraceable` gives it.
_WAYS_OUT = {
    "accelerate": (
        "accelerate's hook, by which enable_sequential_cpu_offload moves weights",
        f"Call enable_model_cpu_offload instead, which moves whole models, or {_GATE}.",
    ),
    "device_map": (
        "accelerate's hook, by which a device map moves inputs to weights",
        f"Call pipe.reset_device_map() and pipe.to(...), which leave no hooks, or {_GATE}.",
    ),
    "group_offloading": (
        "group offloading",
        "Give regional=True to tgate_fx.compile, and only then enable group offloading, with "
        f'offload_type="block_level": blocks are compiled beneath it. Or {_GATE}.',
    ),
    "layerwise_casting": ("layerwise casting", f"Quantize the weights instead (torchao), or {_GATE}."),
    "ToMeBlock": ("token merging (tomesd)", f"Call tomesd.remove_patch(pipe), or {_GATE}."),
}

# What lies over the forward that is compiled where it is on the compiled module itself, and so stays out of the graph.
_OVER = ("accelerate", "device_map")


def check_stays(name: str, denoiser: nn.Module, settings: str) -> None:
    """Raise `UnsupportedError` if a denoiser's weights move between generations, for a CUDA graph reads them in place.

    torch would record each phase again in every generation, and keep all that it has recorded.

    Args:
        name: the denoiser's name, for the message.
        denoiser: the denoiser.
        settings: those for CUDA graphs, for the message.
    """
    if "accelerate" in private.untraceable(denoiser):
        raise UnsupportedError(
            f"{settings} was given for CUDA graphs, which read the weights at fixed addresses, and accelerate moves "
            f"those of {name} in every generation (enable_model_cpu_offload): expected weights that stay. Compile with "
            'mode=None or "max-autotune-no-cudagraphs", or leave offloading off.'
        )


def check_traceable(name: str, unit: nn.Module, patch: ForwardPatch) -> None:
    """Raise `UnsupportedError` if something within a module that is compiled as a whole cannot be traced.

    Args:
        name: the module's name, for the message.
        unit: the module.
        patch: what runs it in place of its forward; what lies over that is not compiled.
    """
    for inner, module in unit.named_modules():
        for found in private.untraceable(module):
            is_over = module is unit and (found in _OVER or not patch.is_outermost)
            if not is_over:
                what, way_out = _WAYS_OUT[found]
                raise UnsupportedError(
                    f"{name}{f'.{inner}' if inner else ''} has {what}, which torch.compile cannot take into a graph: "
                    f"expected none within what is compiled. {way_out}"
                )
