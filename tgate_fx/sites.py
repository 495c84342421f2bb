"""Sites: which modules of a denoiser may be cached, and what each of them does in a phase.

A site keeps its module where it is; only the instance's ``forward`` is replaced by one that looks at the site's role.
The laws of the roles: with every role LIVE the denoiser computes bit for bit what it computed before; a site that is
REUSE returns the tensor it is given, or a copy of it where that may be written to, and computes nothing.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from .deepcache import DeepBranch
from .errors import StateError, UnsupportedError
from .forward_patch import ForwardPatch
from .inputs import map_tensors, on_meta
from .private import has_hooks
from .roles import Kind, Role, Roles


class SiteInfo(NamedTuple):
    """A site as people see it: the module's name within the denoiser, and its kind."""

    name: str
    kind: str


class SiteList(tuple[SiteInfo, ...]):
    """Sites; `print` them for a list, a line each."""

    def __str__(self) -> str:
        counts = Counter(site.kind for site in self)
        lines = [", ".join(f"{count} × {kind}" for kind, count in counts.items()) or "no sites"]
        width = max((len(site.name) for site in self), default=0)
        lines += [f"  {site.name:<{width}}  {site.kind}" for site in self]
        return "\n".join(lines)


# diffusers' models keep the attention that reads the prompt under these names; in each block of Kandinsky 3 the first
# of several attentions is a self-attention, which the others are not.
_CROSS_NAME = re.compile(r"(?:^|\.)(?:attn2|audio_attn2|cross_attn|cross_attention|attentions\.[1-9]\d*\.attention)$")
# Attention over frames, faces or resampled tokens is built from the same classes, within modules of these names.
_NOT_ON_TEXT = re.compile(r"(?:^|\.)(?:motion_modules|temp_attentions|transformer_in|perceiver|face_adapter)(?:\.|$)")


def find_sites(denoiser: nn.Module) -> list[tuple[str, Kind, nn.Module]]:
    """Return the attention modules of ``denoiser``, as (name, kind, module) in module order.

    A module is a cross-attention if it is named as one, or is the first attention of a block without self-attention
    (diffusers' ``only_cross_attention``), and does not say of itself that it is a self-attention. The first attention
    of any other block is a self-attention.

    Raises:
        UnsupportedError: there is no cross-attention.
    """
    # AudioLDM's and MusicLDM's UNets, whose attentions have all that makes one a cross-attention but a text.
    if getattr(getattr(denoiser, "config", None), "class_embeddings_concat", False):
        raise UnsupportedError(
            f"{type(denoiser).__name__} reads its text as class_labels beside the time (class_embeddings_concat), and "
            "its attention the latents alone: expected cross-attention to the text. Use the pipeline as it is."
        )
    found: list[tuple[str, Kind, nn.Module]] = []
    for name, module in denoiser.named_modules():
        says_cross = getattr(module, "is_cross_attention", None)
        first = name.endswith(".attn1")
        if _NOT_ON_TEXT.search(name):
            continue
        if (_CROSS_NAME.search(name) and says_cross is not False) or (first and says_cross is True):
            found.append((name, Kind.CROSS_ATTENTION, module))
        elif first:
            found.append((name, Kind.SELF_ATTENTION, module))
    if not any(kind is Kind.CROSS_ATTENTION for _, kind, _ in found):
        _refuse(denoiser)
    return found


def _refuse(denoiser: nn.Module) -> NoReturn:
    """Raise `UnsupportedError` for a denoiser without cross-attention."""
    name = type(denoiser).__name__
    takes_text = "encoder_hidden_states" in inspect.signature(denoiser.forward).parameters
    attentions = [each for each, module in denoiser.named_modules() if "Attention" in type(module).__name__]
    if takes_text and attentions and not any(map(_CROSS_NAME.search, attentions)):
        raise UnsupportedError(
            f"{name} has joint attention, in which text and image attend to each other: expected cross-attention, "
            "which reads the text apart from the image and so becomes constant. Use the pipeline as it is."
        )
    raise UnsupportedError(
        f"{name} has no cross-attention that could be cached: expected modules named attn2, cross_attn or "
        "cross_attention that read the text apart from the image. Models that take no text, or in whose attention it "
        "joins the image, cannot be gated; use the pipeline as it is."
    )


