"""What a manifest may say: every field is checked before a file is mapped, or a package run.

A manifest that was changed, and its digest made to fit, is refused by name; see `manifest.read` for changes of other
kinds.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..auto_gate import AutoGate
from ..errors import ArgumentError, StateError
from ..roles import Kind, Role
from ..schedule import Schedule

_PACKED = ("float32", "bfloat16", "float16")
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_MOST_DIMENSIONS = 16
_PACKAGE = re.compile(r"[0-9]{1,4}\.pt2")
_CHECKSUM = re.compile(r"-?[0-9a-f]{1,17}-[0-9a-f]{0,14}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Check = Callable[[Any], bool]


def check(path: Path, contents: Any) -> None:
    """Raise `StateError` unless the contents of a manifest are of the form that `tgate_fx.save` writes.

    Args:
        path: the manifest's, for messages.
        contents: what was read.
    """
    _require(path, "contents", contents, "a dictionary", lambda value: isinstance(value, dict))
    expected: dict[str, tuple[str, Check]] = {
        "torch": ("text", _is_text),
        "diffusers": ("text", _is_text),
        "processor": ("text by name", _is_texts),
        "model": ("text by name", _is_texts),
        "structure": ("text by name", _is_texts),
        "weights": ("text by name, or null", lambda value: value is None or _is_texts(value)),
        "schedule": ("the settings of a schedule", _is_schedule),
        "deepcache": ("a number of a branch, or null", lambda value: value is None or _is_count(value)),
        "gate_companions": ("true or false", lambda value: isinstance(value, bool)),
        "phases": ("a list of phases", lambda value: isinstance(value, list)),
        "weights_file": (
            "bytes, checksum and sha256 of a file, or null",
            lambda value: value is None or _is_file(value),
        ),
        "caches": ("settings and a file, or null", lambda value: value is None or _is_caches(value)),
    }
    _require_all(path, "", contents, expected)
    parts = len(contents["phases"]) > 0, contents["weights_file"] is not None, contents["caches"] is None
    _require(path, "code", parts, "packages and their weights, or caches", lambda value: len(set(value)) == 1)
    together = contents["deepcache"], contents["schedule"]["deep_interval"]
    both = "a branch and an interval of the deep branch, or neither"
    _require(path, "deepcache", together, both, lambda value: (value[0] is None) == (value[1] is None))
    packages = []
    for index, phase in enumerate(contents["phases"]):
        _check_phase(path, f"phases[{index}]", phase, contents["weights_file"]["bytes"])
        packages.append(phase["package"])
    _require(path, "packages", packages, "a file for each phase", lambda value: len(set(value)) == len(value))


def schedule_of(said: Mapping[str, Any]) -> Schedule:
    """Return the schedule that a manifest says, whose gate may open by itself."""
    gate = said["gate_step"]
    return Schedule(**{**said, "gate_step": AutoGate(**gate) if isinstance(gate, dict) else gate})


def _check_phase(path: Path, name: str, phase: Any, file_size: int) -> None:
    _require(path, name, phase, "a dictionary", lambda value: isinstance(value, dict))
    expected: dict[str, tuple[str, Check]] = {
        "name": ("text", _is_text),
        "roles": ("a role for each kind of site", _is_roles),
        "signature": ("text by name", _is_texts),
        "results": ("text", _is_text),
        "package": ("a file's name such as 0.pt2", lambda value: _is_text(value) and bool(_PACKAGE.fullmatch(value))),
        "file": ("bytes, checksum and sha256 of a file", _is_file),
        "constants": ("a place in the file for each weight", lambda value: isinstance(value, dict)),
    }
    _require_all(path, f"{name}.", phase, expected)
    for weight, entry in phase["constants"].items():
        place = f"{name}.constants[{weight!r}]"
        _require(
            path, place, entry, "a place within the file, a shape and a dtype", lambda each: _is_entry(each, file_size)
        )


def _require_all(path: Path, prefix: str, found: dict[str, Any], expected: Mapping[str, tuple[str, Check]]) -> None:
    for name, (what, holds) in expected.items():
        _require(path, prefix + name, found.get(name, _MISSING), what, holds)
    unknown = [name for name in found if name not in expected]
    _require(path, f"{prefix}fields", unknown, "none but those that save writes", lambda value: not value)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def _require(path: Path, name: str, value: Any, what: str, holds: Check) -> None:
    if not holds(value):
        raise StateError(
            f"{path} has {name} as {reprlib.repr(value)}: expected {what}, as tgate_fx.save writes it. Save the "
            "artifact again."
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"bytes", "checksum", "sha256"}
        and _is_count(value["bytes"])
        and _is_text(value["checksum"])
        and bool(_CHECKSUM.fullmatch(value["checksum"]))
        and _is_text(value["sha256"])
        and bool(_SHA256.fullmatch(value["sha256"]))
    )


def _is_caches(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"settings", "file"}
        and _is_file(value["file"])
        and _is_settings(value["settings"])
    )


def is_plain(value: Any) -> bool:
    """Return whether a manifest can hold this as the value of an option of torch.compile's."""
    return value is None or isinstance(value, (bool, int, float, str))


def _is_settings(value: Any) -> bool:
    """Return whether torch.compile may be given these."""
    if not isinstance(value, dict) or set(value) != {"mode", "dynamic", "options", "regional"}:
        return False
    options, mode = value["options"], value["mode"]
    plain = options is None or (isinstance(options, dict) and all(map(is_plain, options.values())))
    named = mode is None or (isinstance(mode, str) and options is None)
    return plain and named and isinstance(value["regional"], bool) and value["dynamic"] in (None, True, False)


def _is_roles(value: Any) -> bool:
    known = [role.value for role in Role]
    return isinstance(value, list) and len(value) == len(Kind) and all(each in known for each in value)


def _is_schedule(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Schedule)}
    if not isinstance(value, dict) or set(value) != names:
        return False
    try:
        schedule_of(value)
    except (ArgumentError, TypeError):
        return False
    return value["last"] is None and isinstance(value["off"], bool)


def _is_entry(entry: Any, file_size: int) -> bool:
    """Return whether a weight lies within the file, and its elements within its bytes."""
    names = {"file_offset", "bytes", "dtype", "device", "shape", "stride", "offset", "packed", "checksum"}
    if not isinstance(entry, dict) or set(entry) != names:
        return False
    if not all(_is_count(entry[name]) for name in ("file_offset", "bytes", "offset")):
        return False
    shape, stride = entry["shape"], entry["stride"]
    sizes = [
        isinstance(each, list) and len(each) <= _MOST_DIMENSIONS and all(map(_is_count, each))
        for each in (shape, stride)
    ]
    dtype = getattr(torch, entry["dtype"], None) if _is_text(entry["dtype"]) else None
    if not all(sizes) or len(shape) != len(stride) or not isinstance(dtype, torch.dtype):
        return False
    if entry["device"] not in _DEVICES or not _is_text(entry["checksum"]):
        return False
    if entry["file_offset"] + entry["bytes"] > file_size:
        return False
    if entry["packed"] is not None:
        return entry["dtype"] in _PACKED and _is_base64(entry["packed"])
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if all(shape) else -1
    fits: bool = (entry["offset"] + last + 1) * dtype.itemsize <= entry["bytes"]
    return fits and entry["bytes"] % dtype.itemsize == 0 and entry["file_offset"] % dtype.itemsize == 0


def _is_base64(value: Any) -> bool:
    try:
        return _is_text(value) and bool(base64.b64decode(value, validate=True))
    except (binascii.Error, ValueError):
        return False
