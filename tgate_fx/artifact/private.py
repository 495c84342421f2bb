"""The one door to private names of torch that artifacts need, beside those of `tgate_fx.private`.

All are of torch's AOTInductor, whose own saving and loading would write the weights into each phase's library, and copy
them out of it again. They were checked on torch 2.9, 2.11, 2.13 and 2.15; without any of them, `tgate_fx.save` and
`tgate_fx.load` are refused with an `UnsupportedError`, before anything is compiled or changed.
"""

from __future__ import annotations

import base64
import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..compiled.private import packed
from ..errors import UnsupportedError
from ..private import find

# The option that makes torch return the constants beside the code, by its name in torch 2.9, or since; nothing is
# pickled.
_RETURN_CONSTANTS: Mapping[str, Any] = (
    {"aot_inductor.package_constants_on_disk": True}
    if torch.__version__ < "2.10"
    else {"aot_inductor.package_constants_on_disk_format": "pickle_weights"}
)

_OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    # torch writes to this: left to itself, to its own configuration, by which its caches are keyed.
    "aot_inductor.metadata": {},
    **_RETURN_CONSTANTS,
}

# Modules and classes, and the names in them without which nothing is saved or loaded.
_NEEDED = {
    "torch._inductor": ("aot_compile",),
    "torch._inductor.config.aot_inductor": tuple(name.partition(".")[2] for name in _OPTIONS),
    "torch._inductor.codecache": ("TensorProperties",),
    "torch._inductor.package": ("package_aoti",),
    "torch._C._aoti.AOTIModelPackageLoader": ("run",),
    "torch.export.pt2_archive._package.AOTICompiledModel": ("get_constant_fqns", "load_constants"),
    "torch.utils._pytree": ("tree_flatten", "treespec_dumps", "treespec_loads"),
}

# The same, where oneDNN packs weights.
_NEEDED_FOR_PACKED_WEIGHTS = {
    "torch.ops.mkldnn": ("data_ptr", "_nbytes", "_get_mkldnn_serialized_md"),
    "torch._C._aoti": ("alloc_tensor_by_stealing_from_void_ptr",),
}

# And AOTInductor's own C interface for these, kept for compiled models.
_C_FUNCTIONS = (
    "aoti_torch_create_tensor_from_blob_v2",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_layout__mkldnn",
)

# A prototype of our own for what Python's C interface wraps a pointer with: ctypes.pythonapi's is shared by everybody.
_CAPSULE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


def check_torch() -> None:
    """Raise `UnsupportedError` if this torch lacks what artifacts need."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    needed = {**_NEEDED, **(_NEEDED_FOR_PACKED_WEIGHTS if has_onednn else {})}
    lacking = [f"{owner}.{name}" for owner, names in needed.items() for name in names if not _has(owner, name)]
    lacking += [name for name in _C_FUNCTIONS if has_onednn and not hasattr(_torch_c(), name)]
    if lacking:
        raise UnsupportedError(
            f"torch {torch.__version__} has no {lacking[0]}, which artifacts need: expected torch 2.9 to 2.15. Install "
            "one, or use tgate_fx.compile and tgate_fx.warmup in every process."
        )


def caches_of_their_own() -> AbstractContextManager[None]:
    """Context manager: ``torch.compiler.save_cache_artifacts`` gives what is compiled within, and nothing else.

    Without the name: what else this process has compiled is among it, which takes space.
    """
    fresh: Callable[[], AbstractContextManager[None]] | None = find(
        "torch.compiler._cache.CacheArtifactManager.with_fresh_cache"
    )
    return nullcontext() if fresh is None else fresh()


def caches_are_on() -> bool:
    """Return whether torch.compile reads its caches; without the names, it is taken to do so."""
    on, off = find("torch._inductor.config.fx_graph_cache"), find("torch._inductor.config.force_disable_caches")
    return on is not False and not off


def _has(owner: str, name: str) -> bool:
    return hasattr(find(owner), name)


def _torch_c() -> Any:
    return ctypes.CDLL(torch._C.__file__)


def compile_package(
    graph: torch.fx.GraphModule, arguments: tuple[Any, ...], options: Mapping[str, Any], package: Path
) -> dict[str, Any]:
    """Compile a graph ahead of time into the file ``package``; enter it under torch's lock for compiling.

    Returns:
        The package's constants, as (storage owner, view) by name.
    """
    with _constants_as_tensors():
        made: Any = torch._inductor.aot_compile(graph, arguments, options={**options, **copy.deepcopy(_OPTIONS)})
    (constants,) = [each for each in made if not isinstance(each, str)]
    find("torch._inductor.package").package_aoti(str(package), [each for each in made if isinstance(each, str)])
    return dict(constants)


@contextmanager
def _constants_as_tensors() -> Iterator[None]:
    """Context manager: make inductor return constants as tensors; it cannot serialize packed ones."""
    with mock.patch.object(find("torch._inductor.codecache"), "TensorProperties", lambda tensor: tensor):
        yield


class LoadedPackage:
    """A package that was loaded; ``run`` takes and returns a list of tensors.

    ``torch._inductor.aoti_load_package`` would first compile programs to see which instructions there are, for a
    warning: 9 s where torch's caches are empty, and not without a C++ compiler. Calling what it returns would read both
    structures as text again, at every step. The package runs for one thread at a time: any other run waits on a GPU for
    the one before it.
    """

    def __init__(self, package: Path) -> None:
        one_thread, runners, current_device = True, 1, -1
        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", one_thread, runners, current_device)
        self._model = find("torch.export.pt2_archive._package").AOTICompiledModel(loader)
        self.run: Callable[[list[torch.Tensor]], list[torch.Tensor]] = loader.run

    def share_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read these weights where they are; they must be kept for as long as the package runs."""
        names = self._model.get_constant_fqns()
        weights = {name: tensors[name].detach() for name in names}
        self._model.load_constants(weights, check_full_update=True, user_managed=True)


