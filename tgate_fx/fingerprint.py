"""What compiled code depends on, beside its inputs: the model as it is put together, its weights, and the machine.

torch.compile guards its graphs by the modules they were traced from. Code that was compiled ahead of time has no such
guards; these descriptions, made when it was compiled and compared later, take their place.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .held import checksum
from .slots import Replacement

# What says where a module came from, or is described apart: its children, its weights, and tgate_fx's own.
_LEFT_OUT = frozenset(
    ("_modules", "_parameters", "_buffers", "_internal_dict", "_is_hf_initialized", "_tgate_dispatch")
)
# Reaches what a processor holds, but not the other model that accelerate's hook for offloading names: that one moves
# between devices.
_DEPTH = 4


def structure(denoiser: nn.Module) -> dict[str, str]:
    """For every module of a denoiser, a digest of all but its weights' values.

    That is its class, attributes, hooks, attention processor, and the names, shapes, strides and dtypes of its weights;
    and of modules which only these attributes hold, such as those of an attention processor, the weights' values too.
    Code is told apart by name only.
    """
    describe = _Description(denoiser)
    return {name: _digest(describe.module(module)) for name, module in denoiser.named_modules()}


def weights(denoiser: nn.Module) -> dict[str, str]:
    """For every parameter and buffer of a denoiser, a checksum of its bits."""
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    return {name: format(checksum(tensor.detach()), "x") for name, tensor in tensors}


def processor(device: torch.device) -> dict[str, str]:
    """What code for a device is compiled for: the kind of processor, its instructions, and on a CPU the threads.

    Inductor writes the number of threads into its loops and into the arrays in which they leave their parts of a sum.
    """
    if device.type == "cuda":
        return {
            "device": "cuda",
            "name": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        }
    return {
        "device": device.type,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instructions": _instructions(),
        "threads": str(torch.get_num_threads()),
    }


def cpuinfo(key: str) -> str:
    """What Linux says of the first processor under this key; empty if it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


@functools.cache
def _instructions() -> str:
    """The vector and matrix instructions that Linux says this processor has."""
    kinds = ("avx", "amx", "fma", "f16c", "sse4", "asimd", "sve", "bf16", "i8mm")
    flags = (cpuinfo("flags") or cpuinfo("Features")).split()  # x86 or ARM
    return " ".join(sorted(flag for flag in flags if flag.startswith(kinds)))


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The names under which two descriptions are not the same."""
    return [name or "the denoiser" for name in {**saved, **now} if saved.get(name) != now.get(name)]


def _own(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, without a forward that is its class's, or tgate_fx's in place of its class's."""
    return {name: value for name, value in vars(module).items() if not _is_class_forward(_beneath(value), module)}


def _beneath(value: Any) -> Any:
    """A value, or what tgate_fx put another forward in place of."""
    while isinstance(value, Replacement):
        value = value.inner
    return value


def _is_class_forward(value: Any, module: nn.Module) -> bool:
    """Whether a value is the ``forward`` that a module has if none was put on it, bound to this very module."""
    return isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is type(module).forward


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers, by name."""
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name in sorted(tensors) if (tensor := tensors[name]) is not None}


def _form(tensor: torch.Tensor) -> tuple[str, ...]:
    # Compiled code reads a tensor by the strides that it had then.
    strides = str(tensor.stride()) if tensor.layout is torch.strided else str(tensor.layout)
    return (str(tuple(tensor.shape)), strides, str(tensor.dtype), tensor.device.type)


class _Description:
    """Puts the parts of a denoiser in a form whose ``repr`` is the same in another process, if they are."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._known = set(denoiser.modules())

    def module(self, module: nn.Module) -> object:
        """All but a module's children and its weights' values."""
        return (
            self._value(_own(module), _DEPTH),
            _name(type(module)),
            sorted(module._modules),
            [(name, _form(tensor)) for name, tensor in _tensors(module).items()],
        )

    def _value(self, value: Any, depth: int) -> object:
        value = _beneath(value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
            return value
        if isinstance(value, type):
            return _name(value)
        if isinstance(value, torch.Tensor):
            return (*_form(value), checksum(value.detach()))
        if isinstance(value, nn.Module):
            return (_name(type(value)), self._unlisted(value))
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)):
            return (_name(value), [self._value(item, depth - 1) for item in _bound(value)] if depth else ())
        if depth == 0:
            return _name(type(value))
        if isinstance(value, Mapping):
            # Switching something off (FreeU) may leave None where nothing was before.
            said = {str(key): item for key, item in value.items() if key not in _LEFT_OUT and item is not None}
            return [(name, self._value(said[name], depth - 1)) for name in sorted(said)]
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value))
        if isinstance(value, (list, tuple)):
            return [self._value(item, depth - 1) for item in value]
        if isinstance(value, functools.partial):
            return [self._value(item, depth - 1) for item in (value.func, value.args, value.keywords)]
        return (_name(type(value)), self._value(getattr(value, "__dict__", {}), depth - 1))

    def _unlisted(self, module: nn.Module) -> object:
        """Of a module that is not among those described, everything."""
        modules = [(name, each) for name, each in module.named_modules() if each not in self._known]
        self._known.update(each for _, each in modules)
        return [
            (name, self.module(each), [checksum(tensor.detach()) for tensor in _tensors(each).values()])
            for name, each in modules
        ]


def _bound(value: Any) -> list[object]:
    """What a function or method was made with."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        return [value.__defaults__, value.__kwdefaults__, *map(_content, value.__closure__ or ())]
    return []


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _digest(described: object) -> str:
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]
