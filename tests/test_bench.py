"""The benchmark: who takes part, how contenders share the memory, what is computed from timings, and one short run."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tgate_fx
from tests.conftest import check_refused, run
from tgate_fx.bench import machine, plots, prepare, tables
from tgate_fx.bench.contenders import CONTENDERS, LADDER, applicable, reference_of
from tgate_fx.bench.models import MODELS
from tgate_fx.bench.race import Outcome, Race, _Runner, groups
from tgate_fx.bench.results import results
from tgate_fx.bench.worker import Finished, Ready, Timing
from tgate_fx.bench.workload import Workload
from tgate_fx.compiled.settings import CompileSettings
from tgate_fx.macs import count as macs
from tgate_fx.macs.architectures import ARCHITECTURES
from tgate_fx.schedule import Schedule

WORKLOAD = Workload("demo", 16, 5, (2,), "float32")
GEMM = {0: [100.0], 1: [100.0]}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ON_A_CPU, ON_A_GPU = (applicable(tuple(CONTENDERS), "sd15", device) for device in ("cpu", "cuda"))
SMALL_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 4096,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
COMMITTED = sorted(RESULTS.glob("bench-*.json"))


def test_every_contender_has_its_reference_and_what_it_is_measured_against() -> None:
    for contender in CONTENDERS.values():
        for other in (contender.reference, contender.ungated):
            assert other is None or other in CONTENDERS
        if contender.reference is not None:
            assert CONTENDERS[contender.reference].reference is None
    assert set(LADDER) <= set(CONTENDERS)


def test_transformers_have_no_deep_branch_and_no_callback() -> None:
    assert set(ON_A_CPU) | set(ON_A_GPU) == set(CONTENDERS)
    left = applicable(tuple(CONTENDERS), "pixart-alpha", "cpu")
    assert "gated-compiled" in left
    assert set(ON_A_CPU) - set(left) == {name for name in ON_A_CPU if "deepcache" in name or "cutoff" in name}


def test_without_upstream_the_eager_gate_is_the_reference() -> None:
    for device in ("cpu", "cuda"):
        names = applicable(tuple(CONTENDERS), "wan-1.3b", device)
        assert {"diffusers", "gated", "gated-intervals", "gated-forecast"} <= set(names)
        assert {reference_of(name, "wan-1.3b") for name in names} <= {*names, None}
    assert reference_of("gated-graphs", "wan-1.3b") == reference_of("gated-compiled", "wan-1.3b") == "gated"
    assert reference_of("gated", "wan-1.3b") is reference_of("gated-intervals", "wan-1.3b") is None
    for name, contender in CONTENDERS.items():
        assert reference_of(name, "sd15") == contender.reference


def test_a_video_is_timed_in_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Workload("wan-1.3b", None, 5, (2,), "float32").inputs
    assert (inputs["num_frames"], inputs["height"], inputs["width"]) == (81, 480, 832)
    assert inputs["prompt_embeds"].shape == (1, 512, 4096)
    with pytest.raises(tgate_fx.ArgumentError, match="its latents have one shape only, 16×21×60×104"):
        Workload("wan-1.3b", 8, 5, (2,), "float32")

    small = dataclasses.replace(ARCHITECTURES["wan-1.3b"], config=SMALL_WAN, latents=(16, 3, 8, 8))
    monkeypatch.setitem(ARCHITECTURES, "wan-1.3b", small)
    workload, latents = Workload("wan-1.3b", None, 5, (2,), "float32", batch=2), {}
    assert workload.latent_shape == (16, 3, 8, 8)
    for name in ("diffusers", "gated", "gated-intervals", "gated-forecast"):
        torch.manual_seed(0)
        pipe = MODELS["wan-1.3b"].pipeline(small.build("cpu"))
        pipe.set_progress_bar_config(disable=True)
        generate = CONTENDERS[name].prepare(pipe, workload)
        latents[name] = generate(5, 2)
        assert latents[name].shape == (2, 16, 3, 8, 8)
        if name != "diffusers":
            assert not torch.equal(latents[name], latents["diffusers"])
            assert tgate_fx.report(pipe).gate == 2
    assert not torch.equal(latents["gated-forecast"], latents["gated"])


@pytest.mark.parametrize("names", [ON_A_CPU, ON_A_GPU])
def test_what_a_contender_is_compared_with_runs_on_its_devices(names: tuple[str, ...]) -> None:
    for name in names:
        assert {CONTENDERS[name].reference, CONTENDERS[name].ungated} <= {*names, None}
    assert {LADDER[name] for name in names if name in LADDER} <= {*names, None}


@pytest.mark.slow
def test_the_ungated_run_of_compiled_contenders_captures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        outputs.append(len(graph.graph.output_node().args[0]))  # type: ignore[arg-type]
        return graph.forward

    monkeypatch.setattr(prepare, "CompileSettings", functools.partial(CompileSettings, backend))
    pipe = MODELS["demo"].pipeline(ARCHITECTURES["demo"].build("cpu"))
    pipe.set_progress_bar_config(disable=True)
    expected = WORKLOAD.latents(pipe, 3)
    # What it sets is for the whole process.
    with torch._inductor.config.patch(freezing=False), torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        generate = CONTENDERS["ungated-compiled"].prepare(pipe, WORKLOAD)
        assert torch.equal(generate(3, 1), expected)
    assert outputs == [1]


def test_groups_fit_into_memory_and_hold_the_baseline() -> None:
    names = ON_A_CPU
    made = groups(names, weights_gib=3.0, budget_gib=18.0)
    assert all(group[0] == "diffusers" for group in made)
    assert sorted(name for group in made for name in group[1:]) == sorted(set(names) - {"diffusers"})
    for group in made:
        needed = 3.0 + sum(1.0 + 3.0 * CONTENDERS[name].copies for name in group)
        assert needed <= 18.0 or len(group) == 2
    assert len(groups(names, weights_gib=0.01, budget_gib=100.0)) == 1
    assert groups(("diffusers",), 3.0, 18.0) == [["diffusers"]]


def test_groups_fit_onto_a_gpu() -> None:
    """There each process has weights of its own, and none more than once."""
    made = groups(ON_A_GPU, weights_gib=5.0, budget_gib=72.0, device="cuda")
    assert sorted(name for group in made for name in group[1:]) == sorted(set(ON_A_GPU) - {"diffusers"})
    assert len(made[0]) == 8  # with 4 GiB besides for each


def test_what_is_compared_is_in_one_group() -> None:
    pairs = [("gated-openvino", "openvino"), ("gated-compiled", "ungated-compiled")]
    for order in itertools.permutations(name for pair in pairs for name in pair):
        made = groups(order, weights_gib=3.0, budget_gib=18.0)
        assert sorted(sorted(group[1:]) for group in made) == sorted(sorted(pair) for pair in pairs)
    # Another of the same size is no reason to part them; nor is one that is compared with both but does not fit.
    made = groups(ON_A_CPU, weights_gib=3.2, budget_gib=21.2)
    for name, other in pairs:
        assert any({name, other} <= set(group) for group in made)


def outcome(name: str, group: int, steps: tuple[float, ...], *, gate: int | None = None, **extra: Any) -> Outcome:
    """One that took these seconds a step, in three rounds that differ a little."""
    timings = [Timing(noise * sum(steps), tuple(noise * step for step in steps)) for noise in (1.0, 1.1, 0.9)]
    # Before its first step a pipeline does more: no step of a phase.
    timings = [Timing(each.seconds, (each.steps[0] + 5.0, *each.steps[1:])) for each in timings]
    ready = Ready(np.zeros(1), first_seconds=30.0, second_seconds=10.0, peak_gib=3.0, graphs=1)
    return Outcome(name, group, ready, timings={gate: timings}, finished=Finished(2.0, 2, 0), **extra)


def test_what_is_computed_from_timings() -> None:
    """Two groups, the machine being half as fast while the second one ran."""
    outcomes = [
        outcome("diffusers", 0, (1.0,) * 5),
        outcome("ungated-compiled", 0, (0.8,) * 5),
        outcome("diffusers", 1, (2.0,) * 5),
        outcome("gated-compiled", 1, (1.6, 1.6, 0.8, 0.8, 0.8), gate=2, error=1e-6),
        Outcome("openvino", 1, failure="it broke"),
    ]
    measured = results(Race(outcomes, {0: [100.0, 120.0, 120.0], 1: [60.0, 50.0, 70.0]}), WORKLOAD, 3)
    assert measured["gemm_gflops"] == 85.0
    assert measured["failed"] == {"openvino": "it broke"}
    assert [row["median"] for row in measured["rows"]] == sorted(
        (row["median"] for row in measured["rows"]), reverse=True
    )
    row = next(row for row in measured["rows"] if row["contender"] == "gated-compiled")
    assert row["median"] == pytest.approx(5.6)
    assert row["spread"] == pytest.approx([0.9 * 5.6, 1.1 * 5.6])
    assert row["speed_up"] == pytest.approx(10 / 5.6)
    assert row["step_seconds"] == pytest.approx({"pre-gate": 1.6, "post-gate": 0.8})
    assert row["compile_seconds"] == pytest.approx(20)
    assert (row["peak_gib"], row["running_gib"]) == (3.0, 2.0)
    assert (row["graphs"], row["recompiles"]) == (2, 1)
    assert row["memory_over_ungated"] == 0
    assert row["same_group"] is False
    # Against the one with the same settings, which ran on the machine when it was twice as fast.
    assert row["speed_up_over_ungated"] == pytest.approx((10 / 5.6) / (5 / 4))
    assert row["share_of_limit"] == pytest.approx(row["speed_up_over_ungated"] / row["limit"])
    assert 1 < row["limit"] < 2
    assert row["capture_cost"] == pytest.approx(0, abs=1e-9)
    frozen = next(row for row in measured["rows"] if row["contender"] == "ungated-compiled")
    assert frozen["speed_up"] == pytest.approx(1.25)
    # A step after the gate computes one branch, without cross-attention: less than half the multiply-adds.
    rates = row["gflops"]
    pre_gate = 2 * macs.step_costs(macs.Generation("demo", 5, Schedule(2), size=16))[1].total
    assert rates["pre-gate"] == pytest.approx(pre_gate / 1.6 / 1e9)
    assert row["share_of_gemm"] == pytest.approx({phase: rate / 60.0 for phase, rate in rates.items()})
    assert rates["post-gate"] * 0.8 < 0.5 * rates["pre-gate"] * 1.6
    # Of a batch of four a step computes as much again for each.
    of_four = results(Race([outcomes[0]], GEMM), dataclasses.replace(WORKLOAD, batch=4), 3)["rows"][0]
    of_one = results(Race([outcomes[0]], GEMM), WORKLOAD, 3)["rows"][0]
    assert of_four["gflops"]["pre-gate"] == pytest.approx(4 * of_one["gflops"]["pre-gate"])


def test_a_batch_is_called_so_and_a_race_that_failed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = [outcome("diffusers", 0, (1.0,) * 5)]

    def ran(names: tuple[str, ...], workload: Workload, rounds: int, keep: Callable[[Race], None]) -> None:
        keep(Race(outcomes, GEMM))

    monkeypatch.setattr("tgate_fx.bench.race.race", ran)
    options = ("--only", "gated-compiled", "--steps", "5", "--gate-step", "2", "--batch", "4")
    assert run(monkeypatch, "bench", *options) == 0
    assert "seconds of 4 images" in " ".join(capsys.readouterr().out.split())
    outcomes = [Outcome("diffusers", 0, failure="it broke")]
    if importlib.util.find_spec("matplotlib") is not None:
        options = (*options, "--plot", str(tmp_path / "x.png"))
    assert run(monkeypatch, "bench", *options) == 2
    said = capsys.readouterr()
    assert "not timed: diffusers: it broke" in said.out
    assert "no contender was timed" in said.err


def test_the_table_fits_into_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcomes = [
        outcome(name, 0, (1.0,) * 5, gate=2 if contender.takes_gate else None) for name, contender in CONTENDERS.items()
    ]
    measured = results(Race(outcomes, GEMM), WORKLOAD, 3)
    tables.show(measured)
    tables.show_ladder(measured)
    said = capsys.readouterr().out
    for name in CONTENDERS:
        assert name in said
    assert "…" not in said
    assert "Where the speed-up comes from: gate 2" in said


def test_each_rung_is_set_against_the_one_it_adds_to(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiling is over the plain gate, whatever else is on the ladder."""
    seconds = {
        "diffusers": 1.0,
        "cutoff": 0.8,
        "gated": 0.5,
        "gated-intervals": 0.4,
        "gated-deepcache": 0.1,
        "gated-compiled": 0.25,
        "gated-deepcache-compiled": 0.05,
    }
    outcomes = [
        outcome(name, 0, (each,) * 5, gate=2 if CONTENDERS[name].takes_gate else None) for name, each in seconds.items()
    ]
    tables.show_ladder(results(Race(outcomes, GEMM), WORKLOAD, 3))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    said = {words[0]: words[2:] for words in lines if words and words[0] in seconds}
    assert said == {
        "diffusers": ["1.00x"],
        "cutoff": ["1.25x", "diffusers", "1.25x"],
        "gated": ["1.60x", "cutoff", "2.00x"],
        "gated-intervals": ["1.25x", "gated", "2.50x"],
        "gated-deepcache": ["5.00x", "gated", "10.00x"],
        "gated-compiled": ["2.00x", "gated", "4.00x"],
        "gated-deepcache-compiled": ["5.00x", "gated-compiled", "20.00x"],
    }


