"""Who imports whom, and who knows names that are private to others: the order of the layers is written down here."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tgate_fx

ROOT = Path(tgate_fx.__file__).parent

# Every module imports only from lines above its own, or from its own line's left. A folder stands for what is in it.
LAYERS = """
errors class_names
private keywords roles rows
inputs forward_patch deepcache auto_gate checked schedule cache guidance pipeline_guidance forecast held_difference
one_batch separate_calls families
sites split
dispatch network
step_count report steps phases trend run companions companion_run
gated_class gated
compiled.private compiled.cpu compiled.checksum compiled.settings compiled.openvino
compiled.freed_graphs compiled.shared_weights compiled.frozen_weights compiled.dead_code compiled.onednn
compiled.backend
compiled.guard_policy compiled.untraceable compiled.lora_scales compiled.image_scales
compiled.variant compiled.whole compiled.regional
phase_graph ladder
inspection pipeline warmup loaders hand_written
artifact.private artifact.weights_file artifact.fingerprint artifact.contents artifact.manifest
artifact.packaged artifact.caches
artifact.save artifact.load
tuning.mobilenet tuning.likeness tuning.kept tuning.result tuning.measure tuning.show
tgate_fx
macs.architecture macs.images macs.wan macs.videos macs.sounds macs.architectures macs.count macs.table macs.limits
demo.scenes demo.grid demo demo.compare
bench.machine bench.models bench.workload bench.openvino bench.prepare bench.contenders bench.worker bench.race
bench.results bench.plots bench.tables
commands.options commands.macs commands.demo commands.bench commands.tune commands
__main__
"""

# Folders that stand apart: no module of one imports from another, but for what is named.
WINGS = {"compiled": set(), "artifact": {"compiled"}, "macs": set()}

# What subclasses in other modules use of GuidanceForm, Run, ForwardPatch, Part and CompiledPhases, on themselves.
INHERITED = frozenset(
    (
        "_rows",
        "_branch",
        "_weight",
        "_denoiser",
        "_call",
        "_module",
        "_sites",
        "_settings",
        "_follow",
        "_follows",
        "_forecast",
        "_variants",
        "_changes",
        "_device",
        "_call_variant",
    )
)

# The doors to private names of torch, accelerate and diffusers.
DOORS = ("private", "compiled.private", "artifact.private")


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The syntax trees of all modules, by their names within the package; the package itself is ``tgate_fx``."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__").replace("__init__", "tgate_fx")] = ast.parse(path.read_text())
    return found


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    is_package = (ROOT / Path(*name.split(".")) / "__init__.py").exists()
    parts = [] if name == "tgate_fx" else name.split(".")
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.partition(".")[0] == "tgate_fx")
        elif isinstance(node, ast.ImportFrom) and node.level:
            level = node.level - (is_package or name == "tgate_fx")
            base = [*parts[: len(parts) - level], *(node.module or "").split(".")]
            module = ".".join(part for part in base if part)
            inside = [f"{module}.{each.name}".strip(".") for each in node.names]
            yield from [each if each in trees() else module or "tgate_fx" for each in inside]


def test_every_module_is_in_one_layer() -> None:
    packages = {"compiled", "artifact", "macs", "bench", "tuning"}  # their __init__ imports nothing
    assert sorted(LAYERS.split()) == sorted(set(trees()) - packages)
    assert not any(list(imports(package)) for package in packages)


@pytest.mark.parametrize("name", sorted(LAYERS.split()))
def test_modules_import_downwards(name: str) -> None:
    order = LAYERS.split()
    upwards = {each for each in imports(name) if each in order and order.index(each) >= order.index(name)}
    assert upwards == set()
    wing = name.partition(".")[0]
    if wing in WINGS:
        others = {each.partition(".")[0] for each in imports(name)} & set(WINGS) - {wing}
        assert others <= WINGS[wing]


def is_own(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def own_names(tree: ast.Module) -> set[str]:
    """What a module defines itself: functions, classes, variables and attributes of ``self`` and ``cls``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own(node):
            names.add(node.attr)
    return names


@pytest.mark.parametrize("name", sorted(set(LAYERS.split()) - set(DOORS)))
def test_modules_know_no_name_that_is_private_to_another(name: str) -> None:
    """Nor do they get at one by a string."""
    own = own_names(trees()[name]) | {"_replace", "_asdict"}  # of a NamedTuple: documented
    known: list[str] = []
    in_text = {id(part) for node in ast.walk(trees()[name]) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.Attribute):
            known += [node.attr] if not (is_own(node) and node.attr in INHERITED) else []
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known += [part for each in node.names for part in each.name.split(".")]
            known += (getattr(node, "module", None) or "").split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_text:
            known += re.findall(r"^_[a-z]\w*$|(?<=torch\.)_\w+", node.value) if " " not in node.value else []
    private = [each for each in known if re.fullmatch(r"_[a-zA-Z]\w*", each)]
    assert [each for each in private if each not in own and not each.startswith("_tgate")] == []
    assert "experimental" not in known
