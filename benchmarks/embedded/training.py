"""One training loop for every part: seeded, resumable to the bit of its data order, with a progress bar and a plot."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

Trained = TypeVar("Trained", bound=nn.Module)

_SAVE_EVERY = 120  # seconds
_AVERAGED = 50  # steps to a point of the loss log


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: a warm-up, a constant rate, and a linear decay over the last part."""

    steps: int
    rate: float
    warmup: int = 200
    decay: float = 0.25
    weight_decay: float = 0.01
    average: float = 0.999  # of the weights kept, from step to step

    def rate_at(self, step: int) -> float:
        left = (self.steps - step) / (self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, left)


def train(module: Trained, loss_of: Callable[[int], torch.Tensor], plan: Plan, out: Path, name: str) -> Trained:
    """Train ``module`` and return the average of its weights over the last steps.

    Args:
        module: what is trained, in place.
        loss_of: the loss at a step, which draws all its randomness from a generator seeded with the step.
        plan: steps and rates.
        out: where ``<name>.checkpoint`` and ``<name>.loss.jsonl`` are kept; training resumes from there.
        name: the part's name.
    """
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(module.parameters(), plan.rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay)
    average = copy.deepcopy(module).eval().requires_grad_(False)
    checkpoint = out / f"{name}.checkpoint"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(saved["module"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["steps"]
    module.train()
    last_save = time.monotonic()
    losses: list[float] = []
    for step in tqdm(range(start, plan.steps), initial=start, total=plan.steps, desc=name, mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        _update_average(average, module, min(plan.average, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % _AVERAGED == 0 or step + 1 == plan.steps:
            _log(out / f"{name}.loss.jsonl", {"step": step + 1, "loss": sum(losses) / len(losses)})
            losses = []
        if time.monotonic() - last_save > _SAVE_EVERY or step + 1 == plan.steps:
            state = {"module": module.state_dict(), "average": average.state_dict()}
            _save({**state, "optimizer": optimizer.state_dict(), "steps": step + 1}, checkpoint)
            last_save = time.monotonic()
    return average


@torch.no_grad()
def _update_average(average: nn.Module, module: nn.Module, keep: float) -> None:
    for mean, now in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(now, 1 - keep)
    for held, own in zip(average.buffers(), module.buffers(), strict=True):
        held.copy_(own)


def _save(state: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _log(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> dict[int, float]:
    """The loss by step; where training was resumed from an earlier step, the later run's."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows}