@pytest.mark.parametrize(
    ("name", "latents", "failure"),
    [
        ("gated", [1.0, 2.0], None),
        ("gated", [1.0, 2.0 + 1e-6], "5.0e-07 away from those of tgate"),  # eager ones must be equal
        ("gated-compiled", [1.0, 2.0 + 1e-6], None),
        ("gated-compiled", [1.0, 2.1], "5.0e-02 away from those of tgate"),
        ("gated-compiled", [1.0, float("nan")], "nan away from those of tgate"),
        ("openvino", [1.0, 2.0], "its reference, diffusers, failed"),
        ("deepcache", [7.0, 7.0], None),
    ],
)
def test_who_disagrees_with_its_reference_is_out(name: str, latents: list[float], failure: str | None) -> None:
    ready = Ready(np.array(latents), first_seconds=2.0, second_seconds=1.0, peak_gib=1.0, graphs=0)
    runner = _Runner(Outcome(name, 0, ready), WORKLOAD, None)  # type: ignore[arg-type]
    runner.check({"tgate": np.array([1.0, 2.0])}, tolerance=1e-3)
    assert (runner.outcome.failure or "").endswith(failure or "")
    assert (runner.outcome.failure is None) is (failure is None)


def test_a_process_that_has_ended_is_one_that_failed() -> None:
    here, there = multiprocessing.Pipe()
    runner = _Runner(Outcome("gated", 0), WORKLOAD, here)
    there.close()
    runner.run(2)
    assert runner.outcome.failure == "its process ended (out of memory?)"
    assert runner.outcome.timings == {}


