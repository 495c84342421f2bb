"""Who takes part: ways to generate the same image, each with the one that its result is checked against."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..schedule import Schedule
from .models import MODELS
from .prepare import DEEPCACHE, Prepare, as_phases, cutoff, deepcache_package, gated, openvino, plain, upstream

INTERVALS: dict[str, Any] = {"sp_interval": 5, "fi_interval": 1, "warm_up": 2}

_UNGATED = Schedule(None)
_GATED = Schedule(1)
_GATED_INTERVALS = Schedule(1, **INTERVALS)
_GATED_FORECAST = Schedule(1, forecast=2)
_DEEP = Schedule(None, deep_interval=DEEPCACHE.interval)
_GATED_DEEP = Schedule(1, deep_interval=DEEPCACHE.interval)


@dataclass(frozen=True)
class Contender:
    """One way to generate.

    Attributes:
        title: what tables call it.
        prepare: puts it on a new pipeline.
        schedule: what it computes, its ``gate_step`` being that of a run; None if no `Schedule` says it.
        takes_gate: whether a run depends on the gate step.
        reference: the contender whose latents its own must agree with; None if it is a reference itself.
        exact: whether they must be equal, bit for bit.
        ungated: the contender with the same compile settings and nothing cached.
        copies: how often it keeps the weights in memory, besides the file that all processes share.
        devices: which devices it is for.
    """

    title: str
    prepare: Prepare
    schedule: Schedule | None = _UNGATED
    takes_gate: bool = False
    reference: str | None = None
    ungated: str | None = None
    copies: float = 0
    exact: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def schedule_at(self, gate: int | None) -> Schedule | None:
        """Return the schedule of a run with this gate."""
        return (
            replace(self.schedule, gate_step=gate) if self.schedule is not None and self.takes_gate else self.schedule
        )


_UNFROZEN = {"options": {"freezing": False}}
_GRAPHS: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
_OUR_GRAPHS = {"mode": "reduce-overhead"}
_FORECAST: dict[str, Any] = {"forecast": 2, "cache_weight": 1.0}
_CPU, _CUDA = ("cpu",), ("cuda",)

CONTENDERS: dict[str, Contender] = {
    "diffusers": Contender("diffusers", plain()),
    "diffusers-compiled": Contender("diffusers, torch.compile", plain(backend="inductor"), reference="diffusers"),
    "diffusers-graphs": Contender(
        "diffusers, torch.compile with CUDA graphs", plain(**_GRAPHS), reference="diffusers", devices=_CUDA
    ),
    "diffusers-frozen": Contender(
        "diffusers, torch.compile with freezing",
        plain(freezing=True),
        reference="diffusers",
        copies=1,
        devices=_CPU,
    ),
    "openvino": Contender("diffusers, OpenVINO", openvino, reference="diffusers", copies=1, devices=_CPU),
    "cutoff": Contender("diffusers' CFG cutoff", cutoff(), None, True, ungated="diffusers"),
    "cutoff-frozen": Contender(
        "diffusers' CFG cutoff, torch.compile with freezing",
        cutoff(freezing=True, dynamic=False),
        None,
        True,
        "cutoff",
        "diffusers-frozen",
        copies=2,
        devices=_CPU,
    ),
    "cutoff-graphs": Contender(
        "diffusers' CFG cutoff, torch.compile with CUDA graphs",
        cutoff(**_GRAPHS),
        None,
        True,
        "cutoff",
        "diffusers-graphs",
        devices=_CUDA,
    ),
    "deepcache": Contender("DeepCache", deepcache_package, _DEEP, ungated="diffusers"),
    "tgate": Contender("tgate", upstream(), _GATED, True, ungated="diffusers"),
    "tgate-compiled": Contender(
        "tgate, torch.compile", upstream(compiled=True), _GATED, True, "tgate", "diffusers-compiled"
    ),
    "tgate-intervals": Contender(
        "tgate, self-attention every 5", upstream(intervals=INTERVALS), _GATED_INTERVALS, True, ungated="diffusers"
    ),
    "tgate-deepcache": Contender(
        "tgate with DeepCache", upstream(deepcache=True), _GATED_DEEP, True, ungated="diffusers"
    ),
    "gated": Contender("tgate_fx, eager", gated(), _GATED, True, "tgate", "diffusers", exact=True),
    "gated-intervals": Contender(
        "tgate_fx, eager, self-attention every 5",
        gated(**INTERVALS),
        _GATED_INTERVALS,
        True,
        "tgate-intervals",
        "diffusers",
        exact=True,
    ),
    "gated-deepcache": Contender(
        "tgate_fx, eager, DeepCache",
        gated(deepcache=DEEPCACHE),
        _GATED_DEEP,
        True,
        "tgate-deepcache",
        "diffusers",
        exact=True,
    ),
    "gated-unfrozen": Contender(
        "tgate_fx, compiled without freezing",
        gated(_UNFROZEN),
        _GATED,
        True,
        "tgate",
        "diffusers-compiled",
        devices=_CPU,
    ),
    "ungated-compiled": Contender(
        "diffusers, compiled as tgate_fx does", as_phases, reference="diffusers", copies=1, devices=_CPU
    ),
    "gated-compiled": Contender(
        "tgate_fx, compiled", gated({}), _GATED, True, "tgate", "ungated-compiled", copies=3, devices=_CPU
    ),
    "gated-openvino": Contender(
        "tgate_fx, OpenVINO",
        gated({"backend": "openvino"}),
        _GATED,
        True,
        "tgate",
        "openvino",
        copies=3,
        devices=_CPU,
    ),
    "gated-deepcache-compiled": Contender(
        "tgate_fx, compiled, DeepCache",
        gated({}, DEEPCACHE),
        _GATED_DEEP,
        True,
        "tgate-deepcache",
        "ungated-compiled",
        copies=3,
        devices=_CPU,
    ),
    "gated-forecast": Contender(
        "tgate_fx, eager, every second step forecast",
        gated(**_FORECAST),
        _GATED_FORECAST,
        True,
        ungated="diffusers",
    ),
    "gated-forecast-compiled": Contender(
        "tgate_fx, compiled, every second step forecast",
        gated({}, **_FORECAST),
        _GATED_FORECAST,
        True,
        "gated-forecast",
        "ungated-compiled",
        copies=3,
        devices=_CPU,
    ),
    "gated-graphs": Contender(
        "tgate_fx, CUDA graphs", gated(_OUR_GRAPHS), _GATED, True, "tgate", "diffusers-graphs", devices=_CUDA
    ),
    "gated-forecast-graphs": Contender(
        "tgate_fx, CUDA graphs, every second step forecast",
        gated(_OUR_GRAPHS, **_FORECAST),
        _GATED_FORECAST,
        True,
        "gated-forecast",
        "diffusers-graphs",
        devices=_CUDA,
    ),
    "gated-deepcache-graphs": Contender(
        "tgate_fx, CUDA graphs, DeepCache",
        gated(_OUR_GRAPHS, DEEPCACHE),
        _GATED_DEEP,
        True,
        "tgate-deepcache",
        "diffusers-graphs",
        devices=_CUDA,
    ),
}

# Each adds one thing to another, which it is set against.
LADDER: dict[str, str | None] = {
    "diffusers": None,
    "cutoff": "diffusers",
    "gated": "cutoff",
    "gated-intervals": "gated",
    "gated-deepcache": "gated",
    "gated-compiled": "gated",
    "gated-forecast-compiled": "gated-compiled",
    "gated-deepcache-compiled": "gated-compiled",
    "gated-graphs": "gated",
    "gated-forecast-graphs": "gated-graphs",
    "gated-deepcache-graphs": "gated-graphs",
}


def applicable(names: tuple[str, ...], arch: str, device: str) -> tuple[str, ...]:
    """Return those of the contenders that there are for a model on a device."""
    return tuple(name for name in names if device in CONTENDERS[name].devices and _takes_part(name, arch))


def _takes_part(name: str, arch: str) -> bool:
    return not any(part in name for part in MODELS[arch].without)


# Who stands in for upstream as a reference, where upstream has no loader for a model.
_INSTEAD_OF_UPSTREAM = {"tgate": "gated", "tgate-intervals": "gated-intervals"}


def reference_of(name: str, arch: str) -> str | None:
    """Return the contender whose latents another's are checked against for a model; None for a reference itself."""
    reference = CONTENDERS[name].reference
    if reference is None or _takes_part(reference, arch):
        return reference
    instead = _INSTEAD_OF_UPSTREAM[reference]
    return None if instead == name else instead
