"""The runner of phases that were compiled ahead of time: it finds a step's package, and checks that it still fits."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..compiled.frozen_weights import FrozenWeights, can_be_read
from ..compiled.guard_policy import check_no_global_hooks, runs_only_known_code
from ..errors import StateError, UnsupportedError
from ..inputs import canonical, latents_of, map_tensors, tensors_in
from ..network import Network
from ..phase_graph import DENOISER
from ..phases import Phases
from ..private import untraceable
from ..roles import Roles
from ..schedule import Step
from ..split import Cache, PhaseResult
from . import fingerprint
from .private import LoadedPackage, Structure

Inputs = Mapping[str, Any]

_ALIGNMENT = 16  # bytes, of inductor's inputs on a GPU


@dataclass(frozen=True)
class Package:
    """One phase, compiled for inputs of one signature.

    Attributes:
        name: the phase's name in the report.
        signature: of its inputs, from `signature_of`.
        results: the structure of what the phase returns.
        loaded: the code.
        weights: those that the artifact has for it to read; they must be kept for as long as it runs.
    """

    name: str
    signature: Mapping[str, str]
    results: Structure
    loaded: LoadedPackage
    weights: Mapping[str, torch.Tensor]

    def run(self, cache: Cache, inputs: Inputs) -> PhaseResult:
        """Run it on inputs of its signature."""
        leaves = self.loaded.run(_tensors(cache, inputs))
        try:
            results: PhaseResult = self.results.fill(leaves)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise StateError(
                f"The {self.name} phase gives {len(leaves)} tensors, which do not fit the structure that the artifact "
                f"says ({error}): expected what tgate_fx.save wrote. Save it again."
            ) from error
        return results


class PackagedPhases(Phases):
    """Runs phases from packages.

    Args:
        denoiser: whose phases they are.
        packages: for each phase, the packages.
        structure: of the denoiser, as `fingerprint` has it, when they were compiled.
        frozen: whether the weights are part of them; otherwise they read the denoiser's own.
    """

    is_compiled = True

    def __init__(
        self,
        denoiser: nn.Module,
        packages: Mapping[Roles, Sequence[Package]],
        structure: Mapping[str, str],
        *,
        frozen: bool,
    ) -> None:
        self._denoiser = denoiser
        self._packages = packages
        self._structure = structure
        self._by_signature: dict[object, Package] = {}
        self._checks_once = False
        self._checked = False
        self._threads = torch.get_num_threads()
        self._weights = FrozenWeights(denoiser) if frozen else None
        self._shared: list[int] = []  # the addresses of the weights that packages read
        if self._weights is not None:
            self._weights.add([*denoiser.parameters(), *denoiser.buffers()])

    def describe(self) -> str:
        """Return that they were compiled ahead of time."""
        return "compiled ahead of time"

    def inductor_options(self, device: torch.device) -> dict[str, Any] | None:
        """Raise `StateError`: they are compiled already."""
        raise StateError(
            "The pipeline was loaded from an artifact: expected one given to tgate_fx.compile. Copy the artifact, or "
            "compile a plain pipeline."
        )

    def begin(self, pipe: Any, pipeline_class: type[Any], *, calls_back: bool) -> None:
        """Begin a generation; see `Phases`."""
        check_no_global_hooks()
        self._checks_once = not calls_back and runs_only_known_code(pipe, pipeline_class, self._denoiser)
        self._checked = False
        if self._weights is not None:
            self._weights.begin()

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `Phases`."""
        if not self._checked:
            self._check()
            self._checked = self._checks_once
        inputs, signature = canonical(inputs)
        inputs = as_compiled(inputs)
        key = (step.roles, signature, *map(len, cache))
        package = self._by_signature.get(key)
        if package is None:
            package = self._by_signature[key] = self._find(step, cache, inputs)
        return package.run(cache, inputs)

    def _find(self, step: Step, cache: Cache, inputs: Inputs) -> Package:
        signature = signature_of(cache, inputs)
        packages = self._packages.get(step.roles, ())
        for package in packages:
            if package.signature == signature:
                return package
        for package in packages:
            name = fingerprint.differences(package.signature, signature)[0]
            raise StateError(
                f"The {step.phase} phase was given {name} as {signature.get(name)}: expected "
                f"{package.signature.get(name)}, for which the artifact was saved. Ask for that height, width, batch "
                "and guidance, or save an artifact for these."
            )
        known = dict.fromkeys(each.name for several in self._packages.values() for each in several)
        raise StateError(
            f"The artifact has no {step.phase} phase: expected one of {', '.join(known)}. Leave the gate and the "
            "intervals as they were when it was saved, or save an artifact with these."
        )

    def _check(self) -> None:
        """Raise `StateError` unless the denoiser and torch are what the packages were compiled for."""
        check_no_autocast(next(self._denoiser.parameters()).device)
        if torch.get_num_threads() != self._threads:
            raise StateError(
                f"torch has {torch.get_num_threads()} threads: expected {self._threads}, for which the artifact was "
                f"compiled. Call torch.set_num_threads({self._threads}), or save another artifact with this many."
            )
        changed = fingerprint.differences(self._structure, fingerprint.structure(self._denoiser))
        if changed:
            raise StateError(
                f"{', '.join(changed[:3])} changed after the artifact was loaded: expected every module as it was when "
                "that was saved. Undo the change, or save another artifact with it."
            )
        if self._weights is not None:
            if self._weights.changed():
                raise StateError(
                    "The denoiser's weights changed after the artifact was loaded: expected those that it holds. Put "
                    "them back, or save another artifact with the new ones."
                )
            return
        tensors = weights_of(self._denoiser)
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        if addresses != self._shared:
            for several in self._packages.values():
                for package in several:
                    package.loaded.share_weights({**tensors, **package.weights})
            self._shared = addresses


