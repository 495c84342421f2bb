"""A device beside the CPU, emulated on it: tensors are there or here, and what makes the host wait is counted.

It is eager, and for a process of its own, since torch never forgets a device. By names of torch that are experimental:
`IS_AVAILABLE` says whether this torch has them.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch.utils._pytree import tree_iter, tree_map

DEVICE = "emulated"
IS_AVAILABLE = hasattr(registration, "_setup_privateuseone_for_python_backend")

aten = torch.ops.aten

_COPIES = {aten.copy_.default, aten._copy_from.default, aten._to_copy.default}
_INDEXES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_TAKE_BOTH = _COPIES | _INDEXES

# Whose result the host needs, in its value or its shape.
_READ = {
    aten._local_scalar_dense.default: "a number",
    aten.equal.default: "a comparison",
    aten.nonzero.default: "a number of elements",
    aten.masked_select.default: "a number of elements",
}

# What torch calls in places from which Python is reached by a kernel of its own only, or resizes a result in.
_KERNELS = (
    aten._copy_from.default,
    aten._local_scalar_dense.default,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.copy_.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.eye.default,
    aten.eye.m,
    aten.linspace.default,
)

waits: Counter[str] = Counter()
_libraries: list[torch.library.Library] = []


class OnDevice(torch.Tensor):
    """A tensor that is on the device: ``held`` are its contents, which only kernels see."""

    held: torch.Tensor

    def __new__(cls, held: torch.Tensor) -> OnDevice:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, device=f"{DEVICE}:0", **form)

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, kernel: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(kernel, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        waits["a list"] += 1
        return self.held.tolist()

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), form)


class _Module(getattr(registration, "_DummyBackendModule", object)):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> None:
    """Make the device known to torch."""
    registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(_run, dispatch_key="PrivateUse1")
    _libraries.append(torch.library.Library("aten", "IMPL"))
    for kernel in _KERNELS:
        _libraries[-1].impl(kernel, functools.partial(_run, kernel), dispatch_key="PrivateUse1")


def _run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel where its tensors are, or where it is told to put its result."""
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, OnDevice)]
    here = [each for each in tensors if not isinstance(each, OnDevice) and each.dim()]
    if there and here and kernel not in _TAKE_BOTH:
        raise RuntimeError(
            f"{kernel} was given tensors of the device, and of the CPU: {[[*each.shape] for each in here]}"
        )
    to_device = _is_device(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    source = bool(there)
    if kernel is aten.copy_.default:
        to_device, source = (isinstance(each, OnDevice) for each in args[:2])
    elif kernel is aten._copy_from.default:
        source, to_device = (isinstance(each, OnDevice) for each in args[:2])
    if kernel in _COPIES and source != to_device:
        waits["a copy to the device" if to_device else "a copy to the CPU"] += 1
    if there and kernel in _READ:
        waits[_READ[kernel]] += 1
    if kernel in _INDEXES and any(isinstance(each, OnDevice) and each.dtype is torch.bool for each in args[1]):
        waits["a number of elements"] += 1
    result = kernel(*tree_map(_held, args), **tree_map(_held, kwargs))
    assert all(each.shape == each.held.shape for each in there), f"{kernel} resizes, and is none of _KERNELS"
    if not to_device:
        return result
    written = {id(each.held): each for each in there}

    def put(value: Any) -> Any:
        if id(value) in written:
            return written[id(value)]
        return OnDevice(value) if isinstance(value, torch.Tensor) else value

    return tree_map(put, result)


def _is_device(device: Any) -> bool:
    return torch.device(device).type == DEVICE


def _held(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and _is_device(value) else value
