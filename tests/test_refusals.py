"""What is refused, in which words, and that the pipeline is as usable afterwards as before."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from torch import nn

import tgate_fx
from tests import oracle, tiny
from tgate_fx.pipeline_guidance import check_known_guidance
from tgate_fx.rows import Rows
from tgate_fx.schedule import Schedule

KWARGS = {**tiny.inputs("sd"), "num_inference_steps": 5}


@pytest.fixture
def pipe() -> Any:
    return tiny.sd()


@pytest.fixture
def plain() -> torch.Tensor:
    return tiny.latents(tiny.sd(), **KWARGS)


def says(*parts: str) -> str:
    return "(?s)" + ".*".join(map(re.escape, parts))


@pytest.mark.parametrize("how", [tgate_fx.gate, tgate_fx.compile])
@pytest.mark.parametrize("value", [0, -3, True, 1.0, 0.0, 2.5, "5"])
def test_gate_steps(how: Any, value: Any, pipe: Any, plain: torch.Tensor) -> None:
    with pytest.raises(
        tgate_fx.TGateError, match=says(f"gate_step={value!r}", type(value).__name__, "expected an int")
    ):
        how(pipe, gate_step=value)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert torch.equal(tiny.latents(pipe, **KWARGS), plain)
    tgate_fx.gate(pipe, gate_step=2)
    expected = tiny.latents(pipe, **KWARGS)
    with pytest.raises(ValueError, match=says(f"gate_step={value!r}", "expected an int")):
        pipe(**KWARGS, gate_step=value)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


@pytest.mark.parametrize("how", [tgate_fx.gate, tgate_fx.compile])
def test_unknown_keywords(how: Any, pipe: Any) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=says("Unknown keyword gate_stepp, interval", "expected")):
        how(pipe, gate_stepp=3, interval=2)
    with pytest.raises(tgate_fx.ArgumentError, match=says("gate_stepp", "Did you mean gate_step?")):
        how(pipe, gate_stepp=3)
    kinds = {parameter.kind for parameter in inspect.signature(how).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}  # editors see a typo
    with pytest.raises(tgate_fx.ArgumentError, match=says("after_gate='cond'", "'negative', 'positive', 'both'")):
        how(pipe, after_gate="cond")


def test_mode_and_options_together(pipe: Any) -> None:
    with pytest.raises(tgate_fx.ArgumentError, match=says("mode='max-autotune'", "options={", "one of them")):
        tgate_fx.compile(pipe, mode="max-autotune", options={"freezing": True})
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_gating_twice(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    expected = tiny.latents(pipe, **KWARGS)
    for how in (tgate_fx.gate, tgate_fx.compile):
        with pytest.raises(tgate_fx.StateError, match=says("gated already", "tgate_fx.restore(pipe)", "gate_step=")):
            how(pipe, 3)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


def test_what_is_not_gated(pipe: Any) -> None:
    for function in (tgate_fx.restore, tgate_fx.report, lambda pipe: tgate_fx.disabled(pipe).__enter__()):
        with pytest.raises(tgate_fx.StateError, match=says("StableDiffusionPipeline is not gated", "tgate_fx.gate")):
            function(pipe)
        with pytest.raises(tgate_fx.StateError, match="This int is not gated"):
            function(3)
    tgate_fx.gate(pipe)
    tgate_fx.restore(pipe)
    with pytest.raises(RuntimeError, match="is not gated"):
        tgate_fx.restore(pipe)


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        ("StableDiffusionSAGPipeline", "self-attention guidance"),
        ("StableDiffusionPanoramaPipeline", "views of a panorama"),
        ("StableDiffusionParadigmsPipeline", "parallel sampling"),
        ("TextToVideoZeroPipeline", "attention across frames"),
        ("StableDiffusionAttendAndExcitePipeline", "Attend-and-Excite"),
        ("StableDiffusionPix2PixZeroPipeline", "attention maps of every step"),
        ("LEditsPPPipelineStableDiffusion", "LEDITS++"),
        ("StableDiffusionGLIGENTextImagePipeline", "grounding by images"),
    ],
)
def test_pipelines_that_guide_in_another_way(pipeline: str, what: str) -> None:
    cls = getattr(diffusers, pipeline)
    parameters = inspect.signature(cls.__call__).parameters
    with pytest.raises(tgate_fx.UnsupportedError, match=says(what)):
        check_known_guidance(cls.__new__(cls), parameters, Schedule(2, after_gate="negative"))


class NoDenoiser(diffusers.DiffusionPipeline):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self) -> None: ...


@pytest.mark.parametrize("make", [lambda: NoDenoiser(tiny.vae()), object, lambda: "pipe", tiny.unet, lambda: None])
def test_without_a_denoiser(make: Any) -> None:
    thing = make()
    with pytest.raises(
        tgate_fx.UnsupportedError,
        match=says(type(thing).__name__, "neither a unet nor a transformer", "Use the pipeline as it is"),
    ):
        tgate_fx.gate(thing)


def test_a_denoiser_without_cross_attention(pipe: Any, plain: torch.Tensor) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    without = tiny.sd(**blocks)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("UNet2DConditionModel has no cross-attention", "attn2")):
        tgate_fx.gate(without)
    assert type(without) is diffusers.StableDiffusionPipeline
    assert not {"forward", "_tgate_dispatch"} & set(vars(without.unet))


def test_a_denoiser_that_is_none(pipe: Any) -> None:
    pipe.unet = nn.Linear(3, 3)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("Linear has no cross-attention", "as it is")):
        tgate_fx.gate(pipe)


@pytest.mark.parametrize(
    "name",
    [
        "CogVideoXTransformer3DModel",
        "FluxTransformer2DModel",
        "HunyuanVideoTransformer3DModel",
        "MochiTransformer3DModel",
        "QwenImageTransformer2DModel",
        "SD3Transformer2DModel",
    ],
)
def test_joint_attention(name: str) -> None:
    """By the pipeline, whatever else it is, by its sites and by its denoiser alone; of usual size, without weights."""
    with torch.device("meta"):
        denoiser = getattr(diffusers, name)()
    pipe = SimpleNamespace(transformer=denoiser)
    before = [set(vars(module)) for module in denoiser.modules()]
    for function, given in (
        (tgate_fx.gate, pipe),
        (tgate_fx.compile, pipe),
        (tgate_fx.sites, pipe),
        (tgate_fx.split, denoiser),
    ):
        with pytest.raises(tgate_fx.UnsupportedError, match=says(f"{name} has joint attention", "as it is")):
            function(given)
    assert [set(vars(module)) for module in denoiser.modules()] == before


def test_intervals_without_self_attention() -> None:
    """That is under another name in Kandinsky 5: there would be nothing to cache."""
    entry = pytest.importorskip("tests.zoo.kandinsky5", exc_type=ImportError).ENTRIES[0]
    pipe = entry.make()
    message = says("fi_interval=2", "Kandinsky5Transformer3DModel", "no self-attention", "Leave both")
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        tgate_fx.gate(pipe, gate_step=2, fi_interval=2)
    tgate_fx.gate(pipe, gate_step=2)
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        pipe(**entry.inputs(), fi_interval=2)


@pytest.mark.skipif(not hasattr(diffusers, "AnyFlowFARTransformer3DModel"), reason="diffusers does not have it yet")
def test_sites_of_a_pipeline_that_is_not_tested() -> None:
    with torch.device("meta"):
        denoiser = diffusers.AnyFlowFARTransformer3DModel()
    pipe = SimpleNamespace(transformer=denoiser)
    assert len(tgate_fx.sites(pipe)) == len(tgate_fx.sites(denoiser)) > 0
    with pytest.raises(tgate_fx.UnsupportedError, match=says("transformer is a AnyFlowFARTransformer3DModel", "split")):
        tgate_fx.gate(pipe)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "three chunks"),
        ("StableDiffusionPAGPipeline", "perturbed-attention guidance"),
    ],
)
def test_other_forms_of_guidance(cls: str, reason: str) -> None:
    pipe = tiny.sd(cls, in_channels=8 if "Pix2Pix" in cls else 4)
    with pytest.raises(tgate_fx.UnsupportedError, match=says(cls, reason, "expected", "ungated")):
        tgate_fx.gate(pipe)
    assert "forward" not in vars(pipe.unet)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_denoiser_compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pipe.unet is compiled", "expected the plain module")):
        tgate_fx.gate(pipe)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("denoiser is compiled", "expected the plain module")):
        tgate_fx.split(pipe.unet)


def test_a_denoiser_wrapped_by_torch_compile(pipe: Any) -> None:
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("pipe.unet is compiled", "tgate_fx.compile(pipe)")):
        tgate_fx.compile(pipe)
    pipe.unet = plain
    tgate_fx.gate(pipe, 2)


def test_a_denoiser_compiled_after_gating(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    expected = tiny.latents(pipe, **KWARGS)
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    with pytest.raises(tgate_fx.UnsupportedError, match=r"compiled by torch\.compile already"):
        pipe(**KWARGS)
    pipe.unet = plain
    plain.compile(backend="eager")
    with pytest.raises(tgate_fx.UnsupportedError, match=r"compiled by torch\.compile already"):
        pipe(**KWARGS)
    plain._compiled_call_impl = None
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


def test_another_denoiser_after_gating(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    expected = tiny.latents(pipe, **KWARGS)
    gated, pipe.unet = pipe.unet, tiny.unet()
    with pytest.raises(tgate_fx.StateError, match=says("pipe.unet was replaced", "restore")):
        pipe(**KWARGS)
    pipe.unet = gated
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


def test_a_replaced_forward_is_not_a_silent_no_op(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    pipe.unet.forward = type(pipe.unet).forward.__get__(pipe.unet)
    with pytest.raises(tgate_fx.StateError, match=says("without a call of pipe.unet", "nothing was gated", "restore")):
        pipe(**KWARGS)


def test_a_replaced_forward_of_a_site(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.forward = type(attention).forward.__get__(attention)
    with pytest.raises(
        tgate_fx.StateError, match=says("mid_block", "attn2 did not go through tgate_fx", "restore(pipe)")
    ):
        pipe(**KWARGS)


def test_a_class_changed_after_gating(pipe: Any, plain: torch.Tensor) -> None:
    tgate_fx.gate(pipe, 2)
    gated = type(pipe)
    pipe.__class__ = type("Other", (gated,), {})
    with pytest.raises(tgate_fx.StateError, match=says("class", "was changed after it was gated", "Undo first")):
        tgate_fx.restore(pipe)
    pipe.__class__ = gated
    tgate_fx.restore(pipe)
    assert torch.equal(tiny.latents(pipe, **KWARGS), plain)


class TwoCalls(diffusers.StableDiffusionPipeline):
    """Guides with a call for each branch, as many video pipelines do."""

    guided = False

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guided

    @torch.no_grad()
    def __call__(self, guided: bool = False, rows: int = 1, steps: int = 4) -> torch.Tensor:
        self.guided = guided
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = torch.randn(2, rows, 7, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
        for t in self.scheduler.timesteps:
            cond, uncond = (self.unet(latents, t, encoder_hidden_states=each).sample for each in text)
            latents = self.scheduler.step(uncond + 5 * (cond - uncond), t, latents).prev_sample
        return latents


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"guided": True}, "given 1 rows that are not the same latents twice"),
        ({"guided": True, "rows": 2}, "given 2 rows that are not the same latents twice"),
        ({"guided": False}, "several times a step"),
    ],
)
def test_guidance_in_several_calls(call: dict[str, Any], reason: str) -> None:
    plain = tiny.sd()
    pipe = TwoCalls(**plain.components, requires_safety_checker=False)
    expected = pipe(**call)
    tgate_fx.gate(pipe, gate_step=2)
    with pytest.raises(tgate_fx.UnsupportedError, match=says(reason, "expected", "gate_step=None")):
        pipe(**call)
    # Refused at the first call that shows it, not only once there are more calls than steps.
    assert len(tgate_fx.report(pipe).steps) == (0 if call["guided"] else 1)
    assert torch.equal(pipe(**call, gate_step=None), expected)


class LaterGuided(TwoCalls):
    """Guides in that way from its second step on."""

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        self.guided = False
        self.scheduler.set_timesteps(4)
        latents, text = torch.ones(1, 4, 8, 8), torch.ones(1, 7, tiny.TEXT_WIDTH)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, t, text).sample, t, latents).prev_sample
            self.guided = True
        return latents


def test_guidance_that_begins_later_is_looked_at_when_it_does() -> None:
    pipe = tgate_fx.gate(LaterGuided(**tiny.make("sd-small").components, requires_safety_checker=False), gate_step=3)
    with pytest.raises(tgate_fx.UnsupportedError, match=says("given 1 rows that are not the same latents twice")):
        pipe()
    assert len(tgate_fx.report(pipe).steps) == 1


def test_more_calls_than_steps(pipe: Any) -> None:
    """A second use of the denoiser that cannot be told from a step, say from a callback."""
    tgate_fx.gate(pipe, 2)
    expected = tiny.latents(pipe, **KWARGS)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.unet(torch.cat([values["latents"]] * 2), timestep.clone(), pipe.text)
        return {}

    with torch.no_grad():
        pipe.text = torch.cat(pipe.encode_prompt("a", torch.device("cpu"), 1, True)[::-1])
    with pytest.raises(tgate_fx.UnsupportedError, match="began step 5 of a loop of 5: expected as many steps"):
        pipe(**KWARGS, callback_on_step_end=callback)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


@pytest.mark.parametrize("rows", [0, 3, 5])
def test_an_input_whose_rows_do_not_follow_the_batch(rows: int) -> None:
    given = {"sample": torch.zeros(4, 2), "text": [torch.zeros(rows, 2)]}
    with pytest.raises(
        tgate_fx.UnsupportedError, match=says("given text", f"[{rows}, 2] beside 4 rows", "a multiple", "after_gate=")
    ):
        Rows(frozenset(given)).half(given, 4, second=True, gated=False)


def test_rows_of_a_branch() -> None:
    frames = torch.arange(8.0)
    given = {"sample": torch.zeros(4), "frames": (frames,), "text": torch.zeros(1), "timestep": torch.zeros(1)}
    half = Rows(frozenset(("sample", "frames", "text"))).half(given, 4, second=True, gated=False)
    assert half["sample"].shape == (2,)
    assert torch.equal(half["frames"][0], frames[4:])  # a multiple of the rows
    assert half["text"] is given["text"]  # one row serves all
    assert half["timestep"] is given["timestep"]


def test_lists_that_only_cross_attention_reads_are_left_whole_where_it_is_cached() -> None:
    images = [torch.arange(4.0)]
    rows = Rows(frozenset(("images",)), only_attended=frozenset(("images",)))
    assert rows.half({"images": images}, 4, second=True, gated=True)["images"] is images
    assert torch.equal(rows.half({"images": images}, 4, second=True, gated=False)["images"][0], images[0][2:])


def test_an_input_whose_rows_are_unknown(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    unknown = {"own": {"regions": torch.zeros(2, 1, 4)}}
    with pytest.raises(tgate_fx.UnsupportedError, match=says("given regions", "expected only", "after_gate='both'")):
        pipe(**KWARGS, cross_attention_kwargs=unknown)


@pytest.mark.parametrize("change", ["batch", "guidance"])
def test_a_batch_that_changes_after_the_gate(change: str, pipe: Any) -> None:
    tgate_fx.gate(pipe, 2, after_gate="both")
    expected = tiny.latents(pipe, **KWARGS)

    def callback(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 3 and change == "guidance":
            pipe._guidance_scale = 0.0
        if index == 3 and change == "batch":
            return {"latents": torch.cat([values["latents"]] * 2)}
        return {}

    with pytest.raises(
        tgate_fx.StateError, match=says("latents of shape [", "at step 4", "expected the batch", "gate_step=None")
    ):
        pipe(**KWARGS, callback_on_step_end=callback)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected)


def test_a_share_of_an_unknown_number_of_steps(pipe: Any) -> None:
    class NoTimesteps:
        """Stands in for a scheduler that keeps its timesteps to itself."""

        def __init__(self, scheduler: Any) -> None:
            self._scheduler = scheduler

        def __getattr__(self, name: str) -> Any:
            if name == "timesteps":
                raise AttributeError(name)
            return getattr(self._scheduler, name)

    cls = type("Counting", (TwoCalls,), {"__call__": _one_call})
    counting = cls(**pipe.components, requires_safety_checker=False)
    vars(counting)["scheduler"] = NoTimesteps(pipe.scheduler)
    tgate_fx.gate(counting, gate_step=0.5)
    with pytest.raises(tgate_fx.ArgumentError, match=says("gate_step=0.5 (a share", "give steps as ints")):
        counting()
    counting(gate_step=2)


@torch.no_grad()
def _one_call(self: Any) -> None:
    for t in torch.arange(4):
        self.unet(torch.zeros(1, 4, 8, 8), t, encoder_hidden_states=torch.zeros(1, 7, tiny.TEXT_WIDTH))


def test_latents_under_another_name(pipe: Any) -> None:
    tgate_fx.gate(pipe, 2)
    pipe.unet.forward.parameters = ("x", *pipe.unet.forward.parameters[1:])
    with pytest.raises(
        tgate_fx.StateError, match=says("was given x", "expected its latents as sample or hidden_states")
    ):
        pipe(**KWARGS)


def test_three_chunks_for_an_image() -> None:
    """DreamLite guides in one batch by text alone, and in three chunks when it has an image, too."""
    dreamlite = pytest.importorskip("tests.zoo.dreamlite", exc_type=ImportError)
    pipe = dreamlite.pipeline("DreamLitePipeline")
    pipe.processor = dreamlite.Letters()

    def edit() -> Any:
        return pipe(**dreamlite.inputs(image=PIL.Image.new("RGB", (16, 16)))).images

    network = oracle.Network(pipe.unet, [site.name for site in tgate_fx.sites(pipe)])
    expected = oracle.gated([network], edit, 2, "whole")
    tgate_fx.gate(pipe, gate_step=2)
    with pytest.raises(
        tgate_fx.UnsupportedError, match=says("3 rows", "not the same latents twice", "three chunks", "'both'")
    ):
        edit()
    pipe(**dreamlite.inputs())
    assert tgate_fx.report(pipe).gate == 2
    tgate_fx.restore(pipe)
    tgate_fx.gate(pipe, gate_step=2, after_gate="both")
    assert torch.equal(edit(), expected)


class GuidedAtSomeSteps(diffusers.StableDiffusionPipeline):
    """Guides at some of the steps only, which its inputs alone tell."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return True

    @torch.no_grad()
    def __call__(self, guided: tuple[int, ...] = (0, 1, 2, 3), prompts: int = 1) -> torch.Tensor:
        self.scheduler.set_timesteps(4)
        latents = torch.randn(prompts, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = torch.randn(2 * prompts, 7, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
        for index, t in enumerate(self.scheduler.timesteps):
            times = 2 if index in guided else 1
            noise = self.unet(torch.cat([latents] * times), t, encoder_hidden_states=text[-times * prompts :]).sample
            latents = self.scheduler.step(noise.chunk(times)[-1], t, latents).prev_sample
        return latents


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("after_gate", ["negative", "both"])
@pytest.mark.parametrize(
    ("guided", "words"),
    [
        ((0, 1, 2), "Leave guidance on or off for the whole generation"),
        ((0,), "Let guidance span all steps"),
        ((1, 2, 3), "Let guidance span all steps"),
        ((2, 3), "Leave guidance on or off for the whole generation"),
    ],
)
def test_guidance_at_some_steps(guided: tuple[int, ...], words: str, after_gate: str, prompts: int) -> None:
    pipe = GuidedAtSomeSteps(**tiny.make("sd-small").components, requires_safety_checker=False)
    tgate_fx.gate(pipe, gate_step=2, after_gate=after_gate)
    if after_gate == "negative" and 0 not in guided:
        words = "not the same latents twice"
    with pytest.raises(tgate_fx.TGateError, match=says(words)):
        pipe(guided, prompts)
    pipe(prompts=prompts)
    assert tgate_fx.report(pipe).gate == 2


@pytest.mark.parametrize("name", ["AudioLDMPipeline", "MusicLDMPipeline"])
def test_text_that_enters_with_the_time(name: str) -> None:
    """Their UNets have attentions that are built and named for a text, but read what they ask with."""
    unet = tiny.unet(
        cross_attention_dim=(16, 32),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True,
    )
    none = dict.fromkeys(("text_encoder", "tokenizer", "vocoder"))
    cls = getattr(diffusers, name)
    pipe = cls(vae=tiny.vae(), unet=unet, scheduler=tiny.scheduler(), **none, **_feature_extractor(cls))
    assert any(getattr(module, "is_cross_attention", False) for module in unet.modules())
    for refuses in (tgate_fx.gate, tgate_fx.compile, tgate_fx.sites):
        with pytest.raises(tgate_fx.UnsupportedError, match=says("class_labels", "expected cross-attention")):
            refuses(pipe)
    for refuses in (tgate_fx.split, tgate_fx.sites):
        with pytest.raises(tgate_fx.UnsupportedError, match=says("UNet2DConditionModel", "class_labels")):
            refuses(unet)
    assert type(pipe) is cls
    assert not any("forward" in vars(module) for module in unet.modules())


def _feature_extractor(cls: Any) -> dict[str, None]:
    return dict.fromkeys({"feature_extractor"} & set(inspect.signature(cls).parameters))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gatestep": 2}, says("Unknown keyword gatestep", "Did you mean gate_step?")),
        ({"forcast": 2}, says("Unknown keyword forcast", "Did you mean forecast?")),
        ({"full_step": (3,)}, says("Unknown keyword full_step", "Did you mean full_steps?")),
        ({"deepcache": None}, says("deepcache was given to a call", "Give it to tgate_fx.gate or compile")),
        ({"gate_companions": False}, says("gate_companions was given to a call", "tgate_fx.gate")),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_keywords_that_a_pipelines_call_would_ignore(given: dict[str, Any], message: str) -> None:
    """Stable Diffusion's takes any, for its deprecated ones."""
    pipe = tgate_fx.gate(tiny.make("sd-small"), 2)
    kwargs = {**tiny.inputs("sd-small"), "num_inference_steps": 4}
    expected = tiny.latents(pipe, **kwargs)
    with pytest.raises(tgate_fx.ArgumentError, match=message):
        tiny.latents(pipe, **kwargs, **given)
    assert torch.equal(tiny.latents(pipe, **kwargs), expected)
