"""Phases compiled ahead of time, kept in a directory: `save` and `load`.

The directory has a package of torch's AOTInductor for each phase, not zipped, the weights that these hold, and
``manifest.json``, which says what they were compiled from and for. Packages are native code, and loading one runs it:
load only what you trust as you would trust a program. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_structure, treespec_dumps, treespec_loads

from . import constants, fingerprint
from .deepcache import DeepCache
from .errors import ArgumentError, CompileError, StateError, UnsupportedError
from .gated import Gated
from .held import checksum
from .packages import Package, PackagedPhases, form_of, ordered, share_weights, weights_of
from .phase_graph import Example
from .schedule import Schedule
from .settings import CompileSettings, inductor_options
from .sites import Role, Roles
from .warming import call_for, reach_every_phase

Pipeline = TypeVar("Pipeline")

_MANIFEST = "manifest.json"
_CONSTANTS = "constants.bin"
_FORMAT = 5
_INSIDE = Path("data", "aotinductor", "model")  # where torch looks for a package's files, in the package's folder


def save(
    pipe: Any,
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    batch_size: int | None = None,
    **inputs: Any,
) -> Path:
    """Compile a pipeline's phases ahead of time, and keep them for `load`. Nothing else may generate with it meanwhile.

    Args:
        pipe: a pipeline under `tgate_fx.compile`, with inductor.
        path: a directory to make.
        height, width, batch_size, inputs: what images will be asked for, as for `tgate_fx.warmup`.

    Returns:
        The path.

    Raises:
        ArgumentError: there is something at ``path``, or as for `tgate_fx.warmup`.
        StateError: the pipeline is not under `tgate_fx.compile`.
        UnsupportedError: its settings are not for code that is compiled ahead of time, or torch is older than 2.13.
        CompileError: a phase could not be traced or compiled.
    """
    path = Path(path)
    if path.exists():
        raise ArgumentError(f"There is something at {path}: expected nothing. Remove it, or give another path.")
    gated, call = call_for(pipe, height, width, batch_size, inputs)
    settings = gated.settings
    if settings is None:
        raise StateError(
            f"This {type(pipe).__name__} was loaded from an artifact: expected one given to tgate_fx.compile. Copy the "
            "artifact, or compile a plain pipeline."
        )
    device = next(gated.denoiser.parameters()).device
    _check_settings(settings, device)
    with gated.eagerly():
        reach_every_phase(pipe, gated, call, "looking at each phase")
    assert gated.run is not None
    examples = list(gated.run.examples.values())
    frozen = settings.freezes(device)
    options = inductor_options(settings.mode, settings.options_for(device))
    options |= {"aot_inductor.package": True, **constants.OPTIONS}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        folder = Path(made) / "artifact"
        folder.mkdir()
        with (folder / _CONSTANTS).open("wb") as file:
            writer = constants.ConstantsWriter(file, {} if frozen else weights_of(gated.denoiser))
            phases = [
                _compile(gated, example, options, folder / str(index), writer) for index, example in enumerate(examples)
            ]
        contents = {
            "torch": torch.__version__,
            "diffusers": importlib.metadata.version("diffusers"),
            "processor": fingerprint.processor(device),
            "model": _model(gated.denoiser),
            "structure": fingerprint.structure(gated.denoiser),
            "weights": fingerprint.weights(gated.denoiser) if frozen else None,
            "schedule": dataclasses.asdict(gated.schedule),
            "deepcache": gated.branch,
            "phases": phases,
            "constants": _described(folder / _CONSTANTS),
        }
        manifest = {"format": _FORMAT, "digest": _digest(contents), "contents": contents}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        folder.rename(path)
    return path


def load(pipe: Pipeline, path: str | Path) -> Pipeline:
    """Gate a pipeline with phases that `save` compiled; nothing is compiled any more.

    The pipeline must be as it was then, weights included where they are part of the packages (`freezing`), and so must
    torch, diffusers, the processor and the number of threads. Images are generated for the height, width, batch and
    guidance it was saved for; gate, steps, seeds and schedulers may change.

    The packages are native code, which is run: load only what you trust.

    Args:
        pipe: a plain pipeline.
        path: the directory that `save` made.

    Returns:
        The same pipeline object, gated as the saved one was.

    Raises:
        StateError: the artifact is not whole, or not for this pipeline, torch or processor; the pipeline is gated.
        UnsupportedError: as for `tgate_fx.gate`.
    """
    path = Path(path)
    manifest = _read(path)
    schedule = Schedule(**manifest["schedule"])
    interval, branch = schedule.deep_interval, manifest["deepcache"]
    deepcache = None if interval is None else DeepCache(interval=interval, branch=branch)
    gated = Gated(pipe, schedule, deepcache, None)
    frozen = manifest["weights"] is not None
    _check_environment(manifest, gated.denoiser)
    if frozen:
        _check_parts("weights", manifest, fingerprint.weights(gated.denoiser))
    packages = _load_packages(path, manifest)
    gated.attach(pipe, PackagedPhases(gated.denoiser, packages, manifest["structure"], frozen=frozen))
    try:
        _check_parts("structure", manifest, fingerprint.structure(gated.denoiser))
    except StateError:
        gated.detach(pipe)
        raise
    return pipe


def _load_packages(path: Path, manifest: dict[str, Any]) -> dict[Roles, list[Package]]:
    packages: dict[Roles, list[Package]] = {}
    phases = manifest["phases"]
    for phase in phases:
        for name, said in phase["files"].items():
            _check_file(path / phase["folder"] / _INSIDE / name, said)
    _check_file(path / _CONSTANTS, manifest["constants"])
    held = constants.mapped(path / _CONSTANTS, [phase["constants"] for phase in phases])
    for phase, weights in zip(phases, held, strict=True):
        folder = path / phase["folder"]
        try:
            # torch's aoti_load_package takes a folder too, but first tries it as a zip file, and warns.
            runner = torch._C._aoti.AOTIModelPackageLoader(str(folder), "model", False, 1, -1)
            if manifest["weights"] is not None:  # else the denoiser's are still to come
                share_weights(runner, weights)
        except RuntimeError as error:
            raise StateError(
                f"torch cannot load {folder}: {error}\nExpected what tgate_fx.save wrote. Save it again on this "
                "machine."
            ) from error
        package = Package(phase["name"], phase["form"], treespec_loads(phase["results"]), runner, weights)
        packages.setdefault(Roles(*map(Role, phase["roles"])), []).append(package)
    return packages


def _check_settings(settings: CompileSettings, device: torch.device) -> None:
    if torch.__version__ < "2.13":
        raise UnsupportedError(
            f"torch {torch.__version__} cannot load packages that are not zipped: expected 2.13 or later. Update "
            "torch, or use tgate_fx.warmup in every process."
        )
    given = {
        f"backend={settings.backend!r}": settings.backend != "inductor",
        "regional=True": settings.regional,
        "dynamic=True": bool(settings.dynamic),
        f"mode={settings.mode!r}, whose CUDA graphs are recorded when it runs": settings.replays(device),
    }
    for what, refused in given.items():
        if refused:
            raise UnsupportedError(
                f"A pipeline compiled with {what} cannot be saved: expected inductor, whole phases, one shape and no "
                "CUDA graphs. Compile it without that."
            )


def _compile(
    gated: Gated,
    example: Example,
    options: dict[str, Any],
    folder: Path,
    writer: constants.ConstantsWriter,
) -> dict[str, Any]:
    """Compile one phase into a package in ``folder``; what the manifest says of it."""
    graph = gated.trace(example._replace(inputs=ordered(example.inputs)))
    arguments = graph.arguments()
    with torch.no_grad(), torch._dynamo.convert_frame.compile_lock, constants.returned():
        results = tree_structure(graph.module(*arguments))
        try:
            files: Any = torch._inductor.aot_compile(graph.module, arguments, options=options)
        except Exception as error:
            raise CompileError(
                f"The {example.name} phase could not be compiled ahead of time: {error}\nExpected a denoiser that "
                "torch's AOTInductor takes. Use tgate_fx.compile and tgate_fx.warmup instead."
            ) from error
    (folder / _INSIDE).mkdir(parents=True)
    copies = [Path(shutil.copy(file, folder / _INSIDE)) for file in files if isinstance(file, str)]
    (held,) = [each for each in files if not isinstance(each, str)]
    return {
        "name": example.name,
        "roles": [role.value for role in example.roles],
        "form": form_of(*arguments),
        "results": treespec_dumps(results),
        "folder": folder.name,
        "files": {file.name: _described(file) for file in copies},
        "constants": writer.write(held),
    }


def _model(denoiser: nn.Module) -> dict[str, str]:
    """The model's class and configuration, without where it came from."""
    config = dict(getattr(denoiser, "config", {}))
    said = {name: repr(value) for name, value in config.items() if not name.startswith("_")}
    return {"class": type(denoiser).__name__, **said}


