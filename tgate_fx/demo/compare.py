"""Generate the same pictures ungated and with several gates, and show them side by side with their times.

Each gate is shown with T-GATE's rule, the mean of both branches in the cache, and with the one that keeps the prompt:
the conditional branch in the cache, and guidance that goes on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import tgate_fx

from ..errors import ArgumentError
from . import load, tokenizer
from .grid import grid

_MEAN: dict[str, Any] = {}
_GUIDED: dict[str, Any] = {"cache_weight": 1.0, "after_gate": "guided"}


@dataclass
class Column:
    """What was generated with one gate and rule, over all prompts.

    Attributes:
        gate: the gate step, None for ungated.
        rule: further keywords of the pipeline's call.
        pictures: one for each prompt.
        seconds: the denoiser's seconds for each picture.
        phases: the seconds of single steps, by phase.
    """

    gate: int | float | None
    rule: dict[str, Any] = field(default_factory=dict)
    pictures: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the column is called."""
        return "ungated" if self.gate is None else f"gate {self.gate}, {'guided' if self.rule else 'mean'}"


def compare(
    prompts: Sequence[str], gates: Sequence[int | float | None], *, steps: int, seed: int, out: Path, compiled: bool
) -> None:
    """Generate every prompt ungated and with each gate and rule, in turn; write the grid to ``out``, print the times.

    Raises:
        ArgumentError: a gate that is none, or a prompt with words that the embedded pipeline does not know.
    """
    words = tokenizer()
    for prompt in prompts:
        _check_words(words, prompt)
    pipe = load()
    if compiled:
        tgate_fx.compile(pipe, gate_step=None)
    else:
        tgate_fx.gate(pipe, gate_step=None)
    console = Console()
    columns = [Column(None), *[Column(gate, rule) for gate in gates for rule in (_MEAN, _GUIDED)]]
    console.print("Warming up: " + ("compiling both phases" if compiled else "the first steps are slower"))
    _generate(pipe, prompts[0], Column(1), steps=2, seed=seed, title="warm-up")
    for row, prompt in enumerate(prompts):
        for column in columns:
            title = f"{column.title}: {prompt}"
            picture = _generate(pipe, prompt, column, steps=steps, seed=seed + row, title=title)
            column.pictures.append(picture)
            _time(column, tgate_fx.report(pipe).steps)
    reference = statistics.median(columns[0].seconds)
    headings = []
    for column in columns:
        seconds = statistics.median(column.seconds)
        headings.append(f"{column.title}\n{seconds:.2f} s, {reference / seconds:.2f}x")
    grid([column.pictures for column in columns], headings, list(prompts)).save(out)
    console.print(_table(columns, reference))
    console.print(f"{out}: rows are prompts; columns are {'; '.join(column.title for column in columns)}.")


def _check_words(tokenizer: Any, prompt: str) -> None:
    unknown = unknown_words(tokenizer, prompt)
    if unknown or not prompt.strip():
        raise ArgumentError(
            f"The prompt {prompt!r} has words that the embedded pipeline was not trained on ({', '.join(unknown)}): "
            "expected such as 'a small red circle left of a large blue star on a striped pink background'."
        )


def _generate(pipe: Any, prompt: str, column: Column, *, steps: int, seed: int, title: str) -> Image.Image:
    pipe.set_progress_bar_config(desc=title[:60], leave=False)
    generator = torch.Generator().manual_seed(seed)
    rule = {"gate_step": column.gate, **column.rule}
    picture: Image.Image = pipe(prompt, num_inference_steps=steps, generator=generator, **rule).images[0]
    return picture


def _time(column: Column, steps: Sequence[tgate_fx.StepReport]) -> None:
    column.seconds.append(sum(step.seconds for step in steps))
    for step in steps:
        column.phases.setdefault(step.phase, []).append(step.seconds)


def _table(columns: Sequence[Column], reference: float) -> Table:
    table = Table(title="The denoiser's time, median over the prompts")
    for heading in ("", "s a picture", "speed-up", "pre-gate step", "post-gate step"):
        table.add_column(heading, justify="right")
    for column in columns:
        seconds = statistics.median(column.seconds)
        medians = [statistics.median(column.phases.get(phase, [float("nan")])) for phase in ("pre-gate", "post-gate")]
        cells = [f"{1000 * median:.1f} ms" if median == median else "-" for median in medians]
        table.add_row(column.title, f"{seconds:.3f}", f"{reference / seconds:.2f}x", *cells)
    return table


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Return the words of a prompt that are no tokens of their own: the pipeline was never trained on them."""
    return [word for word in prompt.split() if len(tokenizer.tokenize(word.strip(","))) > 1]
