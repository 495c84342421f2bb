"""Multiply-adds and parameters, against T-GATE's published table and against figures worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import check_refused, run
from tgate_fx.errors import ArgumentError
from tgate_fx.families import FAMILIES
from tgate_fx.macs import count as macs
from tgate_fx.macs.architectures import ARCHITECTURES, Architecture
from tgate_fx.macs.count import Cost, Generation, calls_of_a_step, image_cost, parameters, phase_cost, step_costs
from tgate_fx.macs.limits import limit_row
from tgate_fx.macs.limits import show as show_limits
from tgate_fx.macs.table import PUBLISHED, published_rows, show
from tgate_fx.roles import Role, Roles
from tgate_fx.schedule import Schedule

LIMITS = Path(__file__).parent.parent / "benchmarks" / "results" / "macs-limits.json"


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


EXACT = {
    "demo": (9_064_612, 8_268_772),
    "sd15": (859_520_964, 815_558_404),
    "sd21": (865_910_724, 815_558_404),
    "sdxl": (2_567_463_684, 2_021_793_284),
    "sdxl-lcm": (2_567_545_604, 2_021_875_204),
    "pixart-alpha": (611_349_152, 462_584_480),
    "pixart-sigma": (610_856_096, 462_091_424),
}


@pytest.mark.parametrize("arch", EXACT)
def test_parameters_are_those_of_the_published_models(arch: str) -> None:
    assert parameters(arch) == EXACT[arch]


# Parameters of the denoiser in billions as they are published, and by how much of that the count may differ: by what
# was rounded away, if nothing else is said. A number of GB is the size of a file of weights on the Hugging Face Hub,
# divided by the bytes of a parameter. The rest is what makers say in their papers and on their models' pages.
PUBLISHED_PARAMETERS = {
    "sana": (1.6, 0.01),
    "sana-sprint": (1.6, 0.01),
    "hunyuandit": (1.5, 0.01),
    "kandinsky3": (3.0, 0.02),
    # Its file has the weights of the queries once for both attentions of a block.
    "lumina-next": (6.51 / 4 + 24 * 2304**2 / 1e9, 0.001),
    "dreamlite": (0.39, 0.01),
    "sd-x4-upscaler": (3.53 / 4 - 0.354 - 0.055, 0.01),  # without the text encoder and the VAE of the same file
    "wan-1.3b": (5.68 / 4, 0.002),
    "wan-14b": (28.6 / 2, 0.002),
    "wan-i2v-14b": (32.8 / 2, 0.002),
    "wan-5b": (10 / 2, 0.01),
    "wan-vace-14b": (34.7 / 2, 0.002),
    "wan-animate-14b": (69.1 / 4, 0.001),
    "skyreels-14b": (14, 0.03),
    "chronoedit-14b": (32.8 / 2, 0.002),  # Wan's, of which it is made
    "helios-14b": (14, 0.03),
    "anyflow-1.3b": (5.68 / 4, 0.003),  # Wan's, of which it is made, with a second embedding of the time
    "ltx-2b": (2, 0.04),
    "ltx-2": (19, 0.01),
    "sana-video": (2, 0.03),
    "sana-wm": (2.6, 0.03),
    "cosmos1-7b": (7, 0.04),
    "cosmos2-2b": (2, 0.03),
    "kandinsky5-lite": (2, 0.01),
    "kandinsky6-pro": (56 * 2**30 / 2e9, 0.005),
    "latte": (4.23 / 4, 0.002),
    "allegro": (2.8, 0.02),
    "animatediff": (0.8595 + 0.417, 0.002),  # SD-1.5 and the module of motion
    "modelscope": (5.65 / 4, 0.002),
    "i2vgen-xl": (5.68 / 4, 0.002),
    "svd": (1.521, 0.005),
    "stable-audio-open": (1.057, 0.001),
    "stable-audio-3": (1.4, 0.04),
    "audioldm2": (0.346, 0.005),
    "ace-step": (2, 0.22),  # counted with the encoders of text, lyrics and timbre
    "longcat-audio": (1, 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(EXACT)))
def test_parameters_are_about_those_of_the_published_models(arch: str) -> None:
    published, tolerance = PUBLISHED_PARAMETERS[arch]
    assert parameters(arch)[0] / 1e9 == pytest.approx(published, rel=tolerance)


def test_every_denoiser_class_has_an_architecture() -> None:
    counted = {architecture.cls for architecture in ARCHITECTURES.values()}
    # A UNet and its control, of many sizes; a model of tokens, without a time.
    assert set(FAMILIES) - counted == {"UNetControlNetXSModel", "UVit2DModel"}
    assert counted <= set(FAMILIES)


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


def small_video(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model of videos with one block, whose guidance is two calls a step."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 40,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    architecture = Architecture("small", "WanTransformer3DModel", config, 7, 16, latents=(4, 3, 8, 8))
    monkeypatch.setitem(macs.ARCHITECTURES, "small-video", architecture)
    return "small-video"


def test_a_video_model_s_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = small_video(monkeypatch)
    tokens, width, text = 3 * 4 * 4, 24, 7
    patches = 2 * tokens * (4 * 2 * 2) * width  # in and out
    time = 32 * width + width * width + width * 6 * width
    texts = text * (16 * width + width * width)
    block = 4 * tokens * width * width + 2 * tokens * width * 40  # self-attention and feed-forward
    cross = Cost(2 * tokens * width * width + 2 * text * width * width, 2 * tokens * text * width)
    cached = Cost(patches + time + texts + block, 2 * tokens * tokens * width)
    assert phase_cost(arch, Roles(Role.REUSE), None, 1) == cached
    assert phase_cost(arch, Roles(Role.CAPTURE), None, 1) == cached.plus(cross)
    assert calls_of_a_step(arch) == 2
    twice = cached.plus(cross).times(2)
    assert step_costs(Generation(arch, 5, Schedule(0.4))) == [twice, twice, cached, cached, cached]
    row = limit_row(arch)
    assert row["cross_attention"] == cross.total / cached.plus(cross).total
    assert row["limit"] == pytest.approx(5 * twice.total / (2 * twice.total + 3 * cached.total))


def test_a_video_is_counted_in_its_own_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = small_video(monkeypatch)
    with pytest.raises(ArgumentError, match=r"size=8 was given for small: .* 4×3×8×8\."):
        step_costs(Generation(arch, 1, Schedule(None), size=8))


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


def test_a_model_without_guidance_is_counted_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    published = next(line for line in PUBLISHED if line.variant == "LCM, 4 steps, gate 1")
    for options in ((), ("--unguided",)):
        arguments = ("--arch", "sdxl-lcm", "--steps", 4, "--gate-step", 1, "--json", out, *options)
        assert run(monkeypatch, "macs", *arguments) == 0
        row = next(row for row in json.loads(out.read_text()) if row["variant"] == "the image")
        assert row["macs"] == pytest.approx(published.macs, rel=0.01)
    assert run(monkeypatch, "macs", "--arch", "demo", "--gate-step", 1, "--steps", 2) == 0
    assert "0.00" not in capsys.readouterr().out  # a small model's are counted in G


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


@pytest.mark.slow
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
    for gate, read in (("none", 859_520_964), (24, 815_558_404)):
        assert run(monkeypatch, "macs", "--arch", "sd15", "--gate-step", gate, "--json", out) == 0
        rows = json.loads(out.read_text())
        assert [row["params"] for row in rows if row["variant"] == "the image"] == [read]
        assert all({"model", "macs", "params", "page_macs", "page_params"} <= row.keys() for row in rows)


def test_the_command_counts_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "limits.json"
    assert run(monkeypatch, "macs", "--limits", "--arch", "sd15", "--json", out) == 0
    said = capsys.readouterr().out
    assert "UNet2DConditionModel" in said
    assert "1.453x" in said  # as above: a gate at 10 of 25 steps
    written = json.loads(out.read_text())
    assert written == {
        "versions": written["versions"],
        "gate": 0.4,
        "steps": 25,
        "models": [limit_row("sd15")],
    }
    assert set(written["versions"]) == {"torch", "diffusers", "tgate_fx"}


def test_limits_fit_into_80_columns_a_line_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = [
        {"model": architecture.title, "denoiser": architecture.cls, "guided": architecture.guided}
        | {"parameters": 14.3e9, "cross_attention": 0.123, "limit": 1.453}
        for architecture in ARCHITECTURES.values()
    ]
    show_limits(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(f"{row['model']} ") for line, row in zip(lines[2:-2], rows, strict=True))
    assert all(line.endswith("14.30G 12.3% 1.453x") for line in lines[2:-2])


def test_committed_limits_are_of_all_models() -> None:
    models = json.loads(LIMITS.read_text())["models"]
    assert [row["arch"] for row in models] == list(ARCHITECTURES)
    assert next(row for row in models if row["arch"] == "sd15") == limit_row("sd15")


@pytest.mark.slow
@pytest.mark.parametrize("arch", list(ARCHITECTURES)[::6])  # all of them take four minutes
def test_committed_limits_are_those_counted(arch: str) -> None:
    models = json.loads(LIMITS.read_text())["models"]
    assert next(row for row in models if row["arch"] == arch) == limit_row(arch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "flux"), "'flux' is not one of"),
        (("--arch", "sd15", "--gate-step", "soon"), "'soon': expected a step"),
        (("--arch", "sd15", "--sp-interval", "0"), "sp_interval=0"),
        (("--arch", "pixart-alpha", "--deepcache", "3", "1"), "expected a UNet for DeepCache"),
        (("--arch", "sd15", "--deepcache", "0", "1"), "interval=0"),
        (("--arch", "sd15", "--deepcache", "3", "-1"), "branch=-1"),
        (("--arch", "wan-1.3b", "--size", "64"), "size=64 was given for Wan 2.1 1.3B, 480p"),
        (("--json", "no/such/folder/x.json"), "there is no folder"),
        (("--gate-step", "3", "--size", "16"), "--gate-step, --size with no --arch: expected --arch alone"),
        (("--limits", "--arch", "sd15", "--unguided"), "--guided with --limits: expected --arch alone"),
        (("--arch", "sdxl-lcm", "--steps", "4"), "--gate-step 10 of --steps 4: expected less"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    options: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refused(monkeypatch, capsys, message, "macs", *options)
