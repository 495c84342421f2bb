"""Keywords of a pipeline's call by which its steps differ from what is gated: refused before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx2.dfr_layout import LTX2DFREpilogueTile

import tgate_fx
from tests.test_refusals import says
from tests.zoo import ace_step, kandinsky6, ltx2, ltx2_refined

TILES = [LTX2DFREpilogueTile(slice(0, 4), slice(0, 4), slice(0, 4), torch.ones(4, 4, 4))]
STG = {"spatio_temporal_guidance_blocks": [0]}
CALLS = "calls the denoiser once more"


def video(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**ltx2.inputs(**changes)).frames)


def audio(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**ace_step.inputs(**changes)).audios)


def silent(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**kandinsky6.inputs(**changes)).frames)


def keyframes() -> Any:
    return ltx2_refined.keyframes("LTX2DFRPipeline")


def refined(pipe: Any, **changes: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**ltx2_refined.without_guidance(**changes)).frames)


@pytest.mark.parametrize(
    ("make", "generate", "given", "refusal"),
    [
        (ltx2.newer, video, {"stg_scale": 0.5, **STG}, ("stg_scale=0.5", CALLS, "expected stg_scale=0.0")),
        (ltx2.newer, video, {"audio_stg_scale": 0.5, **STG}, ("audio_stg_scale=0.5", CALLS, "audio_stg_scale=0.0")),
        (ltx2.newer, video, {"modality_scale": 3.0}, ("modality_scale=3.0", CALLS, "expected modality_scale=1.0")),
        (ltx2.newer, video, {"audio_modality_scale": 2}, ("audio_modality_scale=2", CALLS, "audio_modality_scale=1.0")),
        (keyframes, refined, {"video_tiles": TILES}, ("once for each tile", "expected video_tiles=None")),
        (kandinsky6.make, silent, {"sample_audio": False}, ("the blocks for sound", "expected sample_audio=True")),
        (ace_step.make, audio, {"cfg_interval_start": 0.3}, ("some of the steps", "expected cfg_interval_start=0.0")),
        (ace_step.make, audio, {"cfg_interval_end": 0.5}, ("some of the steps", "expected cfg_interval_end=1.0")),
    ],
)
def test_refused_before_anything_is_computed(
    make: Any, generate: Any, given: dict[str, Any], refusal: tuple[str, ...]
) -> None:
    expected = generate(make(), **given)
    pipe = make()
    usual = generate(tgate_fx.gate(pipe, gate_step=2))
    pipe.check_inputs = lambda *_, **__: pytest.fail("the pipeline began")
    with pytest.raises(tgate_fx.UnsupportedError, match=says(type(pipe).__name__, *refusal, "use gate_step=None")):
        generate(pipe, **given)
    del pipe.check_inputs
    assert torch.equal(generate(pipe, **given, gate_step=None), expected)
    with tgate_fx.disabled(pipe):
        assert torch.equal(generate(pipe, **given), expected)
    assert torch.equal(generate(pipe), usual)


@pytest.mark.parametrize("after_gate", ["positive", "both"])
def test_defaults_count(after_gate: str) -> None:
    pipe = tgate_fx.gate(ltx2.newer(), gate_step=2, after_gate=after_gate)
    given = {name: value for name, value in ltx2.inputs().items() if not name.endswith(("stg_scale", "modality_scale"))}
    with pytest.raises(
        tgate_fx.UnsupportedError,
        match=says("stg_scale=1.0, audio_stg_scale=1.0, modality_scale=3.0, audio_modality_scale=3.0", "expected"),
    ):
        pipe(**given)


def test_another_call_of_the_denoiser_for_a_cover() -> None:
    pipe = tgate_fx.gate(ace_step.make(), gate_step=2)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("audio_cover_strength=0.5", CALLS, "strength=1.0")):
        audio(pipe, audio_cover_strength=0.5, task_type="cover", src_audio=torch.zeros(2, 64))
    with pytest.raises(tgate_fx.UnsupportedError, match=says("audio_cover_strength=0.5", CALLS, "strength=1.0")):
        audio(pipe, audio_cover_strength=0.5, audio_codes="<|audio_code_1|>")  # which make a cover of any task


@pytest.mark.parametrize(
    ("make", "generate", "given"),
    [
        (ltx2.newer, video, {"stg_scale": -1.0, "audio_stg_scale": None}),
        (ltx2.newer, video, {"modality_scale": 0.0, "audio_modality_scale": None}),
        (ace_step.make, audio, {"audio_cover_strength": 0.5}),  # of no cover
        (ace_step.make, audio, {"cfg_interval_end": 0.5, "guidance_scale": 1.0}),
        (lambda: ace_step.make(is_turbo=True), audio, {"cfg_interval_end": 0.5}),
    ],
)
def test_values_without_effect_are_not_refused(make: Any, generate: Any, given: dict[str, Any]) -> None:
    pipe = tgate_fx.gate(make(), gate_step=2)
    generate(pipe, **given)
    assert tgate_fx.report(pipe).gate == 2
    assert all(step.calls == 1 for step in tgate_fx.report(pipe).steps)
