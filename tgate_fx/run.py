"""One generation: count the step, slice the branch, run the phase, keep what it captured, give the batch back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .cache import StaticCache
from .errors import StateError, UnsupportedError
from .guidance import guidance_is_on
from .inputs import latents_of
from .network import Network
from .phases import Example, Phases, example
from .report import StepClock
from .roles import Kind, Role, Roles
from .schedule import Schedule, Step
from .split import Cache
from .step_count import step_count


class Run:
    """One generation of a gated pipeline, for one network of it.

    Args:
        pipe: the pipeline, in the middle of its own ``__call__``.
        network: whose calls these are.
        phases: what runs them.
        cache: where captured values are kept.
        schedule: which phase each step is in.
        guidance_scale: as bound by the call, for pipelines without ``do_classifier_free_guidance``.

    Attributes:
        schedule: the same, with a share of the steps made a step index once their number is known.
        phases: what runs the steps.
        steps: how many steps were run.
        branch_sliced: whether the step that ran last saw one guidance branch only.
        clock: what each step was, and how long it took.
        examples: for each phase what it was given first, for `tgate_fx.graphs`.
        device: where the denoiser ran; None before the first step.
    """

    def __init__(
        self,
        pipe: Any,
        network: Network,
        phases: Phases,
        cache: StaticCache,
        schedule: Schedule,
        guidance_scale: Any,
    ) -> None:
        self._pipe = pipe
        self._network = network
        self._cache = cache
        self._guidance_scale = guidance_scale
        family = network.family
        self._guidance = family.guidance(family.batched, family.channels_dim, schedule.after_gate)
        self._cached: list[tuple[torch.Tensor, ...]] = [()] * len(Kind)
        self._cached_for: list[tuple[int, ...]] = [()] * len(Kind)  # the shape of the latents
        self._expected: int | None = None
        self.schedule = schedule
        self.phases = phases
        self.clock = StepClock()
        self.examples: dict[Roles, Example] = {}
        self.device: torch.device | None = None
        self.steps = 0
        self.branch_sliced = False

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one call of the denoiser, with the arguments that the pipeline gave."""
        inputs = dict(zip(self._network.dispatch.parameters, args, strict=False))
        inputs.update(kwargs)
        _, latents = latents_of(inputs)
        started = self.clock.start(latents.device)
        guided = guidance_is_on(self._pipe, self._guidance_scale)
        if self.steps == 0:
            self._begin(inputs, latents, guided)
        elif self.schedule.caches:
            self._check_new_step(inputs)
        step = self.schedule.at(self.steps)
        rows = latents.shape[0]
        self.branch_sliced = guided and step.gated and self.schedule.one_branch
        if self.branch_sliced:
            inputs = self._guidance.slice_branch(inputs, rows)
            rows = self._guidance.rows_kept(rows)
        cache = self._cache_for(step, (rows, *latents.shape[1:]))
        if step.roles not in self.examples:
            self.examples[step.roles] = example(step, cache, inputs)
        graphs = self.phases.graphs
        output, captured = self.phases(step, cache, inputs)
        if any(step.keep):
            self._keep(step, captured, latents, guided)
        if self.branch_sliced:
            output = self._guidance.give_back(output)
        self.clock.stop(started, self.steps, step.phase, rows, self.phases.graphs - graphs)
        self.steps += 1
        return output

    def _begin(self, inputs: dict[str, Any], latents: torch.Tensor, guided: bool) -> None:
        """Settle at the first step where the gate is, and refuse now what could not be gated then."""
        self.device = latents.device
        self._expected = step_count(self._pipe)
        self.schedule = self.schedule.resolve(self._expected)
        gate = self.schedule.gate_step
        if guided and gate is not None and (self._expected is None or gate < self._expected):
            self._guidance.check(self._network.module, inputs, latents)
        self._guidance.begins_step(inputs)

    def _check_new_step(self, inputs: dict[str, Any]) -> None:
        """Raise `UnsupportedError` for a second call in the same step, or one beyond the last step."""
        beyond = self._expected is not None and self.steps >= self._expected
        if not self._guidance.begins_step(inputs) or beyond:
            raise UnsupportedError(
                f"{type(self._pipe).__name__} calls its denoiser several times a step: expected one call with the "
                "batch [uncond, cond]. Use it with gate_step=None."
            )

    def _cache_for(self, step: Step, shape: tuple[int, ...]) -> Cache:
        """Return what is cached of the kinds that this step reuses, for latents of this shape."""
        for role, cached_for in zip(step.roles, self._cached_for, strict=True):
            if role is Role.REUSE and cached_for != shape:
                raise StateError(
                    f"The denoiser was given latents of shape {list(shape)} at step {self.steps}, but what is cached "
                    f"is for {list(cached_for)}: expected the batch and the resolution to stay as they were. Leave "
                    "guidance on or off for the whole generation, or use gate_step=None."
                )
        pairs = zip(step.roles, self._cached, strict=True)
        return tuple([cached if role is Role.REUSE else () for role, cached in pairs])

    def _keep(self, step: Step, captured: Cache, latents: torch.Tensor, guided: bool) -> None:
        """Copy what was captured into the static cache; from a guidance batch into one branch's, if one goes on."""
        # The next step is the first gated one, and the batch is still whole.
        merge = guided and self.schedule.one_branch and not step.gated and self.schedule.at(self.steps + 1).gated
        rows = latents.shape[0]
        if merge or self.branch_sliced:
            rows = self._guidance.rows_kept(rows)
        for kind in Kind:
            if step.keep[kind]:
                self._network.check_captured(kind, captured[kind])
                self._cached[kind] = self._cache.keep(kind, captured[kind], merge=merge)
                self._cached_for[kind] = (rows, *latents.shape[1:])
