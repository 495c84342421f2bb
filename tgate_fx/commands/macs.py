"""`tgate-fx macs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..deepcache import DeepCache
from ..macs.architectures import ARCHITECTURES
from ..schedule import AFTER_GATE, Schedule
from .options import GateStep, OutFile, check_gated


@click.command()
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), help="Count one schedule of this model instead.")
@click.option(
    "--limits", "count_limits", is_flag=True, help="Count the most that a gate at 40% of the steps gains, by model."
)
@click.option("--steps", type=click.IntRange(min=1), default=25, show_default=True, help="Steps of an image.")
@click.option("--gate-step", type=GateStep(), default=10, show_default=True, help="First gated step, or none.")
@click.option("--sp-interval", default=1, show_default=True, help="Of self-attention, before the gate.")
@click.option("--fi-interval", default=1, show_default=True, help="Of self-attention, from the gate on.")
@click.option(
    "--warm-up", default=0, show_default=True, help="Last step up to which self-attention is always computed."
)
@click.option("--deepcache", type=(int, int), metavar="INTERVAL BRANCH", help="Skip the UNet's deep branch.")
@click.option("--after-gate", type=click.Choice(AFTER_GATE), default="negative", show_default=True)
@click.option(
    "--guided/--unguided",
    default=None,
    help="With classifier-free guidance before the gate, or without.  [default: as the model's pipeline]",
)
@click.option("--size", type=click.IntRange(min=8), help="Latents per side, if not the model's own.")
@click.option("--json", "json_out", type=OutFile(), help="Write the rows to this file too.")
def macs(
    arch: str | None,
    count_limits: bool,
    steps: int,
    gate_step: int | float | None,
    sp_interval: int,
    fi_interval: int,
    warm_up: int,
    deepcache: tuple[int, int] | None,
    after_gate: str,
    guided: bool | None,
    size: int | None,
    json_out: Path | None,
) -> None:
    """Count multiply-adds and parameters, without weights: T-GATE's published table, or one schedule of one model.

    With --arch the other options say what is counted: a step of each phase, and the whole image. With --limits it is
    the most that a gate can gain with every model, or with that one.
    """
    from ..macs import limits as macs_limits
    from ..macs import table as macs_table
    from ..macs.count import Generation

    _check_counted("--limits" if count_limits else "no --arch", ignores=count_limits or arch is None)
    rows: Any
    if count_limits:
        rows = macs_limits.limits(ARCHITECTURES if arch is None else [arch])
        macs_limits.show(rows["models"])
    elif arch is None:
        rows = macs_table.published_rows()
        macs_table.show(rows)
    else:
        check_gated(gate_step, steps)
        deep = None if deepcache is None else DeepCache(*deepcache)
        interval, branch = (None, None) if deep is None else (deep.interval, deep.branch)
        schedule = Schedule(gate_step, sp_interval, fi_interval, warm_up, interval, after_gate=after_gate)
        has_branches = ARCHITECTURES[arch].guided if guided is None else guided
        rows = macs_table.schedule_rows(Generation(arch, steps, schedule, has_branches, branch, size))
        macs_table.show(rows)
    if json_out is not None:
        json_out.write_text(json.dumps(rows, indent=1) + "\n")


def _check_counted(how: str, *, ignores: bool) -> None:
    """Raise `click.UsageError` if options of a schedule were given where they would be ignored."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("arch", "count_limits", "json_out")
        and context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
    ]
    if ignores and given:
        raise click.UsageError(f"{', '.join(given)} with {how}: expected --arch alone, whose schedule these describe.")
