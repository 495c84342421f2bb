"""What compiled code depends on beside its inputs: the modules of the model and its weights.

torch.compile guards its graphs by the modules they were traced from. Code that was compiled ahead of time has no such
guards; these descriptions, made when it was compiled and compared later, take their place. (Torch's own ``aot_compile``
of 2.13 keeps guards, but none that know a thing by its identity: another forward or processor would go unseen.)
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..class_names import class_names
from ..compiled.checksum import checksum
from ..compiled.frozen_weights import can_be_read
from ..dispatch import DISPATCH
from ..forward_patch import ForwardPatch
from ..private import MODULE_STATE

# What says where a module came from, or is described apart: its children, its weights, and tgate_fx's own. And the
# other model that accelerate's hook for offloading names, which moves between devices.
_LEFT_OUT = MODULE_STATE | {DISPATCH, "prev_module_hook"}
# What changes in every generation.
_CHANGING = frozenset(("DiffusionPipeline", "SchedulerMixin"))
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def structure(denoiser: nn.Module) -> dict[str, str]:
    """Return, for every module of a denoiser, a digest of all but its weights' values.

    That is its class, attributes, hooks, attention processor, and the names, shapes, strides and dtypes of its weights;
    and of modules which only these attributes hold, such as those of an attention processor, the weights' values too.
    Code is told apart by name only.
    """
    describe = _Description(denoiser)
    return {name: _digest(describe.module(module)) for name, module in denoiser.named_modules()}


def weights(model: nn.Module) -> dict[str, str]:
    """Return, for every parameter and buffer of a model that can be read, a checksum of its bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: format(checksum(tensor.detach()), "x") for name, tensor in tensors if can_be_read(tensor)}


def digest(value: Any) -> str:
    """Return what tells a value from others by what it holds, in another process too; code by its name only."""
    return _digest(_Description(nn.Module()).value(value))


def differences(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the names under which two descriptions are not the same."""
    return [name or "the denoiser" for name in {**saved, **now} if saved.get(name) != now.get(name)]


def _own(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, without a forward that is its class's, or tgate_fx's in place of its class's.

    And without a registry of no hooks, which diffusers' pipelines leave on a model after their first generation.
    """
    from diffusers.hooks.hooks import HookRegistry  # takes seconds to import, which are spent once there is a model

    return {
        name: value
        for name, value in vars(module).items()
        if not _is_class_forward(_beneath(value), module) and not (isinstance(value, HookRegistry) and not value.hooks)
    }


def _beneath(value: Any) -> Any:
    """Return a value, or what tgate_fx put another forward in place of."""
    while isinstance(value, ForwardPatch):
        value = value.original_forward
    return value


def _is_class_forward(value: Any, module: nn.Module) -> bool:
    """Return whether a value is the ``forward`` that a module has if none was put on it, bound to this very module."""
    return isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is type(module).forward


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own parameters and buffers, by name."""
    named = (module.named_parameters, module.named_buffers)
    return dict(sorted(pair for each in named for pair in each(recurse=False, remove_duplicate=False)))


def _layout(tensor: torch.Tensor) -> tuple[str, ...]:
    # Compiled code reads a tensor by the strides that it had then.
    strides = str(tensor.stride()) if tensor.layout is torch.strided else str(tensor.layout)
    return (str(tuple(tensor.shape)), strides, str(tensor.dtype), tensor.device.type)


class _Description:
    """Puts the parts of a denoiser in a form whose ``repr`` is the same in another process, if they are."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._known = set(denoiser.modules())

    def module(self, module: nn.Module) -> object:
        """Return all but a module's children and its weights' values."""
        return (
            self.value(_own(module)),
            _name(type(module)),
            sorted(name for name, _ in module.named_children()),
            [(name, _layout(tensor)) for name, tensor in _tensors(module).items()],
        )

    def value(self, value: Any, within: tuple[int, ...] = ()) -> object:
        """Return what a value holds; ``within`` are the ids of those that hold it, of which none is described again."""
        value = _beneath(value)
        if value is None or isinstance(value, _PLAIN):
            return value
        if isinstance(value, type):
            return _name(value)
        if isinstance(value, torch.Tensor):
            return (*_layout(value), checksum(value.detach()))
        if hasattr(value, "tobytes"):  # an array of numpy, or an image
            kind = [str(getattr(value, name, "")) for name in ("shape", "dtype", "size", "mode")]
            return (_name(type(value)), kind, hashlib.sha256(value.tobytes()).hexdigest())
        if isinstance(value, nn.Module):
            return (_name(type(value)), self._unlisted(value))
        if id(value) in within:
            return within[::-1].index(id(value))
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value))
        within = (*within, id(value))
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)):
            return (_name(value), [self.value(item, within) for item in _bound(value)])
        if isinstance(value, Mapping):
            # Switching something off (FreeU) may leave None where nothing was before.
            items = {str(key): item for key, item in value.items() if key not in _LEFT_OUT and item is not None}
            return [(name, self.value(items[name], within)) for name in sorted(items)]
        if isinstance(value, (list, tuple)):
            return [self.value(item, within) for item in value]
        if isinstance(value, functools.partial):
            return [self.value(item, within) for item in (value.func, value.args, value.keywords)]
        if class_names(type(value)) & _CHANGING:
            return _name(type(value))
        return (_name(type(value)), self.value(getattr(value, "__dict__", {}), within))

    def _unlisted(self, module: nn.Module) -> object:
        """Return everything of a module that is not among those described."""
        modules = [(name, each) for name, each in module.named_modules() if each not in self._known]
        self._known.update(each for _, each in modules)
        return [
            (name, self.module(each), [checksum(tensor.detach()) for tensor in _tensors(each).values()])
            for name, each in modules
        ]


def _bound(value: Any) -> list[object]:
    """Return what a function or method was made with."""
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
