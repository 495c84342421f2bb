"""Tables of what `benchmarks.embedded.quality` measured, as a page."""

from __future__ import annotations

from typing import Any

from .quality_points import RULES

Row = dict[str, Any]

_HEAD = """# Quality of the embedded pipeline after the gate

Written by `python -m benchmarks.embedded.quality report` from [these results](quality.json), {done} of {all} points.
Weights {weights}, {steps} steps, {pictures} pictures a point, of held-out captions and from the same noise. What the
rules are: [points](../embedded/quality_points.py).

Rows a step are what the denoiser computes, over all steps: 2.00 is ungated. "All right" is the share of the captions
with no attribute wrong. "Lost" is how far the share of right attributes is below that of the ungated pictures: it is
taken picture by picture, from the same captions and noise, so that its error is smaller than those of the two shares.
dB is the peak signal-to-noise ratio to the ungated picture, and FD the Fréchet distance to {drawings} held-out drawings
on the classifier's features ({floor:.0f} for other drawings). Errors are standard errors.
"""
_COLUMNS = (
    "| rule | gate | rows a step | attributes right | lost | all right | dB | FD |\n|---|---|---|---|---|---|---|---|\n"
)


def page(result: dict[str, Any], points: int) -> str:
    """Return the page; ``points`` is how many there are in all."""
    rows = result["points"]
    settings = list(dict.fromkeys((row["scheduler"], row["guidance_scale"]) for row in rows if row["rule"] in RULES))
    parts = [
        _HEAD.format(
            done=len(rows),
            all=points,
            weights=result["weights"],
            steps=result["steps"],
            pictures=rows[0]["pictures"],
            drawings=result["classifier"]["drawings"],
            floor=result["frechet_floor"],
        )
    ]
    for scheduler, scale in settings:
        here = [row for row in rows if (row["scheduler"], row["guidance_scale"]) == (scheduler, scale)]
        here += [row for row in rows if row["rule"] == "unguided" and scale == 7.5 and row["scheduler"] == scheduler]
        here.sort(key=lambda row: (_place(row["rule"]), -row["rows"]))
        parts.append(f"## {scheduler}, guidance scale {scale:g}\n\n{_COLUMNS}" + "\n".join(map(_line, here)) + "\n")
    return "\n".join(parts)


def _place(rule: str) -> int:
    return 1 + list(RULES).index(rule) if rule in RULES else 0


def _line(row: Row) -> str:
    gate = "" if row["gate"] is None else row["gate"]
    if row["opened"] is not None:
        gate = f"auto: {row['opened']:.1f}"
    psnr = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
    lost = "" if row["lost"] is None else f"{row['lost']:.4f} ± {row['lost_standard_error']:.4f}"
    return (
        f"| {row['rule']} | {gate} | {row['rows']:.2f} | {row['accuracy']:.4f} ± {row['standard_error']:.4f} "
        f"| {lost} | {row['all_right']:.3f} | {psnr} | {row['frechet']:.0f} |"
    )
