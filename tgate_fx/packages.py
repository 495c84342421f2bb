"""Phases that were compiled ahead of time: which package a step runs, and whether it still fits the denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

from . import fingerprint
from .errors import StateError
from .families import first_input
from .forms import canonical
from .held import HeldWeights
from .schedule import Step
from .sites import Roles
from .split import Cache, PhaseResult

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Package:
    """One phase, compiled for inputs of one form.

    Attributes:
        name: what the report calls the phase.
        form: what the inputs must look like, from `form_of`.
        results: the structure of what the phase returns.
        runner: torch's, whose ``run`` takes and returns a list of tensors.
        weights: what the artifact has for it to read, and must be kept for as long as it runs.
    """

    name: str
    form: Mapping[str, str]
    results: TreeSpec
    runner: Any
    weights: Mapping[str, torch.Tensor]

    def run(self, cache: Cache, inputs: Inputs) -> PhaseResult:
        """Run it on inputs of its form."""
        results: PhaseResult = tree_unflatten(self.runner.run(tensors_of(cache, inputs)), self.results)
        return results


class PackagedPhases:
    """Runs phases from packages.

    Args:
        denoiser: whose phases they are.
        packages: for each phase, the packages.
        structure: of the denoiser, as `tgate_fx.fingerprint` has it, when they were compiled.
        frozen: whether they hold the weights; otherwise they read the denoiser's own.

    Attributes:
        graphs, recompiles: 0, since nothing is compiled.
    """

    graphs = 0
    recompiles = 0

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
        self._by_form: dict[object, Package] = {}
        self._trusted = False
        self._checked = False
        self._threads = torch.get_num_threads()
        self._held = HeldWeights(denoiser) if frozen else None
        self._shared: list[int] = []  # where the weights are that packages read
        if self._held is not None:
            self._held.hold([*denoiser.parameters(), *denoiser.buffers()])

    def describe(self) -> str:
        """What runs the phases."""
        return "compiled ahead of time"

    def begin(self, *, trusted: bool) -> None:
        """Begin a generation; ``trusted`` if nothing changes the denoiser between its steps."""
        self._trusted = trusted
        self._checked = False
        if self._held is not None:
            self._held.begin()

    def __call__(self, step: Step, cache: Cache, inputs: dict[str, Any]) -> PhaseResult:
        """Run one step; see `tgate_fx.dispatch.Phases`."""
        if not self._checked:
            self._check()
            self._checked = self._trusted
        inputs, form = canonical(inputs)
        name, latents = first_input(inputs)
        inputs[name] = latents.contiguous()
        key = (step.roles, form, *map(len, cache))
        package = self._by_form.get(key)
        if package is None:
            package = self._by_form[key] = self._find(step, cache, inputs)
        return package.run(cache, inputs)

    def _find(self, step: Step, cache: Cache, inputs: Inputs) -> Package:
        form = form_of(cache, inputs)
        packages = self._packages.get(step.roles, ())
        for package in packages:
            if package.form == form:
                return package
        for package in packages:
            name = fingerprint.differences(package.form, form)[0]
            raise StateError(
                f"The {step.phase} phase was given {name} as {form.get(name)}: expected {package.form.get(name)}, for "
                "which the artifact was saved. Ask for that height, width, batch and guidance, or save an artifact for "
                "these."
            )
        known = dict.fromkeys(each.name for several in self._packages.values() for each in several)
        raise StateError(
            f"The artifact has no {step.phase} phase: expected one of {', '.join(known)}. Leave the gate and the "
            "intervals as they were when it was saved, or save an artifact with these."
        )

    def _check(self) -> None:
        """Raise `StateError` unless the denoiser and torch are what the packages were compiled for."""
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
        if self._held is not None:
            if self._held.changed():
                raise StateError(
                    "The denoiser's weights changed after the artifact was loaded: expected those that it holds. Put "
                    "them back, or save another artifact with the new ones."
                )
            return
        tensors = weights_of(self._denoiser)
        places = [tensor.data_ptr() for tensor in tensors.values()]
        if places != self._shared:
            for several in self._packages.values():
                for package in several:
                    share_weights(package.runner, {**tensors, **package.weights})
            self._shared = places


def weights_of(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """A denoiser's parameters and buffers, by their names in packages; one that has several under each."""
    named = (denoiser.named_parameters, denoiser.named_buffers)
    return {name: tensor for each in named for name, tensor in each(prefix="denoiser", remove_duplicate=False)}


def share_weights(runner: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Have a package read these weights where they are; of a packed one, the tensor itself is what it takes."""
    names = runner.get_constant_fqns()
    runner.load_constants({name: tensors[name].detach() for name in names}, False, True, True)


def ordered(inputs: Inputs) -> dict[str, Any]:
    """The same inputs in the order of their names, in which packages take them."""
    return {name: ordered(inputs[name]) if isinstance(inputs[name], dict) else inputs[name] for name in sorted(inputs)}


def tensors_of(cache: Cache, inputs: Inputs) -> list[torch.Tensor]:
    """The tensors that a package is run with."""
    return [leaf for leaf in tree_leaves((cache, ordered(inputs))) if isinstance(leaf, torch.Tensor)]


def form_of(cache: Cache, inputs: Inputs) -> dict[str, str]:
    """What a package is compiled for, by name: shapes, dtypes, devices, and values that are not tensors."""
    forms = dict(_forms("", inputs))
    return {**forms, "cache": repr([[_form(tensor) for tensor in held] for held in cache])}


def _forms(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _forms(f"{path}.{name}" if path else name, item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _forms(f"{path}.{index}", item)
    else:
        yield path, _form(value) if isinstance(value, torch.Tensor) else repr(value)


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device.type}"
