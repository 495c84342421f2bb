"""T-GATE for diffusers pipelines: two phases, two graphs, one line."""

from .artifact.load import load
from .artifact.save import save
from .auto_gate import AutoGate
from .deepcache import DeepCache
from .errors import ArgumentError, CompileError, StateError, TGateError, UnsupportedError
from .hand_written import generation
from .inspection import graphs, report, sites
from .loaders import (
    TgatePixArtAlphaLoader,
    TgatePixArtLoader,
    TgatePixArtSigmaLoader,
    TgateSDDeepCacheLoader,
    TgateSDLoader,
    TgateSDXLDeepCacheLoader,
    TgateSDXLLoader,
    TgateSVDLoader,
)
from .phase_graph import PhaseGraph
from .pipeline import compile, disabled, gate, restore, split
from .report import Report, StepReport
from .sites import SiteInfo
from .tuning.measure import tune
from .tuning.result import Trial, Tuning
from .warmup import warmup

__version__ = "0.1.0.dev0"

__all__ = [
    "ArgumentError",
    "AutoGate",
    "CompileError",
    "DeepCache",
    "PhaseGraph",
    "Report",
    "SiteInfo",
    "StateError",
    "StepReport",
    "TGateError",
    "TgatePixArtAlphaLoader",
    "TgatePixArtLoader",
    "TgatePixArtSigmaLoader",
    "TgateSDDeepCacheLoader",
    "TgateSDLoader",
    "TgateSDXLDeepCacheLoader",
    "TgateSDXLLoader",
    "TgateSVDLoader",
    "Trial",
    "Tuning",
    "UnsupportedError",
    "compile",
    "disabled",
    "gate",
    "generation",
    "graphs",
    "load",
    "report",
    "restore",
    "save",
    "sites",
    "split",
    "tune",
    "warmup",
]
