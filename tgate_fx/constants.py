"""The weights that compiled phases hold, in one file that is mapped into memory rather than read.

Left to itself, AOTInductor writes them into each phase's library and copies them out of it again when that is loaded.
Here every one is written once, though several phases hold it; phases compute from the file's pages, which processes
that map the same file share.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import torch

from .errors import UnsupportedError

# What the constants of a graph are compiled with.
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # nothing is pickled: they are just returned
}

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector

# What Python's C interface wraps a pointer with. (The function that ctypes itself has of this name is everybody's.)
_CAPSULE = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)

Entry = dict[str, Any]  # where a constant is in the file, and its form
Constants = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # for each name, what holds the bytes, and the form


@contextmanager
def returned() -> Iterator[None]:
    """While it is entered, inductor returns the constants themselves, with `OPTIONS`; else it fails on packed ones.

    What is replaced for it is the whole process's: enter it under torch's lock for compiling.
    """
    codecache = importlib.import_module("torch._inductor.codecache")
    if not hasattr(codecache, "TensorProperties"):
        raise UnsupportedError(
            f"torch {torch.__version__} does not hand out compiled weights as expected. Use 2.13, "
            'options={"freezing": False}, or tgate_fx.warmup in every process.'
        )
    with mock.patch.object(codecache, "TensorProperties", lambda tensor: tensor):
        yield


class ConstantsWriter:
    """Writes constants to a file, those with the same bytes once; none of those whose names are ``left_out``."""

    def __init__(self, file: BinaryIO, left_out: Collection[str]) -> None:
        self._file = file
        self._left_out = left_out
        self._places: dict[bytes, int] = {}

    def write(self, constants: Constants) -> dict[str, Entry]:
        """Write what is not in the file yet; where each is."""
        return {
            name: self._entry(holder.detach(), form.detach())
            for name, (holder, form) in constants.items()
            if name not in self._left_out
        }

    def _entry(self, holder: torch.Tensor, form: torch.Tensor) -> Entry:
        data = _bytes(holder)
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            self._places[digest] = self._file.tell()
            self._file.write(data)
        return {
            "place": self._places[digest],
            "bytes": data.nbytes,
            "dtype": str(form.dtype).removeprefix("torch."),
            "device": form.device.type,
            "shape": list(form.shape),
            "stride": list(form.stride()),
            "offset": form.storage_offset(),
            "packed": _packing(form) if form.is_mkldnn else None,
        }


def mapped(path: Path, phases: list[dict[str, Entry]]) -> list[dict[str, torch.Tensor]]:
    """The constants of each phase, from the pages of a file that `ConstantsWriter` wrote."""
    file = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    return [{name: _tensor(file, entry) for name, entry in entries.items()} for entries in phases]


def _bytes(holder: torch.Tensor) -> memoryview:
    """The memory behind a tensor, all of its storage."""
    if holder.is_mkldnn:
        place, size = torch.ops.mkldnn.data_ptr(holder), torch.ops.mkldnn._nbytes(holder)
        return memoryview((ctypes.c_ubyte * size).from_address(place))
    storage = torch.empty(0, dtype=torch.uint8, device=holder.device).set_(holder.untyped_storage())
    return storage.cpu().numpy().data


def _packing(form: torch.Tensor) -> str:
    """oneDNN's description of how a tensor is laid out."""
    return base64.b64encode(bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(form).tolist())).decode()


def _tensor(file: torch.Tensor, entry: Entry) -> torch.Tensor:
    data = file[entry["place"] : entry["place"] + entry["bytes"]]
    if entry["packed"] is not None:
        return _packed_tensor(data, entry)
    flat = data.view(getattr(torch, entry["dtype"])).to(entry["device"])
    return flat.as_strided(entry["shape"], entry["stride"], flat.storage_offset() + entry["offset"])


def _packed_tensor(data: torch.Tensor, entry: Entry) -> torch.Tensor:
    """A tensor in oneDNN's layout that reads ``data``, made as AOTInductor makes its own: by torch's C interface."""
    torch_c = ctypes.CDLL(torch._C.__file__)
    dimensions = len(entry["shape"])
    packing = base64.b64decode(entry["packed"])
    handle = ctypes.c_void_p()
    failed = torch_c.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_int64(dimensions),
        (ctypes.c_int64 * dimensions)(*entry["shape"]),
        (ctypes.c_int64 * dimensions)(*entry["stride"]),
        ctypes.c_int64(0),  # elements from the beginning of the data
        ctypes.c_int32(getattr(torch_c, f"aoti_torch_dtype_{entry['dtype']}")()),
        ctypes.c_int32(torch_c.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),  # the CPU's number
        ctypes.byref(handle),
        ctypes.c_int32(torch_c.aoti_torch_layout__mkldnn()),
        packing,
        ctypes.c_int64(len(packing)),
    )
    if failed:
        raise RuntimeError("torch cannot make a tensor of packed weights")
    tensor: torch.Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_CAPSULE(handle, None, None))
    tensor._tgate_data = data  # type: ignore[attr-defined]  # which it does not keep alive by itself
    return tensor
