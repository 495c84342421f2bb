"""A network: the module of a pipeline that has sites and runs in phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from . import private
from .deepcache import DeepCache, find_deep_branch
from .dispatch import Dispatch
from .errors import StateError, UnsupportedError
from .families import FAMILIES, Family, family_of
from .roles import Kind, Roles
from .schedule import Schedule
from .sites import Site, find_sites
from .split import PhaseFunction, phase_function

# The attributes under which diffusers' pipelines have them.
_DENOISERS = ("unet", "transformer", "transformer_2")
# Modules that keep rows of both guidance branches themselves, of which none can be cut out of the inputs.
_WITH_ROWS = ("IPAdapterFaceIDPlusImageProjection",)


class Network:
    """A denoiser of a pipeline. Nothing is changed on it before `attach`.

    Args:
        attribute: the pipeline's attribute that has the module.
        module: the module.
        family: its facts.
        deepcache: the deep branch to cache, if any.

    Attributes:
        attribute: the pipeline's attribute that has the module.
        module: the module.
        family: its facts.
        branch: the number of the deep branch, if one is cached.
        dispatch: what stands in place of the module's forward, from `attach` on.

    Raises:
        UnsupportedError: the module has no such branch, or no cross-attention.
    """

    def __init__(self, attribute: str, module: nn.Module, family: Family, deepcache: DeepCache | None) -> None:
        self.attribute = attribute
        self.module = module
        self.family = family
        self.branch = None if deepcache is None else deepcache.branch
        self._deep_branch = None if self.branch is None else find_deep_branch(self.module, self.branch)
        self._kinds = {kind for _, kind, _ in find_sites(module)}
        self._functions: dict[Roles, PhaseFunction] = {}
        self.dispatch: Dispatch

    def attach(self, owner: object) -> None:
        """Put the sites on the module until every owner has called `detach`."""
        self.dispatch = Dispatch.attach_to(self.module, owner)
        if self.branch is not None and self._deep_branch is not None:
            self.dispatch.sites.attach_deep_branch(self.branch, self._deep_branch)

    def detach(self, owner: object) -> None:
        """Take the sites off the module, if no other owner uses them."""
        self.dispatch.detach_from(owner)

    def function(self, roles: Roles) -> PhaseFunction:
        """Return the pure function of the phase in which the kinds of site have these roles."""
        if roles not in self._functions:
            dispatch = self.dispatch
            self._functions[roles] = phase_function(dispatch.sites, dispatch.original_forward, roles, self.branch)
        return self._functions[roles]

    def cached_sites(self, schedule: Schedule) -> list[Site]:
        """Return the sites of the kinds that are cached under this schedule."""
        return [
            site
            for kind in schedule.cached_kinds
            for site in self.dispatch.sites.of_kind(kind)
            if site.branch in (None, self.branch)
        ]

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise `UnsupportedError` if there is no site of a kind that is to be cached, or no such branch goes on."""
        possible = (*self.family.guidance.branches, "guided", "both")
        if schedule.after_gate not in possible:
            raise UnsupportedError(
                f"after_gate={schedule.after_gate!r} was given for a {type(self.module).__name__}, whose guidance "
                "branches come in separate calls, the conditional one first: expected "
                f"{' or '.join(map(repr, possible))}. Give one of these, or leave after_gate out."
            )
        if schedule.guidance is not None and any(type(each).__name__ in _WITH_ROWS for each in self.module.modules()):
            raise UnsupportedError(
                f"guidance={schedule.guidance} was given with an IP-Adapter for faces (FaceID Plus), whose module "
                "keeps an image's features for both branches: expected guidance at every step. Leave guidance out."
            )
        if schedule.caches_self_attention and Kind.SELF_ATTENTION not in self._kinds:
            raise UnsupportedError(
                f"sp_interval={schedule.sp_interval} and fi_interval={schedule.fi_interval} were given for a "
                f"{type(self.module).__name__}, in which no self-attention is found: expected modules named attn1. "
                "Leave both intervals at 1."
            )

    def check_captured(self, kind: Kind, captured: Sequence[Any]) -> None:
        """Raise `StateError` if a site of this kind did not run while the module did."""
        self.dispatch.sites.check_captured(kind, self.branch, captured)

    def check_unchanged(self, pipe: Any) -> None:
        """Raise `TGateError` unless the pipeline still has this module, as it can be gated."""
        module = pipe
        for name in self.attribute.split("."):  # a companion's may be an item of a list
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            module = unwrapped(module)
            check_plain(self.attribute, module)
        if module is not self.module:
            raise StateError(
                f"pipe.{self.attribute} was replaced after the pipeline was gated: expected the same module. Put it "
                "back, or call tgate_fx.restore(pipe) and gate the pipeline again."
            )


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline, by its attribute: mostly one; Wan 2.2 has one for each part of the steps.

    Raises:
        UnsupportedError: there is none, or one cannot be gated as it is.
    """
    found = {name: getattr(pipe, name, None) for name in _DENOISERS}
    denoisers = {name: unwrapped(denoiser) for name, denoiser in found.items() if isinstance(denoiser, nn.Module)}
    for name, denoiser in denoisers.items():
        check_plain(name, denoiser)
    if not denoisers:
        raise UnsupportedError(
            f"{type(pipe).__name__} has neither a unet nor a transformer: expected a diffusers pipeline with one to "
            "gate. Use the pipeline as it is."
        )
    return denoisers


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the model within peft's wrapper, which calls that model's forward; another module as it is."""
    base = getattr(module, "get_base_model", None)
    return module if base is None else base()


