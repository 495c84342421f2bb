"""Sites and roles: which modules of a denoiser may be cached, and what each of them does in a phase.

A site keeps its module where it is; only the instance's ``forward`` is replaced by one that looks at the site's role.
The laws of the roles: with every role LIVE the denoiser computes bit for bit what it computed before; a site that is
REUSE returns the very tensor it is given and computes nothing.
"""

from __future__ import annotations

import enum
import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import StateError, UnsupportedError
from .slots import ForwardSlot


class Role(enum.Enum):
    """What a site does in a phase."""

    LIVE = "live"  # compute
    CAPTURE = "capture"  # compute, and hand the value out
    REUSE = "reuse"  # return the cached value; compute nothing


class SiteInfo(NamedTuple):
    """A site as people see it: the module's name within the denoiser, and its kind."""

    name: str
    kind: str


# Names under which diffusers' models keep the attention that reads the prompt ...
_CROSS_ATTENTION = re.compile(r"(?:^|\.)(?:attn2|audio_attn2|cross_attn|cross_attention)$")
# ... and the names of attention over frames, faces or resampled tokens that are built from the same classes.
_NOT_ON_TEXT = re.compile(r"(?:^|\.)(?:motion_modules|temp_attentions|transformer_in|perceiver|face_adapter)(?:\.|$)")


def find_sites(denoiser: nn.Module) -> list[tuple[str, nn.Module]]:
    """The cross-attention modules of ``denoiser``, as (name, module) in module order.

    A module counts if it is named as a cross-attention, or is the first attention of a block without self-attention
    (diffusers' ``only_cross_attention``), and does not say of itself that it is a self-attention.

    Raises:
        UnsupportedError: there is none.
    """
    found = []
    for name, module in denoiser.named_modules():
        says_cross = getattr(module, "is_cross_attention", None)
        named_cross = bool(_CROSS_ATTENTION.search(name)) and says_cross is not False
        instead_of_self = name.endswith(".attn1") and says_cross is True
        if (named_cross or instead_of_self) and not _NOT_ON_TEXT.search(name):
            found.append((name, module))
    if not found:
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no cross-attention that could be cached: expected modules named attn2, "
            "cross_attn or cross_attention that read the text apart from the image. Models with joint attention "
            "(Flux, Stable Diffusion 3) or without a text input cannot be gated; use the pipeline as it is."
        )
    return found


class Site:
    """One module whose output may be cached; callable in place of the module's ``forward``."""

    def __init__(self, sites: Sites, index: int, name: str, module: nn.Module) -> None:
        self._sites = sites
        self._index = index
        self.name = name
        self.__signature__ = inspect.signature(module.forward)
        self._slot = ForwardSlot(module, self)
        self._inner = self._slot.inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, in place of its ``forward``, as its role says."""
        sites = self._sites
        if sites.roles is None:
            return self._inner(*args, **kwargs)
        role = sites.roles[self._index]
        if role is Role.REUSE:
            return sites.values[self._index]
        if role is Role.LIVE:
            return self._inner(*args, **kwargs)
        self._check_text(args, kwargs)
        output = self._inner(*args, **kwargs)
        self._check_output(output)
        sites.values[self._index] = output
        return output

    def _check_text(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query = args[0] if args else kwargs.get("hidden_states")
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states", kwargs.get("context"))
        if context is None or context is query:
            raise UnsupportedError(
                f"{self.name} is named as a cross-attention but was given no text to attend to: expected one that is. "
                "Call the denoiser with its text, or leave this model ungated."
            )

    def _check_output(self, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise UnsupportedError(
                f"{self.name} returned {type(output).__name__}: expected one tensor to cache. Leave this model ungated."
            )
        if self._sites.values[self._index] is not None:
            raise UnsupportedError(
                f"{self.name} ran more than once in one call of the denoiser: expected once. Turn off what repeats it."
            )

    def remove(self) -> None:
        """Give the module its own ``forward`` back."""
        self._slot.remove()


class Sites:
    """The sites of one denoiser and, while a phase runs, what each of them does.

    Attributes:
        roles: a role for each site, or None outside a phase: every site is LIVE.
        values: for each site the cached tensor (REUSE) or, once it has run, the captured one (CAPTURE).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.roles: tuple[Role, ...] | None = None
        self.values: list[Any] = []
        self.sites: list[Site] = []
        for index, (name, module) in enumerate(find_sites(denoiser)):
            self.sites.append(Site(self, index, name, module))

    def __len__(self) -> int:
        return len(self.sites)

    def check_captured(self, captured: tuple[Any, ...]) -> None:
        """Raise `StateError` if a site did not run while its denoiser did."""
        for site, value in zip(self.sites, captured, strict=True):
            if value is None:
                raise StateError(
                    f"{site.name} did not go through tgate_fx while the denoiser ran: its forward was replaced or the "
                    "block is skipped since the pipeline was gated. Call tgate_fx.restore(pipe), then gate it again."
                )

    def remove(self) -> None:
        """Take every site off its module."""
        for site in self.sites:
            site.remove()
