"""What `tgate_fx.tune` has measured, kept to go on from."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact.fingerprint import digest, structure, weights
from ..errors import ArgumentError
from ..gated import Gated
from .likeness import Likeness

_PACKAGES = ("torch", "diffusers", "transformers")


def described_pipeline(pipe: Any, gated: Gated) -> dict[str, str]:
    """Return what tells a gated pipeline, and what it runs on, from others.

    That is its class, the gate's schedule, its scheduler, all weights, what else the denoisers and companions are made
    of (adapters' scales, processors, FreeU), the versions of packages, and the machine, whose seconds are measured.
    """
    gated.take_back()
    scheduler = getattr(pipe, "scheduler", None)
    models = {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    gpus = [torch.cuda.get_device_name(device) for device in gated.devices if device.type == "cuda"]
    return {
        "class": type(pipe).__name__,
        "schedule": repr(gated.schedule),
        "scheduler": repr((type(scheduler).__name__, sorted(dict(getattr(scheduler, "config", {})).items()))),
        "deep branches": repr([each.network.branch for each in gated.networks]),
        "how": gated.networks[0].phases.describe(),
        "devices": str(gated.devices),
        "weights": digest({name: weights(each) for name, each in models.items()}),
        "modules": digest([structure(each.network.module) for each in gated.all]),
        "machine": repr((torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), gpus)),
        "versions": repr([importlib.metadata.version(package) for package in _PACKAGES]),
    }


def key_of(setting: Mapping[str, Any]) -> str:
    """Return the name that a setting is kept under."""
    return json.dumps(setting, default=digest, sort_keys=True)


class Kept:
    """What was measured, by setting and prompt; in a file too, if there is a directory for it.

    Args:
        folder: the directory; None to keep nothing beyond this process.
        what: what is measured, by names for the message.

    Attributes:
        begun: whether this process has generated something.

    Raises:
        ArgumentError: the directory has measurements of something else, or cannot be used.
    """

    def __init__(self, folder: Path | None, what: Mapping[str, str]) -> None:
        self.begun = False
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._refused: dict[str, str] = {}
        self._file: Path | None = None
        if folder is None:
            return
        self._file = folder / "measured.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = _before(folder / "what.json", what)
            self._read(self._file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"work={str(folder)!r} cannot be used ({type(error).__name__}: {error}): expected a directory to write "
                "to, empty or with what tune has written. Give another one."
            ) from error
        changed = [name for name in what if before.get(name) != what[name]]
        if changed:
            raise ArgumentError(
                f"work={str(folder)!r} has measurements of another pipeline, or of other prompts, seeds or arguments "
                f"(changed: {', '.join(changed)}): expected those of this call. Give another directory, or remove "
                "this one."
            )

    def has(self, setting: Mapping[str, Any], prompt: int) -> bool:
        """Return whether this was measured before, or the setting refused."""
        return key_of(setting) in self._refused or prompt in self._rows.get(key_of(setting), {})

    def rows(self, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what was measured of a setting, a row for each prompt."""
        return list(self._rows[key_of(setting)].values())

    def add(self, setting: Mapping[str, Any], prompt: int, seconds: float, ungated: float, like: Likeness) -> None:
        """Keep what was measured: the seconds of a call, and those of the ungated one that it took turns with."""
        row = {"setting": key_of(setting), "prompt": prompt, "seconds": seconds, "ungated_seconds": ungated}
        self._note({**row, **like._asdict()})

    def refused(self, setting: Mapping[str, Any]) -> str | None:
        """Return why a setting was refused, if it was."""
        return self._refused.get(key_of(setting))

    def refuse(self, setting: Mapping[str, Any], why: str) -> None:
        """Keep that a setting is refused."""
        self._note({"setting": key_of(setting), "refused": why})

    def _read(self, file: Path) -> None:
        """Take what is in a file, without a last line that was cut off as it was written."""
        written = file.read_bytes() if file.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        for row in map(json.loads, whole.splitlines()):
            self._take(dict(row))
        if len(whole) < len(written):
            os.truncate(file, len(whole))

    def _take(self, row: dict[str, Any]) -> None:
        if "refused" in row:
            self._refused[row["setting"]] = row["refused"]
        else:
            self._rows.setdefault(row["setting"], {})[row["prompt"]] = row

    def _note(self, row: dict[str, Any]) -> None:
        self._take(row)
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _before(file: Path, what: Mapping[str, str]) -> dict[str, str]:
    """Return what a file says was measured; write there what is to be, if there is none."""
    if not file.exists():
        new = file.with_suffix(".new")
        new.write_text(json.dumps(dict(what)))
        new.replace(file)
    return dict(json.loads(file.read_text()))
