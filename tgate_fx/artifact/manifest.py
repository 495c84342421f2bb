"""What an artifact says of itself: what it was compiled from and for, and whether that is still so."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compiled.checksum import checksum
from ..compiled.cpu import processor
from ..errors import StateError
from ..network import Network
from . import fingerprint
from .contents import check

_FILE = "manifest.json"
_FORMAT = 12

# The file of the weights that are part of the packages.
WEIGHTS_FILE = "constants.bin"


def environment(networks: Sequence[Network]) -> dict[str, Any]:
    """Return what compiled code depends on beside the models' parts: versions, processor, configuration."""
    return {
        "torch": str(torch.__version__),
        "diffusers": importlib.metadata.version("diffusers"),
        "processor": processor(next(networks[0].module.parameters()).device),
        "model": _of_each(networks, _model),
    }


def structure(networks: Sequence[Network]) -> dict[str, str]:
    """Return what tells denoisers from others, but for their weights' values: see `fingerprint.structure`."""
    return _of_each(networks, fingerprint.structure)


def _of_each(networks: Sequence[Network], describe: Callable[[nn.Module], dict[str, str]]) -> dict[str, str]:
    """Return the description of a denoiser, or of several under their attributes' names."""
    if len(networks) == 1:
        return describe(networks[0].module)
    return {f"{each.attribute}.{name}": text for each in networks for name, text in describe(each.module).items()}


def write(folder: Path, contents: dict[str, Any]) -> None:
    """Write the manifest of the artifact in this folder."""
    manifest = {"format": _FORMAT, "digest": _digest(contents), "contents": contents}
    (folder / _FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def _model(denoiser: nn.Module) -> dict[str, str]:
    """Return the model's class and configuration, without where it came from."""
    config = dict(getattr(denoiser, "config", {}))
    values = {name: repr(value) for name, value in config.items() if not name.startswith("_")}
    return {"class": type(denoiser).__name__, **values}


def read(path: Path, digest: str | None) -> dict[str, Any]:
    """Return the contents of an artifact's manifest, whose every field has been checked.

    Args:
        path: of the artifact.
        digest: that the contents must have; None for whichever the manifest itself says.

    Raises:
        StateError: there is none, or it was changed.
    """
    try:
        if not (path / _FILE).is_file():
            raise FileNotFoundError(f"no file {_FILE}")
        manifest = json.loads((path / _FILE).read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(
            f"No complete artifact at {path} ({type(error).__name__}: {error}): expected a directory that "
            "tgate_fx.save made. Save it again."
        ) from error
    if found != _FORMAT:
        raise StateError(f"The artifact at {path} has format {found}: expected {_FORMAT}. Save it again.")
    contents: dict[str, Any] = manifest.get("contents", {})
    digest_of_contents = _digest(contents)
    if digest is not None and digest_of_contents != digest:
        raise StateError(
            f"The artifact at {path} has the digest {digest_of_contents}: expected {digest}, which was given. Load the "
            "one that this digest is of."
        )
    if digest_of_contents != manifest.get("digest"):
        raise StateError(
            f"{path / _FILE} is not as it was written: expected what tgate_fx.save wrote, unchanged. Copy it "
            "again, or save it again."
        )
    check(path / _FILE, contents)
    return contents


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def check_environment(contents: dict[str, Any], networks: Sequence[Network]) -> None:
    """Raise `StateError` where torch, diffusers, the processor or the model's configuration is another."""
    for what, now in environment(networks).items():
        saved, here = ({"version": each} if isinstance(each, str) else each for each in (contents[what], now))
        for name in fingerprint.differences(saved, here):
            raise StateError(
                f"The artifact does not fit this {what}, whose {name} is {here.get(name)}: expected {saved.get(name)}, "
                "for which it was saved. Save one here, or load it where it was saved."
            )


def check_parts(what: str, contents: dict[str, Any], now: dict[str, str]) -> None:
    """Raise `StateError` where a module or a weight of the denoiser is another."""
    changed = fingerprint.differences(contents[what], now)
    if changed:
        raise StateError(
            f"The artifact does not fit the denoiser's {what}: {_listed(changed)} changed: expected the same model, "
            "dtype, weights, processors, adapters and hooks as when it was saved. Load it on that pipeline, or save "
            "one of this."
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and checksums of a file."""
    return {"bytes": path.stat().st_size, "checksum": _file_checksum(path), "sha256": _sha256(path)}


def check_file(path: Path, described: dict[str, Any], *, by_sha256: bool) -> None:
    """Raise `StateError` unless a file is as it was described; ``by_sha256`` for one that no hand can forge."""
    try:
        size = path.stat().st_size if path.is_file() else None
        same = size == described["bytes"] and _file_checksum(path) == described["checksum"]
        same = same and (not by_sha256 or _sha256(path) == described["sha256"])
    except (OSError, RuntimeError) as error:
        raise StateError(
            f"{path} cannot be read ({error}): expected a file that this process may read. Change its permissions, or "
            "copy it again."
        ) from error
    if not same:
        found = "missing" if size is None else f"{size} bytes, and not as it was written"
        raise StateError(
            f"{path} is {found}: expected the {described['bytes']} bytes that tgate_fx.save wrote. Copy it "
            "again, or save it again."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def _file_checksum(path: Path) -> str:
    """Finds damage; it is no protection against those who mean harm."""
    size = path.stat().st_size
    words = torch.from_file(str(path), size=size // 8, dtype=torch.int64, device="cpu")
    with path.open("rb") as file:
        file.seek(size // 8 * 8)
        return f"{checksum(words):x}-{file.read().hex()}"