def test_the_most_memory_begins_anew() -> None:
    machine.forget_peak("cpu")
    before = machine.peak_gib("cpu")
    held = np.ones(2**27)  # a GiB
    assert 0.9 < machine.peak_gib("cpu") - before < 1.1
    del held
    machine.forget_peak("cpu")
    assert abs(machine.peak_gib("cpu") - before) < 0.1


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, in order."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept: list[Any] = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    return kept


def test_every_row_has_a_bar_at_its_own_label(tmp_path: Path, figures: list[Any]) -> None:
    """There is a row of the baseline in each group."""
    outcomes = [
        outcome("diffusers", 0, (1.0,) * 5),
        outcome("gated", 0, (0.5,) * 5, gate=2),
        outcome("diffusers", 1, (1.1,) * 5),
        outcome("tgate", 1, (0.6,) * 5, gate=2),
    ]
    measured = results(Race(outcomes, GEMM), WORKLOAD, 3)
    plots.plot(measured, tmp_path / "plot.png")
    bars = figures[0].axes[0]
    labels = {
        round(tick): text.get_text() for tick, text in zip(bars.get_yticks(), bars.get_yticklabels(), strict=True)
    }
    drawn = [(labels[round(bar.get_y() + bar.get_height() / 2)], bar.get_width()) for bar in bars.containers[-1]]
    assert drawn == [
        (f"{plots.label(row)}  ({number})", row["median"]) for number, row in enumerate(measured["rows"], 1)
    ]


