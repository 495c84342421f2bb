"""Compile a pipeline's phases ahead of time."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..compiled import private
from ..errors import ArgumentError, CompileError
from ..gated import Gated
from ..network import Network
from ..phase_graph import trace
from ..phases import EagerPhases, Example
from ..warmup import call_for, reach_every_phase
from . import caches, fingerprint, manifest
from . import private as aot
from .packaged import (
    as_compiled,
    check_dense,
    check_no_autocast,
    check_not_offloaded,
    only_network,
    signature_of,
    sorted_by_name,
    weights_of,
)
from .weights_file import WeightsWriter


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

    Each phase becomes a package of native code. Where it cannot, under CUDA graphs (``mode="reduce-overhead"``),
    ``regional=True`` or ``dynamic=True``, what torch's compile caches have of it is kept in its place.

    Args:
        pipe: a pipeline under `tgate_fx.compile`, with inductor.
        path: a directory to make.
        height, width, batch_size, inputs: what images will be asked for, as for `tgate_fx.warmup`.

    Returns:
        The path.

    Raises:
        ArgumentError: there is something at ``path``, or it cannot be written; or as for `tgate_fx.warmup`.
        StateError: the pipeline is not under `tgate_fx.compile`, or torch.autocast is on.
        UnsupportedError: its settings are not for code that is compiled ahead of time, its weights are offloaded, or
            quantized and would be in packages; or this torch lacks what artifacts need.
        CompileError: a phase could not be traced or compiled.
    """
    path = _new_path(path)
    gated, call = call_for(pipe, height, width, batch_size, inputs)
    networks = [each.network for each in gated.networks]
    check_not_offloaded(networks)
    check_no_autocast(gated.devices[0])
    options = gated.networks[0].phases.inductor_options(gated.devices[0])
    gated.take_back()
    with _made_within(path) as folder:
        code = (
            _packages(folder, pipe, gated, call, options) if options is not None else _caches(folder, pipe, gated, call)
        )
        contents = {
            **manifest.environment(networks),
            "structure": manifest.structure(networks),
            "schedule": dataclasses.asdict(gated.schedule),
            "deepcache": networks[0].branch,
            "gate_companions": bool(gated.companions),
            **code,
        }
        manifest.write(folder, contents)
    return path


def _new_path(path: Any) -> Path:
    """Return a path at which there is nothing; raise `ArgumentError` if there is, or if it is no path."""
    if not isinstance(path, (str, Path)) or "\0" in str(path):
        raise ArgumentError(f"path={path!r} ({type(path).__name__}) is no path: expected that of a new directory.")
    if os.path.lexists(path):
        raise ArgumentError(f"{path} already exists: expected a new directory. Remove it, or choose another path.")
    return Path(path)


@contextmanager
def _made_within(path: Path) -> Iterator[Path]:
    """Context manager: a directory that is at ``path`` once all of it was written, and nowhere if it was not.

    Raises:
        ArgumentError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            folder = Path(made) / "artifact"
            folder.mkdir()
            yield folder
            folder.rename(path)
    except OSError as error:
        raise ArgumentError(
            f"The artifact cannot be written to {path} ({error}): expected a new directory on a disk with enough "
            "space, to which nobody else saves. Choose another path."
        ) from error


def _packages(folder: Path, pipe: Any, gated: Gated, call: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Write a package for each phase, and the weights that they hold; return the manifest's entries for them."""
    network = only_network([each.network for each in gated.networks])
    check_dense(network)
    aot.check_torch()
    with gated.running_with(EagerPhases):
        reach_every_phase(pipe, gated, call, "looking at each phase")
    examples = list(gated.runs[0].examples.values())
    frozen = bool(options.get("freezing"))
    with (folder / manifest.WEIGHTS_FILE).open("wb") as file:
        writer = WeightsWriter(file, {} if frozen else weights_of(network.module))
        phases = [
            _compile(network, example, options, folder / f"{index}.pt2", writer)
            for index, example in enumerate(examples)
        ]
    return {
        "weights": fingerprint.weights(network.module) if frozen else None,
        "phases": phases,
        "weights_file": manifest.describe_file(folder / manifest.WEIGHTS_FILE),
        "caches": None,
    }


def _caches(folder: Path, pipe: Any, gated: Gated, call: dict[str, Any]) -> dict[str, Any]:
    """Write what torch's caches have of each phase; return the manifest's entries for that."""
    settings = caches.settings_of(gated)
    caches.write(folder / caches.FILE, pipe, gated, call, settings)
    described = {"settings": settings, "file": manifest.describe_file(folder / caches.FILE)}
    return {"weights": None, "phases": [], "weights_file": None, "caches": described}


def _compile(
    network: Network, example: Example, options: dict[str, Any], package: Path, writer: WeightsWriter
) -> dict[str, Any]:
    """Compile one phase into a package; return the manifest's entry for it."""
    graph = trace(network, example._replace(inputs=sorted_by_name(as_compiled(example.inputs))))
    arguments = graph.arguments()
    with torch.no_grad(), private.compile_lock():
        results = aot.Structure.of(graph.module(*arguments))
        try:
            constants = aot.compile_package(graph.module, arguments, options, package)
        except Exception as error:
            raise CompileError(
                f"The {example.name} phase could not be compiled ahead of time: {error}\nExpected a denoiser that "
                "torch's AOTInductor takes. Use tgate_fx.compile and tgate_fx.warmup instead."
            ) from error
    return {
        "name": example.name,
        "roles": [role.value for role in example.roles],
        "signature": signature_of(*arguments),
        "results": results.dumps(),
        "package": package.name,
        "file": manifest.describe_file(package),
        "constants": writer.write(constants),
    }