def networks_of(pipe: Any, deepcache: DeepCache | None = None) -> list[Network]:
    """Return the denoisers of a pipeline with their facts.

    Raises:
        UnsupportedError: there is none, one is of no known family or cannot be gated as it is, or has no such deep
            branch.
    """
    networks = []
    for attribute, denoiser in denoisers_of(pipe).items():
        family = family_of(type(denoiser))
        if family is None:
            find_sites(denoiser)  # which says it if there are none
            raise UnsupportedError(
                f"{type(pipe).__name__}.{attribute} is a {type(denoiser).__name__}, which is not among the tested "
                f"denoisers: expected one of {', '.join(FAMILIES)}. tgate_fx.split(denoiser) works on any model with "
                "cross-attention."
            )
        networks.append(Network(attribute, denoiser, family, deepcache))
    return networks


def check_plain(attribute: str, denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if something else runs this denoiser, past any forward that is put on it."""
    for name, module in denoiser.named_modules():
        _check_not_compiled(attribute, name, module)
        _check_no_cache(attribute, name, module)
    _check_no_deepcache_helper(denoiser)


def check_not_compiled(attribute: str, denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if torch.compile runs this module or one in it, past any instance-level forward."""
    for name, module in denoiser.named_modules():
        _check_not_compiled(attribute, name, module)


def _check_not_compiled(attribute: str, name: str, module: nn.Module) -> None:
    if private.is_compiled_in_place(module):
        instead = "tgate_fx.compile(pipe, regional=True), which compiles blocks" if name else "tgate_fx.compile(pipe)"
        raise UnsupportedError(
            f"{_place(attribute, name)} is compiled by torch.compile already, so that its gate would never be seen, or "
            "make it compile again and again: expected the plain module. Load the pipeline without compiling it, then "
            f"call {instead}."
        )


def _check_no_cache(attribute: str, name: str, module: nn.Module) -> None:
    """Raise `UnsupportedError` if one of diffusers' caches is enabled on this module of a denoiser."""
    hooks = private.caching_hooks(module)
    if hooks:
        raise UnsupportedError(
            f"{', '.join(hooks)} is enabled on {_place(attribute, name)}: expected no cache but the gate's, since each "
            f"would leave out what the other counts on. Call pipe.{attribute}.disable_cache(), or use the pipeline "
            "ungated."
        )


def _place(attribute: str, name: str) -> str:
    return f"pipe.{attribute}.{name}" if name else f"pipe.{attribute}"


def _check_no_deepcache_helper(denoiser: nn.Module) -> None:
    """Raise `UnsupportedError` if the `DeepCache` package's helper is enabled on this denoiser."""
    for name in ("forward", private.BENEATH_HOOK):
        function = vars(denoiser).get(name)
        if getattr(function, "__module__", "") == "DeepCache.extension.deepcache":
            helpers = [cell.cell_contents for cell in getattr(function, "__closure__", ()) or ()]
            params: dict[str, int] = next((helper.params for helper in helpers if hasattr(helper, "params")), {})
            interval = params.get("cache_interval", 3)
            branch = 3 * params.get("cache_block_id", 0) + params.get("cache_layer_id", 0)
            raise UnsupportedError(
                "A DeepCacheSDHelper is enabled on this pipeline: expected none, since its cache and the gate would "
                "undo each other. Call helper.disable(), and give "
                f"deepcache=tgate_fx.DeepCache(interval={interval}, branch={branch}) to tgate_fx.gate or "
                "tgate_fx.compile."
            )