class Structure(NamedTuple):
    """The structure of nested lists, tuples, dicts and diffusers' outputs, without their leaves."""

    spec: Any

    @classmethod
    def of(cls, value: Any) -> Structure:
        """Return the structure of a value."""
        return cls(find("torch.utils._pytree").tree_flatten(value)[1])

    @classmethod
    def loads(cls, text: str) -> Structure:
        """Return the structure that `dumps` wrote."""
        return cls(find("torch.utils._pytree").treespec_loads(text))

    def dumps(self) -> str:
        """Return it as text."""
        text: str = find("torch.utils._pytree").treespec_dumps(self.spec)
        return text

    def fill(self, leaves: Sequence[Any]) -> Any:
        """Return the value with these leaves."""
        return self.spec.unflatten(leaves)


def packed_with_description(tensor: torch.Tensor) -> tuple[memoryview, str]:
    """Return the memory behind a tensor in oneDNN's layout, and oneDNN's description of it as text."""
    behind = packed(tensor)
    assert behind is not None  # see `check_torch`
    return behind.data, base64.b64encode(behind.description).decode()


def packed_tensor(data: torch.Tensor, dtype: str, shape: Sequence[int], stride: Sequence[int], packing: str) -> Any:
    """Return a tensor in oneDNN's layout that reads ``data``, made by torch's C interface as AOTInductor makes its own.

    The option ``cpp.weight_prepack=False`` would do without packed weights, but linear layers take 1.5 times as long
    on an AMD processor (torch 2.13). Without the name ``_use_count``, a tensor is kept for ever.
    """
    torch_c = _torch_c()
    dimensions = len(shape)
    description = base64.b64decode(packing)
    handle = ctypes.c_void_p()
    failed = torch_c.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_int64(dimensions),
        (ctypes.c_int64 * dimensions)(*shape),
        (ctypes.c_int64 * dimensions)(*stride),
        ctypes.c_int64(0),  # elements from the beginning of the data
        ctypes.c_int32(getattr(torch_c, f"aoti_torch_dtype_{dtype}")()),
        ctypes.c_int32(torch_c.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),  # the CPU's number
        ctypes.byref(handle),
        ctypes.c_int32(torch_c.aoti_torch_layout__mkldnn()),
        description,
        ctypes.c_int64(len(description)),
    )
    if failed:
        raise RuntimeError("torch cannot make a tensor of packed weights")
    tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_CAPSULE(handle, None, None))
    if getattr(tensor, "_use_count", int)() > 1:  # it was copied from the handle, which would keep it for ever
        torch_c.aoti_torch_delete_tensor_object(handle)
    tensor._tgate_data = data  # type: ignore[attr-defined]  # it does not keep its data alive by itself
    return tensor