def _read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        found = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"There is no whole artifact at {path} ({type(error).__name__}: {error}): expected a directory that "
            "tgate_fx.save made. Save it again."
        ) from error
    if found != _FORMAT:
        raise StateError(f"The artifact at {path} has format {found}: expected {_FORMAT}. Save it again.")
    contents: dict[str, Any] = manifest.get("contents", {})
    if _digest(contents) != manifest.get("digest"):
        raise StateError(
            f"{path / _MANIFEST} is not as it was written: expected what tgate_fx.save wrote, unchanged. Copy it "
            "again, or save it again."
        )
    return contents


def _digest(contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _check_environment(manifest: dict[str, Any], denoiser: nn.Module) -> None:
    """Raise `StateError` where torch, diffusers, the processor or the model's configuration is another."""
    device = next(denoiser.parameters()).device
    now: dict[str, dict[str, str]] = {
        "torch": {"version": torch.__version__},
        "diffusers": {"version": importlib.metadata.version("diffusers")},
        "processor": fingerprint.processor(device),
        "model": _model(denoiser),
    }
    saved = manifest | {name: {"version": manifest[name]} for name in ("torch", "diffusers")}
    for what, here in now.items():
        for name in fingerprint.differences(saved[what], here):
            raise StateError(
                f"The {what}'s {name} is {here.get(name)}: expected {saved[what].get(name)}, which the artifact was "
                "saved with. Save one here, or load it where it was saved."
            )


def _check_parts(what: str, manifest: dict[str, Any], now: dict[str, str]) -> None:
    """Raise `StateError` where a module or a weight of the denoiser is another."""
    changed = fingerprint.differences(manifest[what], now)
    if changed:
        raise StateError(
            f"The {what} of {len(changed)} parts of the denoiser, such as {', '.join(changed[:3])}, are not those "
            "that the artifact was saved with: expected the same model, dtype, weights, processors, adapters and "
            "hooks. Load it on that pipeline, or save one of this."
        )


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "checksum": _file_checksum(path)}


def _check_file(path: Path, said: dict[str, Any]) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != said["bytes"] or _file_checksum(path) != said["checksum"]:
        found = "missing" if size is None else f"{size} bytes, and not as it was written"
        raise StateError(
            f"{path} is {found}: expected the {said['bytes']} bytes that tgate_fx.save wrote. Copy it again, or save "
            "it again."
        )


def _file_checksum(path: Path) -> str:
    """Finds damage; it is no protection against those who mean harm."""
    size = path.stat().st_size
    words = torch.from_file(str(path), size=size // 8, dtype=torch.int64)
    with path.open("rb") as file:
        file.seek(size // 8 * 8)
        return f"{checksum(words):x}-{file.read().hex()}"