class RoleTable:
    """What each of some sites does while a phase, or a part of one, runs.

    Attributes:
        roles: a role for each site, or None at all other times.
        values: for each site the cached tensor (REUSE) or, once it has run, the captured one (CAPTURE).
    """

    def __init__(self) -> None:
        self.roles: tuple[Role, ...] | None = None
        self.values: list[Any] = []

    def role(self, index: int) -> Role:
        """Return the role that the site with this index has now."""
        # A phase may be older than a site that another pipeline has added for its deep branch.
        return Role.LIVE if self.roles is None or index >= len(self.roles) else self.roles[index]


class Part(ForwardPatch):
    """What stands in place of the ``forward`` of one module of a denoiser that has sites."""

    def __init__(self, sites: Sites, module: nn.Module) -> None:
        super().__init__(module)
        self._sites = sites

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # In a module that is copied without its denoiser, what is kept is its own forward.
        return super().__deepcopy__(memo) if self._sites.within(memo) else copy.deepcopy(self.original_forward, memo)


class Site(Part):
    """One module whose output may be cached; callable in place of the module's ``forward``.

    Attributes:
        name: the module's name within the denoiser.
        kind: what it is.
        branch: for a site of the deep branch, that branch's number.
    """

    def __init__(self, sites: Sites, name: str, kind: Kind, module: nn.Module, branch: int | None = None) -> None:
        self.__signature__ = inspect.signature(module.forward)
        super().__init__(sites, module)
        self._index = len(sites.sites)
        self._index_in_block: int | None = None
        self.name = name
        self.kind = kind
        self.branch = branch

    @property
    def info(self) -> SiteInfo:
        """The site as people see it."""
        return SiteInfo(self.name, self.kind.title)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in place of its ``forward``, as its role says."""
        table, index = self._now()
        role = table.role(index)
        if role is Role.REUSE:
            return self._of_its_own(table.values[index])
        if role is Role.LIVE:
            return self.original_forward(*args, **kwargs)
        if self.kind is Kind.CROSS_ATTENTION:
            self._check_text(args, kwargs)
        return self._capture(self.original_forward(*args, **kwargs), table, index)

    def join_block(self, index: int) -> None:
        """Take the role of the site with this index of a block, whenever `Sites.block` has roles."""
        self._index_in_block = index

    def _now(self) -> tuple[RoleTable, int]:
        """Return where its role and its value are now, and under which index."""
        if self._index_in_block is not None and self._sites.block.roles is not None:
            return self._sites.block, self._index_in_block
        return self._sites, self._index

    def _of_its_own(self, value: Any) -> Any:
        """Return a value that others may write to: FreeU does, and so may a model or a hook that is not diffusers'."""
        may_be_written = self.kind is Kind.DEEP_BRANCH or self._sites.are_foreign or has_hooks(self._module)
        return value.clone() if may_be_written else value

    def _capture(self, output: Any, table: RoleTable, index: int) -> Any:
        if not isinstance(output, torch.Tensor):
            raise UnsupportedError(
                f"{self.name} returned {type(output).__name__}: expected one tensor to cache. Leave this model ungated."
            )
        if table.values[index] is not None:
            raise UnsupportedError(
                f"{self.name} ran more than once in one call of the denoiser: expected once. Turn off what repeats it."
            )
        table.values[index] = self._of_its_own(output)
        return output

    def _check_text(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs.get("hidden_states")
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states", kwargs.get("context"))
        if context is None or context is query:
            raise UnsupportedError(
                f"{self.name} is named as a cross-attention but was given no text to attend to: expected one that is. "
                "Call the denoiser with its text, or leave this model ungated."
            )


class TupleSite(Site):
    """A site whose module returns its tensor in a tuple, as the transformers within UNet blocks do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in place of its ``forward``, as its role says."""
        table, index = self._now()
        role = table.role(index)
        if role is Role.REUSE:
            return (self._of_its_own(table.values[index]),)
        output = self.original_forward(*args, **kwargs)
        if role is Role.CAPTURE:
            self._capture(output[0], table, index)
        return output


class SkippedSite(Site):
    """A module of which nothing is used while the deep branch is cached.

    While skipped it returns memory of its usual shape that nothing was written to. Where a phase is compiled it is
    traced as it is: the compiler drops what is not used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outputs: dict[torch.Size, Any] = {}  # as meta tensors, by the shape of the input

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in place of its ``forward``, as its role says."""
        role = self._sites.role(self._index)
        if self._sites.roles is None or torch.compiler.is_compiling():
            return self.original_forward(*args, **kwargs)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        # The full step may have run in a compiled graph, and this one not: then no output was seen.
        if role is Role.SKIP and given.shape in self._outputs:
            return map_tensors(lambda meta: torch.empty_like(meta, device=given.device), self._outputs[given.shape])
        output = self.original_forward(*args, **kwargs)
        self._outputs[given.shape] = on_meta(output)
        return output


class Sites(RoleTable):
    """The sites of one denoiser and, while a phase runs, what each of them does; outside a phase every one is LIVE.

    Attributes:
        sites: every site, in the order in which they were attached.
        parts: all that stands in place of a module's forward: the sites, and the blocks that hold them if these are
            compiled one by one.
        block: what the sites of the block that is being run do, where blocks are compiled one by one.
        detached: whether they were taken off again.
        are_foreign: whether the denoiser's class is not one of diffusers', of which it is known what it writes to.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self._denoiser = denoiser
        self.block = RoleTable()
        self.sites: list[Site] = []
        self.parts: list[Part] = []
        self.detached = False
        self.are_foreign = type(denoiser).__module__.partition(".")[0] != "diffusers"
        for name, kind, module in find_sites(denoiser):
            self._attach_site(Site(self, name, kind, module))

    def within(self, memo: dict[int, Any]) -> bool:
        """Return whether the denoiser itself is being copied by the ``copy.deepcopy`` that has this memo."""
        return id(self._denoiser) in memo

    def attach(self, part: Part) -> None:
        """Put a part on its module, until `detach`."""
        part.attach()
        self.parts.append(part)

    def _attach_site(self, site: Site) -> None:
        self.attach(site)
        self.sites.append(site)

    def attach_deep_branch(self, number: int, branch: DeepBranch) -> None:
        """Put sites on the modules of a deep branch, unless they are there already."""
        if any(site.branch == number for site in self.sites):
            return
        classes = {branch.exit: TupleSite if branch.in_tuple else Site, **dict.fromkeys(branch.skipped, SkippedSite)}
        for name, cls in classes.items():
            self._attach_site(cls(self, name, Kind.DEEP_BRANCH, self._denoiser.get_submodule(name), number))

    def assign(self, roles: Roles, branch: int | None) -> tuple[Role, ...]:
        """Return a role for each site: that of its kind, and LIVE in every deep branch but this one."""
        return tuple(self._assigned(site, roles, branch) for site in self.sites)

    def _assigned(self, site: Site, roles: Roles, branch: int | None) -> Role:
        if site.kind is not Kind.DEEP_BRANCH:
            return roles[site.kind]
        if site.branch != branch:
            return Role.LIVE
        if isinstance(site, SkippedSite):
            return Role.SKIP if roles.deep_branch is Role.REUSE else Role.LIVE
        return roles.deep_branch

    def of_kind(self, kind: Kind) -> list[Site]:
        """Return the sites of one kind that can be cached, in order."""
        return [site for site in self.sites if site.kind is kind and not isinstance(site, SkippedSite)]

    def with_role(self, wanted: Role, roles: Roles, branch: int | None) -> tuple[SiteInfo, ...]:
        """Return the sites that have one role, when the kinds have these."""
        assigned = zip(self.sites, self.assign(roles, branch), strict=True)
        return tuple(site.info for site, role in assigned if role is wanted)

    def check_captured(self, kind: Kind, branch: int | None, captured: Sequence[Any]) -> None:
        """Raise `StateError` if a site of this kind did not run while its denoiser did."""
        sites = [site for site in self.of_kind(kind) if site.branch in (None, branch)]
        for site, value in zip(sites, captured, strict=True):
            if value is None:
                raise StateError(
                    f"{site.name} did not go through tgate_fx while the denoiser ran: expected the forward that was "
                    "put on it, but it was replaced, or its block is skipped. Call tgate_fx.restore(pipe), then gate "
                    "it again."
                )

    def detach(self) -> None:
        """Take every part off its module, the last one put on first."""
        for part in reversed(self.parts):
            part.detach()
        self.detached = True
