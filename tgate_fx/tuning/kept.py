"""What `tgate_fx.tune` has measured, kept to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..compiled.checksum import checksum
from ..compiled.frozen_weights import can_be_read
from ..errors import ArgumentError
from ..gated import Gated
from .likeness import Likeness


def described(value: Any) -> str:
    """Return what tells an argument of a call from another one, in another process too."""
    if isinstance(value, dict):
        return repr({key: described(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return repr([described(each) for each in value])
    data = None
    if isinstance(value, torch.Tensor):  # as bytes, for numpy lacks bfloat16
        data = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    if hasattr(value, "tobytes"):  # arrays of numpy, and images
        data = value.tobytes()
    return repr(value) if data is None else hashlib.sha256(data).hexdigest()


def described_pipeline(pipe: Any, gated: Gated) -> dict[str, str]:
    """Return what tells a gated pipeline from another one: its weights among it."""
    scheduler = getattr(pipe, "scheduler", None)
    parameters = (weight for each in gated.networks for weight in each.network.module.parameters())
    weights = [checksum(weight.detach()) for weight in parameters if can_be_read(weight)]
    return {
        "schedule": repr(gated.schedule),
        "scheduler": repr((type(scheduler).__name__, sorted(dict(getattr(scheduler, "config", {})).items()))),
        "deep branches": repr([each.network.branch for each in gated.networks]),
        "how": gated.networks[0].phases.describe(),
        "devices": str(gated.devices),
        "weights": hashlib.sha256(repr(weights).encode()).hexdigest(),
    }


def key_of(setting: Mapping[str, Any]) -> str:
    """Return the name that a setting is kept under."""
    return json.dumps(setting, default=repr, sort_keys=True)


class Kept:
    """What was measured, by setting and prompt; in a file too, if there is a directory for it.

    Attributes:
        begun: whether this process has generated something.
    """

    def __init__(self, folder: Path | None, what: dict[str, Any]) -> None:
        self.begun = False
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._refused: dict[str, str] = {}
        self._file = None if folder is None else folder / "measured.jsonl"
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "what.json"
        if described.exists() and json.loads(described.read_text()) != what:
            raise ArgumentError(
                f"work={str(folder)!r} has measurements of another pipeline, or of other prompts, seeds or arguments: "
                "expected those of this call. Give another directory, or remove this one."
            )
        described.write_text(json.dumps(what))
        if self._file is not None and self._file.exists():
            for row in map(json.loads, self._file.read_text().splitlines()):
                self._take(row)

    def has(self, setting: Mapping[str, Any], prompt: int) -> bool:
        """Return whether this was measured before, or the setting refused."""
        return key_of(setting) in self._refused or prompt in self._rows.get(key_of(setting), {})

    def rows(self, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what was measured of a setting, a row for each prompt."""
        return list(self._rows[key_of(setting)].values())

    def add(self, setting: Mapping[str, Any], prompt: int, seconds: float, like: Likeness) -> None:
        """Keep what was measured."""
        self._note({"setting": key_of(setting), "prompt": prompt, "seconds": seconds, **like._asdict()})

    def refused(self, setting: Mapping[str, Any]) -> str | None:
        """Return why a setting was refused, if it was."""
        return self._refused.get(key_of(setting))

    def refuse(self, setting: Mapping[str, Any], why: str) -> None:
        """Keep that a setting is refused."""
        self._note({"setting": key_of(setting), "refused": why})

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