def check_not_offloaded(networks: Sequence[Network]) -> None:
    """Raise `UnsupportedError` if weights rest on another device than the one that computes, which is then unknown, or
    if a device map's hooks are on the denoiser, which an artifact does not know from one pipeline to the next.
    """
    for each in networks:
        found = untraceable(each.module)
        if "accelerate" in found:
            raise UnsupportedError(
                f"accelerate moves the weights of pipe.{each.attribute} in every generation "
                "(enable_model_cpu_offload), and an artifact is for weights that stay where they are: expected a "
                "pipeline without offloading. Move it to its device with pipe.to(...) instead, or use tgate_fx.compile."
            )
        if "device_map" in found:
            raise UnsupportedError(
                f"pipe.{each.attribute} has hooks of accelerate's (a device map, or enable_sequential_cpu_offload): "
                "expected a pipeline without them, for an artifact is of one device. Call pipe.reset_device_map() or "
                "pipe.remove_all_hooks(), and move the pipeline with pipe.to(...)."
            )


def check_dense(network: Network) -> None:
    """Raise `UnsupportedError` if weights are quantized: packages hold those themselves, by names of their own."""
    for name, tensor in weights_of(network.module).items():
        if not can_be_read(tensor):
            raise UnsupportedError(
                f"{name.partition('.')[2]} of pipe.{network.attribute} is quantized ({type(tensor).__name__}), and "
                "packages hold such weights where no change of theirs is noticed: expected dense ones. Use "
                "tgate_fx.compile and tgate_fx.warmup in every process."
            )


def check_no_autocast(device: torch.device) -> None:
    """Raise `StateError` under torch.autocast: packages compute in the dtypes that they were compiled with."""
    if torch.is_autocast_enabled(device.type):
        raise StateError(
            f"torch.autocast is on for {device.type}: expected it off where an artifact is saved or used, for packages "
            "compute in the dtypes that they were compiled with. Leave it, or use tgate_fx.compile without artifacts."
        )


def only_network(networks: Sequence[Network]) -> Network:
    """Return the denoiser of a pipeline that has one; raise `UnsupportedError` if it has several."""
    if len(networks) > 1:
        names = " and ".join(each.attribute for each in networks)
        raise UnsupportedError(
            f"This pipeline has the denoisers {names}: expected one, of which packages are made. Compile it with a "
            "mode for CUDA graphs, or with regional=True, of which torch's compile caches can be kept."
        )
    return networks[0]


def weights_of(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Return a denoiser's parameters and buffers by their names in packages, under each if they have several."""
    named = (denoiser.named_parameters, denoiser.named_buffers)
    return {name: tensor for each in named for name, tensor in each(prefix=DENOISER, remove_duplicate=False)}


def as_compiled(inputs: Inputs) -> dict[str, Any]:
    """Return inputs as packages are compiled for them: each is dense, on the latents' device, at an aligned address.

    A VAE may give other latents. Code for a GPU logs and copies each unaligned input: the second of two rows is one.
    """
    result: dict[str, Any] = map_tensors(functools.partial(_as_compiled, device=latents_of(inputs)[1].device), inputs)
    return result


def _as_compiled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    tensor = tensor.to(device).contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def sorted_by_name(inputs: Inputs) -> dict[str, Any]:
    """Return the same inputs in the order of their names, in which packages take them."""
    return {
        name: sorted_by_name(inputs[name]) if isinstance(inputs[name], dict) else inputs[name]
        for name in sorted(inputs)
    }


def _tensors(cache: Cache, inputs: Inputs) -> list[torch.Tensor]:
    """Return the tensors that a package is run with."""
    return tensors_in((*map(tuple, cache), sorted_by_name(inputs)))


def signature_of(cache: Cache, inputs: Inputs) -> dict[str, str]:
    """Return what a package is compiled for, by name: shapes, dtypes, devices, and values that are not tensors."""
    described = [[_described(tensor) for tensor in tensors] for tensors in cache]
    return {**dict(_signatures("", inputs)), "cache": repr(described)}


def _signatures(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _signatures(f"{path}.{name}" if path else name, item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _signatures(f"{path}.{index}", item)
    else:
        yield path, _described(value) if isinstance(value, torch.Tensor) else repr(value)


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device.type}"
