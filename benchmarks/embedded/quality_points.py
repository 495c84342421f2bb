"""The points at which `benchmarks.embedded.quality` measures: rules, gates, schedulers and guidance scales, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

import tgate_fx
from tgate_fx import demo
from tgate_fx.schedule import Schedule

STEPS = 25
GATES = (5, 8, 3, 10, 1, 2, 15, 20)  # in the order in which they are measured
_SCALE = 7.5
_SCALES = (7.5, 3.0, 12.0)
SCHEDULERS: dict[str, type[Any]] = {
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "DDIM": diffusers.DDIMScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
}
_SCHEDULER = "DPM-Solver++"

# What the pipeline's call is given beside the gate step, and what the rule is called in plots and tables.
_CONDITIONAL: dict[str, Any] = {"cache_weight": 1.0}
_GUIDED: dict[str, Any] = {"cache_weight": 1.0, "after_gate": "guided"}
RULES: dict[str, dict[str, Any]] = {
    "mean": {"cache_weight": 0.5},
    "weight 0.75": {"cache_weight": 0.75},
    "conditional": _CONDITIONAL,
    "guided": _GUIDED,
    "cutoff": {},  # guidance dropped at the gate step, and nothing cached
    "both": {"after_gate": "both"},
    "conditional, forecast 2": {**_CONDITIONAL, "forecast": 2},
    "guided, forecast 2": {**_GUIDED, "forecast": 2},
    "guided, forecast 3": {**_GUIDED, "forecast": 3},
    "guided, full steps": _GUIDED,  # every second step after the gate, up to `_LAST_FULL`, is computed in full
    "guided, full steps, forecast 4": {**_GUIDED, "forecast": 4},
    "guided, full steps, forecast 6": {**_GUIDED, "forecast": 6},
    "guided, full steps, fewer steps 4": _GUIDED,  # those that such a forecast computes are all that are scheduled
    "guided, fewer steps 2": _GUIDED,  # only every second step after the gate is in the schedule
    "guided, fewer steps 3": _GUIDED,
    "guided, self-attention intervals": {**_GUIDED, "sp_interval": 5, "warm_up": 2},  # upstream's for Stable Diffusion
    "guided, DeepCache": _GUIDED,
    "guided, DeepCache of order 1": _GUIDED,
}
_DEEPCACHES = {
    name: tgate_fx.DeepCache(interval=3, branch=0, order=order)
    for name, order in (("DeepCache", 0), ("DeepCache of order 1", 1))
}
_LAST_FULL = 13
_FULL = "guided, full steps, forecast 4"
_FEWER = {f"ungated, {steps} steps": steps for steps in (11, 13, 16)}  # in all: the rival at 0.88, 1.04 and 1.28 rows
_MAIN = ("conditional", "mean", "guided", "guided, forecast 2", "cutoff")  # at all gates
_IN_THE_GRID = (_FULL, "guided", "conditional", "mean")
_GATE_IN_THE_GRID = 5


@dataclass(frozen=True)
class Point:
    """One way to generate.

    Attributes:
        rule: one of `RULES`, "ungated", also with fewer steps, "unguided", or DeepCache without a gate.
        gate: the gate step; "auto" where the gate opens by itself; None for none.
        scheduler: one of `SCHEDULERS`.
        scale: the guidance scale.
    """

    rule: str
    gate: int | str | None = None
    scheduler: str = _SCHEDULER
    scale: float = _SCALE

    @property
    def name(self) -> str:
        """Also of its files."""
        return f"{self.scheduler} {self.scale:g} {self.rule} {self.gate}".replace(" ", "_")

    @property
    def reference(self) -> Point:
        """The ungated point that its pictures are compared with."""
        return Point("ungated", None, self.scheduler, self.scale if self.rule != "unguided" else _SCALE)


def points() -> list[Point]:
    """Every point, those first that say most: the main rules, then schedulers and guidance scales, then all else."""
    two, few = GATES[:2], GATES[:4]
    main = {gate: [Point(rule, gate) for rule in _MAIN] for gate in GATES}
    other = {gate: [Point(rule, gate) for rule in RULES if rule not in _MAIN] for gate in few}
    auto = [Point(rule, "auto") for rule in ("guided", "conditional", "mean")]
    deep = [Point(name) for name in _DEEPCACHES]
    grid = [(name, scale) for name in SCHEDULERS for scale in _SCALES if (name, scale) != (_SCHEDULER, _SCALE)]
    chosen = [Point("ungated"), Point("unguided", scale=1.0), *[each for gate in two for each in main[gate]]]
    chosen += [Point(_FULL, 5), *map(Point, _FEWER), Point("guided, full steps, forecast 6", 5)]
    chosen.append(Point("guided, full steps, fewer steps 4", 5))
    chosen += [Point(_FULL, gate) for gate in few]
    chosen += [*auto, Point("guided, forecast 3", 8), Point("guided, fewer steps 2", 5), *main[10], *deep]
    chosen += [each for gate in two for each in other[gate]]
    chosen += [each for gate in GATES for each in main[gate]]
    for name, scale in grid:
        rules = [Point(rule, _GATE_IN_THE_GRID, name, scale) for rule in _IN_THE_GRID]
        chosen += [Point("ungated", None, name, scale), *rules]
    chosen += [each for gate in few for each in other[gate]]
    return list(dict.fromkeys(chosen))


class Pipelines:
    """The embedded pipeline, compiled, and once more for each DeepCache; all with the same weights."""

    def __init__(self) -> None:
        self._gated = tgate_fx.compile(demo.load(), None)
        self._deep = {
            name: tgate_fx.compile(demo.load(), None, deepcache=setting) for name, setting in _DEEPCACHES.items()
        }
        self._configs = dict(self._gated.scheduler.config)
        for pipe in (self._gated, *self._deep.values()):
            pipe.set_progress_bar_config(disable=True)

    def generate(self, point: Point, captions: list[str], seeds: list[int]) -> tuple[torch.Tensor, tgate_fx.Report]:
        """Pictures in [0, 1], [N, 3, 64, 64], and what was computed for them."""
        pipe: Any = self._deep.get(point.rule.removeprefix("guided, "), self._gated)
        pipe.scheduler = SCHEDULERS[point.scheduler].from_config(self._configs)
        call = dict(RULES.get(point.rule, {}))
        if point.rule == "cutoff":
            call["guidance"] = (0, point.gate)
        else:
            call["gate_step"] = point.gate
        full = range(int(point.gate or 0) + 2, _LAST_FULL + 1, 2) if "full steps" in point.rule else ()
        call["full_steps"] = full
        if "fewer steps" in point.rule:
            forecast = Schedule(point.gate, forecast=int(point.rule[-1]), full_steps=full, last=STEPS - 1)
            computed = [index for index in range(STEPS) if forecast.at(index).computed]
            pipe.scheduler.set_timesteps(STEPS)
            call["timesteps"] = [int(pipe.scheduler.timesteps[index]) for index in computed]
            call["full_steps"] = [place for place, index in enumerate(computed) if index in full]
        else:
            call["num_inference_steps"] = _FEWER.get(point.rule, STEPS)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        result = pipe(captions, generator=generators, guidance_scale=point.scale, output_type="pt", **call)
        return result.images, tgate_fx.report(pipe)
