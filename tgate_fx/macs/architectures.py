"""The denoisers of well-known models, by their public configurations, without weights."""

from __future__ import annotations

from .architecture import Architecture
from .images import IMAGES
from .sounds import SOUNDS
from .videos import VIDEOS
from .wan import WAN

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {**IMAGES, **WAN, **VIDEOS, **SOUNDS}
