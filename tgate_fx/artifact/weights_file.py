"""The weights that are part of compiled phases, in one file that is mapped into memory rather than read.

AOTInductor writes them into each phase's library, and copies them out of it again when that is loaded; with its options
``binary_blob`` or ``force_mmap_weights`` it still copies each phase's (torch 2.13, CPU). Here every weight is written
once for all phases, which compute from the file's pages; processes that map the same file share these.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..compiled.checksum import checksum
from ..errors import StateError
from . import private

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector

Entry = dict[str, Any]  # where a weight is in the file, its dtype, shape and strides
Constants = Mapping[str, tuple[torch.Tensor, torch.Tensor]]  # by name: what owns the storage, and the view of it


class WeightsWriter:
    """Writes weights to a file, those with the same bytes once; none of those whose names are ``left_out``."""

    def __init__(self, file: BinaryIO, left_out: Collection[str]) -> None:
        self._file = file
        self._left_out = left_out
        self._written: dict[bytes, tuple[int, int]] = {}  # by digest: where in the file, and the checksum

    def write(self, constants: Constants) -> dict[str, Entry]:
        """Write what is not in the file yet; return where each is."""
        return {
            name: self._entry(storage_owner.detach(), view.detach())
            for name, (storage_owner, view) in constants.items()
            if name not in self._left_out
        }

    def _entry(self, storage_owner: torch.Tensor, view: torch.Tensor) -> Entry:
        data = _bytes(storage_owner)
        digest = hashlib.sha256(data).digest()
        if digest not in self._written:
            self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
            bits = checksum(torch.frombuffer(data, dtype=torch.uint8)) if data.nbytes else 0
            self._written[digest] = self._file.tell(), bits
            self._file.write(data)
        file_offset, bits = self._written[digest]
        entry = {
            "file_offset": file_offset,
            "bytes": data.nbytes,
            "dtype": str(view.dtype).removeprefix("torch."),
            "device": view.device.type,
            "shape": list(view.shape),
            "stride": list(view.stride()),
            "offset": view.storage_offset(),
            "packed": private.packed_with_description(view)[1] if view.is_mkldnn else None,
        }
        return {**entry, "checksum": _seal(bits, entry)}


def mapped(path: Path, phases: list[dict[str, Entry]]) -> list[dict[str, torch.Tensor]]:
    """Return the weights of each phase, from the pages of a file that `WeightsWriter` wrote.

    Raises:
        StateError: an entry does not say what is there.
    """
    file = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8, device="cpu")

    @functools.cache  # phases share most of them
    def bits(start: int, size: int) -> int:
        return checksum(file[start : start + size])

    for entries in phases:
        for name, entry in entries.items():
            said = {key: value for key, value in entry.items() if key != "checksum"}
            if _seal(bits(entry["file_offset"], entry["bytes"]), said) != entry["checksum"]:
                raise StateError(
                    f"{path} does not have the weight {name} where the manifest says: expected what tgate_fx.save "
                    "wrote. Copy the artifact again, or save it again."
                )
    return [{name: _tensor(file, entry) for name, entry in entries.items()} for entries in phases]


def _seal(bits: int, said: Mapping[str, Any]) -> str:
    """Return the checksum of a weight's bytes and one of what is said of them."""
    digest = hashlib.sha256(json.dumps(dict(said), sort_keys=True).encode()).hexdigest()
    return f"{bits:x}-{digest[:16]}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory behind a tensor, all of its storage."""
    if tensor.is_mkldnn:
        return private.packed_with_description(tensor)[0]
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    return storage.cpu().numpy().data


def _tensor(file: torch.Tensor, entry: Entry) -> torch.Tensor:
    data = file[entry["file_offset"] : entry["file_offset"] + entry["bytes"]]
    if entry["packed"] is not None:
        tensor: torch.Tensor = private.packed_tensor(
            data, entry["dtype"], entry["shape"], entry["stride"], entry["packed"]
        )
        return tensor
    flat = data.view(getattr(torch, entry["dtype"])).to(entry["device"])
    return flat.as_strided(entry["shape"], entry["stride"], flat.storage_offset() + entry["offset"])
