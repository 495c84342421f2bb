"""Run a pipeline by phases that were compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..compiled.settings import CompileSettings
from ..deepcache import DeepCache
from ..errors import StateError
from ..gated import check_not_gated, gated_of
from ..network import Network, networks_of
from ..phases import EagerPhases, Phases
from ..pipeline import attach, phases_with
from ..roles import Role, Roles
from . import caches, fingerprint, manifest, private, weights_file
from .contents import schedule_of
from .packaged import Package, PackagedPhases, check_dense, check_not_offloaded, only_network

Pipeline = TypeVar("Pipeline")


def load(pipe: Pipeline, path: str | Path, digest: str | None = None) -> Pipeline:
    """Gate a pipeline with phases that `save` compiled; nothing is compiled any more.

    Where `save` kept torch's compile caches in place of packages, these are filled, and the pipeline is put under
    torch.compile with the same settings: its first steps still trace each phase, and compile it from there.

    The pipeline must be as it was then, weights included where they are part of the packages (`freezing`), and so must
    torch, diffusers, the processor and the number of threads. Images are generated for the height, width, batch and
    guidance it was saved for; gate, steps, seeds and schedulers may change.

    The packages are native code, which is run, and torch unpickles what is in its caches: load only what you trust.

    Args:
        pipe: a plain pipeline.
        path: the directory that `save` made.
        digest: the "digest" of the manifest that you know to be yours. With it, no other artifact is loaded, and every
            file is read through to see that it is the one: take it from a place that others cannot write to.

    Returns:
        The same pipeline object, gated as the saved one was.

    Raises:
        StateError: the artifact is not whole, or not for this pipeline, torch or processor; the pipeline is gated.
        UnsupportedError: as for `tgate_fx.gate`; its weights are offloaded, or quantized and the artifact has packages;
            or this torch lacks what artifacts need.
    """
    path = Path(path)
    check_not_gated(pipe)
    private.check_torch()
    contents = manifest.read(path, digest)
    schedule = schedule_of(contents["schedule"])
    interval = schedule.deep_interval
    deepcache = None if interval is None else DeepCache(interval, contents["deepcache"], schedule.deep_order)
    networks = networks_of(pipe, deepcache)
    check_not_offloaded(networks)
    manifest.check_environment(contents, networks)
    pinned = digest is not None
    if contents["caches"] is None:
        make_phases = _from_packages(only_network(networks), path, contents, pinned=pinned)
    else:
        make_phases = _from_caches(path / caches.FILE, contents["caches"], pinned=pinned)
    attach(pipe, schedule, networks, contents["gate_companions"], make_phases)
    try:
        manifest.check_parts("structure", contents, manifest.structure(networks))
    except StateError:
        gated_of(pipe).detach(pipe)
        raise
    return pipe


def _from_packages(
    network: Network, path: Path, contents: dict[str, Any], *, pinned: bool
) -> Callable[[Network], Phases]:
    """Return what makes the phases of the denoiser from packages; companions have none, and run eagerly."""
    check_dense(network)
    frozen = contents["weights"] is not None
    if frozen:
        manifest.check_parts("weights", contents, fingerprint.weights(network.module))
    device = next(network.module.parameters()).device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # torch loads for the current one
        packages = _load_packages(path, contents, pinned=pinned)
    phases = PackagedPhases(network.module, packages, contents["structure"], frozen=frozen)
    return lambda each: phases if each is network else EagerPhases(each)


def _from_caches(file: Path, said: dict[str, Any], *, pinned: bool) -> Callable[[Network], Phases]:
    """Return what makes the phases of a network under torch.compile, with its caches filled."""
    manifest.check_file(file, said["file"], by_sha256=pinned)
    caches.fill(file)
    return phases_with(CompileSettings(**said["settings"]))


def _load_packages(path: Path, contents: dict[str, Any], *, pinned: bool) -> dict[Roles, list[Package]]:
    packages: dict[Roles, list[Package]] = {}
    phases = contents["phases"]
    for phase in phases:
        manifest.check_file(path / phase["package"], phase["file"], by_sha256=pinned)
    manifest.check_file(path / manifest.WEIGHTS_FILE, contents["weights_file"], by_sha256=pinned)
    mapped = weights_file.mapped(path / manifest.WEIGHTS_FILE, [phase["constants"] for phase in phases])
    for phase, weights in zip(phases, mapped, strict=True):
        file = path / phase["package"]
        try:
            loaded = private.LoadedPackage(file)
            if contents["weights"] is not None:  # else the denoiser's are still to come
                loaded.share_weights(weights)
            results = private.Structure.loads(phase["results"])
        except Exception as error:  # torch's loader and its structures raise many kinds
            raise StateError(
                f"torch cannot load {file}: {error}\nExpected what tgate_fx.save wrote. Save it again on this machine."
            ) from error
        package = Package(phase["name"], phase["signature"], results, loaded, weights)
        packages.setdefault(Roles(*map(Role, phase["roles"])), []).append(package)
    return packages
