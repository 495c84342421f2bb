"""Multiply-adds and parameters, against T-GATE's published table and against figures worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import run
from tgate_fx.macs import count as macs
from tgate_fx.macs.architectures import ARCHITECTURES, Architecture
from tgate_fx.macs.count import Cost, Generation, image_cost, parameters, phase_cost, step_costs
from tgate_fx.macs.table import PUBLISHED, published_rows, show
from tgate_fx.roles import Role, Roles
from tgate_fx.schedule import Schedule


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    return published_rows()


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PUBLISHED)))
def test_every_published_cell_is_reproduced(rows: list[dict[str, float]], index: int) -> None:
    row = rows[index]
    assert row["macs"] == pytest.approx(row["page_macs"], rel=0.001)
    if row["page_params"] is not None:
        assert row["params"] == pytest.approx(row["page_params"], rel=0.002)


# The most that a gated run can gain, attention counted too: figures that were counted apart from this code.
@pytest.mark.parametrize(
    ("arch", "gate", "limit"),
    [
        ("sd15", 5, 1.712),
        ("sd15", 10, 1.453),
        *[
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("sd21", 5, 1.703),
                ("sdxl", 5, 1.763),
                ("pixart-alpha", 8, 1.603),
                ("sd21", 10, 1.449),
                ("sdxl", 10, 1.481),
                ("pixart-alpha", 10, 1.497),
            )
        ],
    ],
)
def test_limits(arch: str, gate: int, limit: float) -> None:
    plain, gated = (image_cost(Generation(arch, 25, Schedule(step))) for step in (None, gate))
    assert plain.total / gated.total == pytest.approx(limit, abs=0.0006)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_parameters_are_those_of_the_published_models(arch: str) -> None:
    expected = {
        "demo": (9_064_612, 8_268_772),
        "sd15": (859_520_964, 815_558_404),
        "sd21": (865_910_724, 815_558_404),
        "sdxl": (2_567_463_684, 2_021_793_284),
        "sdxl-lcm": (2_567_545_604, 2_021_875_204),
        "pixart-alpha": (611_349_152, 462_584_480),
        "pixart-sigma": (610_856_096, 462_091_424),
    }
    assert parameters(arch) == expected[arch]


def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a UNet of one attention block, whose multiply-adds can be worked out by hand."""
    config = {
        "sample_size": 8,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    monkeypatch.setitem(macs.ARCHITECTURES, "small", Architecture("small", "UNet2DConditionModel", config, 7, 16))
    return "small"


def test_a_block_s_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = small(monkeypatch)
    tokens, width, text, text_width = 8 * 8, 32, 7, 16
    live, cached = (phase_cost(arch, Roles(role), None, 1) for role in (Role.LIVE, Role.REUSE))
    # What cross-attention takes: queries and output on the image's tokens, keys and values on the text's.
    layers = 2 * tokens * width * width + 2 * text * text_width * width
    assert live.layers - cached.layers == layers
    assert live.attention - cached.attention == 2 * tokens * text * width
    assert cached.attention == 2 * tokens * tokens * width  # self-attention's
    no_self = phase_cost(arch, Roles(Role.REUSE, Role.REUSE), None, 1)
    assert cached.layers - no_self.layers == 4 * tokens * width * width
    assert no_self.attention == 0
    assert phase_cost(arch, Roles(), None, 3) == Cost(3 * live.layers, 3 * live.attention)


def test_steps_follow_the_schedule_and_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = small(monkeypatch)
    live, cached = (phase_cost(arch, Roles(role), None, 1) for role in (Role.LIVE, Role.REUSE))
    twice = live.plus(live)
    assert step_costs(Generation(arch, 4, Schedule(0.5))) == [twice, twice, cached, cached]
    assert step_costs(Generation(arch, 3, Schedule(1), guided=False)) == [live, cached, cached]
    both = phase_cost(arch, Roles(Role.REUSE), None, 2)
    assert step_costs(Generation(arch, 2, Schedule(1, after_gate="both"))) == [twice, both]


def test_the_small_model_runs_on_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs that are counted with are those that a denoiser takes on a real device."""
    architecture = macs.ARCHITECTURES[small(monkeypatch)]
    output = architecture.build("cpu")(**architecture.inputs(2, device="cpu")).sample
    assert output.shape == (2, 4, 8, 8)
    assert torch.isfinite(output).all()


@pytest.mark.slow
def test_the_command_writes_the_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "macs", "--json", tmp_path / "macs.json") == 0
    said = capsys.readouterr().out
    assert "16.931T" in said
    assert "1.712x" in said
    written = json.loads((tmp_path / "macs.json").read_text())
    assert len(written) == len(PUBLISHED)
    assert set(written[0]) == {
        *("model", "variant", "macs", "params", "page_macs", "page_params", "macs_with_attention", "limit")
    }


@pytest.mark.slow
def test_the_command_counts_one_schedule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "macs", "--arch", "sdxl", "--gate-step", 5, "--deepcache", 3, 1) == 0
    said = capsys.readouterr().out
    for part in ("a step: pre-gate, shallow", "0.256T", "a step: post-gate, shallow", "0.128T", "the image", "39.199T"):
        assert part in said


def test_rows_fit_into_80_columns_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        {"model": "SDXL", "variant": line.variant, "macs": 149.4e12, "params": 2.57e9, "macs_with_attention": 168.1e12}
        | {"limit": 1.234, "page_macs": 149.4e12, "page_params": 2.57e9}
        for line in PUBLISHED
    ]
    show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[2:28].strip() for line in lines[3:]] == [row["variant"] for row in rows]
    assert all(line.rstrip().endswith("1.234x") for line in lines[3:])


def test_python_m_does_what_the_command_does() -> None:
    module = [sys.executable, "-m", "tgate_fx", "macs", "--help"]
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'tgate-fx'; from tgate_fx.commands import main; main()"]
    said = [
        subprocess.run(each, capture_output=True, text=True, check=True).stdout
        for each in (module, command + module[3:])
    ]
    assert "Count multiply-adds" in said[0]
    assert said[0].splitlines()[1:] == said[1].splitlines()[1:]


def test_without_a_gated_step_all_parameters_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    for gate, read in ((25, 859_520_964), (24, 815_558_404)):
        assert run(monkeypatch, "macs", "--arch", "sd15", "--gate-step", gate, "--json", out) == 0
        rows = json.loads(out.read_text())
        assert [row["params"] for row in rows if row["variant"] == "the image"] == [read]
        assert all({"model", "macs", "params", "page_macs", "page_params"} <= row.keys() for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "flux"), "'flux' is not one of"),
        (("--arch", "sd15", "--gate-step", "soon"), "'soon': expected a step"),
        (("--arch", "sd15", "--sp-interval", "0"), "sp_interval=0"),
        (("--arch", "pixart-alpha", "--deepcache", "3", "1"), "expected a UNet for DeepCache"),
        (("--arch", "sd15", "--deepcache", "0", "1"), "interval=0"),
        (("--arch", "sd15", "--deepcache", "3", "-1"), "branch=-1"),
        (("--json", "no/such/folder/x.json"), "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "macs", *options) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