def are_apart(figure: Any, texts: list[Any]) -> bool:
    """Whether no text covers another, or leaves the figure."""
    text_class = pytest.importorskip("matplotlib.text").Text
    figure.canvas.draw()
    # As plain texts: the extent of an annotation includes the line to its point.
    boxes = [text_class.get_window_extent(text) for text in texts]
    inside = all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    return inside and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_plot_of_committed_results_is_readable(file: Path, tmp_path: Path, figures: list[Any]) -> None:
    measured = json.loads(file.read_text())
    plots.plot(measured, tmp_path / "plot.png")
    (figure,) = figures
    bars, pareto = figure.axes
    labels = [text.get_text() for text in bars.get_yticklabels()]
    assert [label.rsplit("  (")[0] for label in labels] == [plots.label(row) for row in measured["rows"]]
    assert len({plots.label(row) for row in measured["rows"]}) == len(measured["rows"])
    assert {text.get_text() for text in pareto.texts} == {str(number) for number in range(1, len(labels) + 1)}
    assert are_apart(figure, bars.get_yticklabels())
    assert are_apart(figure, bars.texts)
    assert are_apart(figure, pareto.texts)


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_short_plot_has_at_most_eight_bars(file: Path, tmp_path: Path, figures: list[Any]) -> None:
    measured = json.loads(file.read_text())
    plots.plot_headline(measured, tmp_path / "plot.png")
    (figure,) = figures
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    widths = [bar.get_width() for bar in axes.containers[0]]
    assert 5 <= len(widths) <= 8
    assert len(set(labels)) == len(labels) == len(widths)
    assert widths == [row["speed_up"] for row in plots.headline(measured)]
    assert are_apart(figure, [*axes.get_yticklabels(), *axes.texts])


def test_the_short_plot_compares_variants_at_one_gate() -> None:
    rows = plots.headline(json.loads((RESULTS / "bench-sd15.json").read_text()))
    assert [row["contender"] for row in rows] == [name for name in plots.HEADLINE if name in ON_A_CPU]
    assert {row["gate"] for row in rows} == {None, 10}
    assert set(plots.HEADLINE) <= set(CONTENDERS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "nobody"), "--only nobody: expected of diffusers"),
        (("--only", "gated", "--ladder"), "and no --ladder"),
        (("--only", "deepcache", "--arch", "pixart-alpha"), "--only deepcache: expected what there is for --arch"),
        (("--gate-step", "30"), "--gate-step 30"),
        (("--arch", "sd4"), "'sd4' is not one of"),
        (("--only", "gated-graphs"), "--only gated-graphs: expected what there is for --arch demo --device cpu"),
        (("--only", "openvino", "--device", "cuda"), "expected what there is for --arch demo --device cuda"),
        pytest.param(
            ("--device", "cuda"),
            "torch finds no GPU with CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("--json", "no/such/folder/x.json"), "there is no folder"),
        (("--plot", "x.txt"), "x.txt: expected a name that ends with .png or .pdf or .svg"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(monkeypatch, capsys, message, "bench", *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--ladder",), True),
        (tuple(word for name in LADDER if name in ON_A_CPU for word in ("--only", name)), True),
        (("--only", "gated"), False),
    ],
)
def test_the_ladder_is_shown_where_all_of_it_ran(
    options: tuple[str, ...], expected: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(names: tuple[str, ...], workload: Workload, rounds: int, keep: Callable[[Race], None]) -> None:
        with_baseline = dict.fromkeys(("diffusers", *names))
        gates = {name: workload.gates[0] if CONTENDERS[name].takes_gate else None for name in with_baseline}
        keep(Race([outcome(name, 0, (1.0,) * 25, gate=gate) for name, gate in gates.items()], GEMM))

    monkeypatch.setattr("tgate_fx.bench.race.race", ran)
    assert run(monkeypatch, "bench", *options, "--gate-step", "10") == 0
    assert ("Where the speed-up comes from: gate 10" in capsys.readouterr().out) is expected


@pytest.mark.slow
def test_a_short_run_checks_times_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")  # which README's command for the tests does not install
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--size", "8", "--steps", "4", "--gate-step", "2", "--rounds", "1", "--only", "gated", "--only", "tgate")
    assert run(monkeypatch, "bench", *options, "--json", out, "--plot", picture) == 0
    measured = json.loads(out.read_text())
    assert measured["failed"] == {}
    rows = {row["contender"]: row for row in measured["rows"]}
    assert set(rows) == {"diffusers", "gated", "tgate"}
    assert rows["gated"]["error"] == 0
    assert rows["gated"]["reference"] == "tgate"
    assert rows["gated"]["gate"] == 2
    assert rows["diffusers"]["speed_up"] == 1
    assert len(rows["gated"]["seconds"]) == 1
    assert picture.stat().st_size > 1000
    assert "tgate" in capsys.readouterr().out
