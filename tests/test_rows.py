"""Every row of upstream's loader table: family × setting × scheduler × oracle, bit-exact; and how many graphs it takes.

The oracles are upstream `tgate` 1.0.0 and the `DeepCache` package, which this project did not write.
"""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tgate
import torch
from DeepCache import DeepCacheSDHelper

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.test_refusals import says
from tests.zoo import entry_of, seeded
from tgate_fx.gated import Gated
from tgate_fx.pipeline_guidance import GuidanceIsOn
from tgate_fx.roles import Role, Roles
from tgate_fx.split import phase_function

LOADERS = {
    "sd": "TgateSDLoader",
    "sdxl": "TgateSDXLLoader",
    "sdxl-lcm": "TgateSDXLLoader",
    "pixart-alpha": "TgatePixArtAlphaLoader",
    "pixart-alpha-lcm": "TgatePixArtAlphaLoader",
    "pixart-sigma": "TgatePixArtSigmaLoader",
    "svd": "TgateSVDLoader",
}
DEEPCACHE_LOADERS = {"sd": "TgateSDDeepCacheLoader", "sdxl": "TgateSDXLDeepCacheLoader"}

# (gate_step, sp_interval, fi_interval, warm_up): TGATE-V2's figures, and the corners.
SETTINGS = [(10, 5, 1, 2), (15, 3, 1, 2), (5, 2, 2, 1), (4, 1, 3, 0)]


def with_scheduler(family: str, scheduler: str | None) -> Any:
    pipe = tiny.make(family)
    if scheduler is not None:
        pipe.scheduler = tiny.scheduler(scheduler)
    return pipe


def final(call: Any, **kwargs: Any) -> torch.Tensor:
    """The latents that a call of a pipeline, or of its ``tgate``, ends with."""
    generator = torch.Generator().manual_seed(7)
    result = call(**kwargs, generator=generator, output_type="latent", return_dict=False)
    return result if isinstance(result, torch.Tensor) else result[0]


def names(setting: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("gate_step", "sp_interval", "fi_interval", "warm_up"), setting, strict=True))


ROWS = [
    *[("sd", name) for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep")],
    *[("sdxl", name) for name in ("DDIM", "EulerDiscrete", "EulerAncestralDiscrete")],
    *[("pixart-alpha", name) for name in ("DPMSolverMultistep", "DDIM")],
    *[("pixart-sigma", name) for name in ("DPMSolverMultistep", "EulerDiscrete")],
    ("svd", None),
]


@pytest.mark.parametrize(
    ("family", "scheduler", "setting"),
    [
        # By default a third: of every row one setting, and every setting with several rows.
        pytest.param(*row, setting, marks=() if (index + number) % 3 == 0 else pytest.mark.slow)
        for number, row in enumerate(ROWS)
        for index, setting in enumerate(SETTINGS)
    ],
)
def test_self_attention_intervals(family: str, scheduler: str | None, setting: tuple[int, int, int, int]) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": 18}
    upstream = getattr(tgate, LOADERS[family])(with_scheduler(family, scheduler))
    expected = final(upstream.tgate, **kwargs, **names(setting))
    pipe = tgate_fx.gate(with_scheduler(family, scheduler), **names(setting))
    assert torch.equal(final(pipe, **kwargs), expected)
    # The same for one call of a pipeline that was gated otherwise, and through our loader.
    pipe = getattr(tgate_fx, LOADERS[family])(with_scheduler(family, scheduler))
    assert torch.equal(final(pipe.tgate, **kwargs, **names(setting)), expected)
    assert torch.equal(final(pipe, **kwargs, **names(setting)), expected)


def test_self_attention_intervals_matter() -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 12}
    results = [
        final(tgate_fx.gate(tiny.sd(), 6, sp_interval=sp, fi_interval=fi), **kwargs)
        for sp, fi in ((1, 1), (3, 1), (1, 3))
    ]
    assert not any(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("family", ["sd", "pixart-sigma"])
def test_self_attention_intervals_without_guidance_or_for_both_branches(family: str) -> None:
    """Upstream cannot run these; each row must do what it does alone."""
    settings = {"gate_step": 5, "sp_interval": 2, "fi_interval": 3, "num_inference_steps": 11}
    alone = tiny.inputs(family, 1)
    both = {**tiny.inputs(family, 2)}
    for name, value in alone.items():
        if isinstance(value, torch.Tensor):
            both[name] = torch.cat([value, value])
        elif name == "prompt" and value is not None:
            both[name] = value * 2
    for extra in ({"guidance_scale": 1.0}, {}):
        pipe = tgate_fx.gate(tiny.make(family), after_gate="both")
        shape = (1, 4, 8, 8)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        one = final(pipe, **alone, **settings, **extra, latents=latents)
        two = final(pipe, **both, **settings, **extra, latents=torch.cat([latents] * 2))
        torch.testing.assert_close(two, torch.cat([one, one]), rtol=1e-4, atol=1e-4)


def test_a_scale_of_each_frame_is_read_again_when_it_changes() -> None:
    """It is on the device, and read once; a callback may write to it, or put another in its place."""
    pipe = tiny.make("svd")
    is_on = GuidanceIsOn(pipe, None)
    pipe._guidance_scale = torch.tensor([1.0, 3.0])
    assert [is_on(), is_on()] == [True, True]
    pipe._guidance_scale.fill_(1.0)
    assert not is_on()
    pipe._guidance_scale = torch.tensor([1.0, 3.0])
    assert is_on()
    with torch.inference_mode():
        pipe._guidance_scale = torch.tensor([1.0, 3.0])
        assert is_on()
        pipe._guidance_scale.fill_(1.0)
        assert not is_on()


@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("gate", tiny.slow_but((1, 4), (1, 2, 4, 6)))
@pytest.mark.parametrize("guidance", [{}, {"min_guidance_scale": 2.0, "max_guidance_scale": 6.0}])
def test_stable_video_diffusion(gate: int, guidance: dict[str, float]) -> None:
    kwargs = {**tiny.svd_inputs(), "num_inference_steps": 6, **guidance}
    intervals = {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}
    upstream = tgate.TgateSVDLoader(tiny.svd())
    expected = final(upstream.tgate, **kwargs, gate_step=gate, **intervals)
    pipe = tgate_fx.gate(tiny.svd(), gate)
    assert torch.equal(final(pipe, **kwargs), expected)
    with tgate_fx.disabled(pipe):
        assert torch.equal(final(pipe, **kwargs), final(tiny.svd(), **kwargs))


def test_what_upstream_calls_the_negative_branch_of_svd_is_the_image() -> None:
    """Its loader keeps the conditioning that was encoded without guidance, which is the positive branch."""
    kwargs = {**tiny.svd_inputs(), "num_inference_steps": 6}
    default, positive, negative = (
        final(tgate_fx.gate(tiny.svd(), 2, **extra), **kwargs)
        for extra in ({}, {"after_gate": "positive"}, {"after_gate": "negative"})
    )
    assert torch.equal(default, positive)
    assert not torch.equal(default, negative)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("family", ["sdxl-lcm", "pixart-alpha-lcm"])
def test_lcm(family: str, gate: int) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": 4, "lcm": True, "gate_step": gate}
    intervals = {"sp_interval": 1, "fi_interval": 1, "warm_up": 0}
    upstream = getattr(tgate, LOADERS[family])(with_scheduler(family, "LCM"))
    pipe = getattr(tgate_fx, LOADERS[family])(with_scheduler(family, "LCM"))
    assert torch.equal(final(pipe.tgate, **kwargs, **intervals), final(upstream.tgate, **kwargs, **intervals))


@pytest.mark.parametrize("interval", tiny.slow_but((3,), (2, 3, 5)))
@pytest.mark.parametrize(
    ("family", "scheduler", "branches"),
    [
        ("sd", "DDIM", range(6)),
        ("sd", "EulerDiscrete", (0, 3)),
        ("sd", "DPMSolverMultistep", (1,)),
        ("sdxl", "DDIM", (0, 1, 3)),
        ("sdxl", "EulerDiscrete", (0, 4)),
    ],
)
def test_deepcache_alone_equals_the_package(family: str, scheduler: str, branches: Any, interval: int) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": 8}
    for branch in branches:
        plain = with_scheduler(family, scheduler)
        helper = DeepCacheSDHelper(pipe=plain)
        helper.set_params(cache_interval=interval, cache_branch_id=branch)
        helper.enable()
        deepcache = tgate_fx.DeepCache(interval=interval, branch=branch)
        pipe = tgate_fx.gate(with_scheduler(family, scheduler), None, deepcache=deepcache)
        got = final(pipe, **kwargs)
        assert torch.equal(got, final(plain, **kwargs))
        assert not torch.equal(got, final(with_scheduler(family, scheduler), **kwargs))


def deep_unet() -> dict[str, Any]:
    """A UNet with three blocks of two layers, so that no branch is a special case of another."""
    return {
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }


@pytest.mark.parametrize("branch", range(9))
def test_every_branch_of_a_deeper_unet(branch: int) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    plain = tiny.sd(**deep_unet())
    helper = DeepCacheSDHelper(pipe=plain)
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    pipe = tgate_fx.gate(tiny.sd(**deep_unet()), None, deepcache=tgate_fx.DeepCache(3, branch))
    assert torch.equal(final(pipe, **kwargs), final(plain, **kwargs))


def with_two_layers(name: str) -> tuple[Any, Any]:
    """A pipeline whose UNet has two layers in each block, as real ones have, and how it generates."""
    entry = entry_of(name)
    pipe = entry.make()
    if name == "AudioLDM2Pipeline":
        changes = {
            "layers_per_block": 2,
            "block_out_channels": (16, 16),
            "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "cross_attention_dim": pipe.unet.config.cross_attention_dim * 2,
        }
        config = {**pipe.unet.config, **changes}
        pipe.unet = seeded(lambda: type(pipe.unet).from_config(config))
    else:
        motion = diffusers.MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=2,
            motion_norm_num_groups=8,
            motion_num_attention_heads=2,
        )
        pipe.unet = seeded(lambda: diffusers.UNetMotionModel.from_unet2d(tiny.unet(layers_per_block=2), motion))
    return pipe, entry.run


@pytest.mark.parametrize("branch", [0, 1, 3, 4])
@pytest.mark.parametrize("name", ["AudioLDM2Pipeline", "AnimateDiffPipeline"])
def test_nothing_is_read_of_what_is_skipped(name: str, branch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AudioLDM 2 has several attentions in a layer; motion blocks hand on by name what others do by position."""
    pipe, generate = with_two_layers(name)
    tgate_fx.gate(pipe, None, deepcache=tgate_fx.DeepCache(2, branch))
    made = []

    def poisoned(tensor: torch.Tensor, **settings: Any) -> torch.Tensor:
        made.append(torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=settings["device"]))
        return made[-1]

    sites = importlib.import_module("tgate_fx.sites")  # by that name the package has a function
    monkeypatch.setattr(sites, "torch", SimpleNamespace(**{**vars(torch), "empty_like": poisoned}))
    assert torch.isfinite(generate(pipe)).all()
    assert made


@pytest.mark.parametrize("branch", [0, 3])
def test_deepcache_needs_blocks_with_layers_of_their_own(branch: int) -> None:
    pipe = entry_of("StableDiffusionControlNetXSPipeline").make()
    with pytest.raises(
        tgate_fx.UnsupportedError, match=says("ControlNetXSCrossAttnDownBlock2D", "Leave deepcache out")
    ):
        tgate_fx.gate(pipe, 2, deepcache=tgate_fx.DeepCache(2, branch))


@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("scheduler", tiny.slow_but(("DDIM",), ("DDIM", "EulerDiscrete")))
@pytest.mark.parametrize(
    ("gate", "interval", "branch"), [(4, 3, 0), (5, 2, 1), (1, 3, 0), (7, 5, 3), (3, 3, 4), (9, 3, 0)]
)
@pytest.mark.parametrize("family", DEEPCACHE_LOADERS)
def test_deepcache_with_a_gate(family: str, gate: int, interval: int, branch: int, scheduler: str) -> None:
    kwargs = {**tiny.inputs(family, 2), "num_inference_steps": 9}
    settings = {"cache_interval": interval, "cache_branch_id": branch}
    upstream = getattr(tgate, DEEPCACHE_LOADERS[family])(with_scheduler(family, scheduler), **settings)
    expected = final(upstream.tgate, **kwargs, gate_step=gate)
    deepcache = tgate_fx.DeepCache(interval, branch)
    pipe = tgate_fx.gate(with_scheduler(family, scheduler), gate, deepcache=deepcache)
    assert torch.equal(final(pipe, **kwargs), expected)
    pipe = getattr(tgate_fx, DEEPCACHE_LOADERS[family])(with_scheduler(family, scheduler), **settings)
    assert torch.equal(final(pipe.tgate, **kwargs, gate_step=gate), expected)


def test_deepcache_counts_evaluations_where_the_package_looks_timesteps_up() -> None:
    """PNDM repeats a timestep; the package finds its first place in the list both times, and is one step behind."""
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6}
    plain = with_scheduler("sd", "PNDM")
    helper = DeepCacheSDHelper(pipe=plain)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    pipe = tgate_fx.gate(with_scheduler("sd", "PNDM"), None, deepcache=tgate_fx.DeepCache(2))
    assert not torch.equal(final(pipe, **kwargs), final(plain, **kwargs))
    shallow = ["shallow" in step.phase for step in tgate_fx.report(pipe).steps]
    assert shallow == [False, True, False, True, False, True, False]


@pytest.mark.parametrize(("family", "branch"), [("sd", 0), ("sd", 1), ("sd", 3), ("sdxl", 3), ("sdxl", 4)])
def test_freeu_works_on_a_deep_branch_s_tensor_once(family: str, branch: int) -> None:
    """FreeU writes in place into what leaves the deep branch; the package caches what it has written to."""
    pipe = tiny.make(family)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    seen: list[dict[str, Any]] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    final(pipe, **tiny.inputs(family), num_inference_steps=1)
    latents = torch.randn(2, 4, 16, 16)
    given = {**seen[0], "sample": latents, "timestep": torch.tensor(500)}
    full = pipe.unet(**given)[0]
    tgate_fx.gate(pipe, None, deepcache=tgate_fx.DeepCache(2, branch))
    dispatch = Gated.of(pipe).networks[0].network.dispatch  # type: ignore[union-attr]
    capture, reuse = (
        phase_function(dispatch.sites, dispatch.original_forward, Roles(deep_branch=role), branch)
        for role in (Role.CAPTURE, Role.REUSE)
    )
    with torch.no_grad():
        output, cache = capture(((), (), ()), (), given)
        assert torch.equal(output[0], full)
        kept = cache[2][0].clone()
        for _ in range(2):
            assert torch.equal(reuse(cache, (), given)[0][0], full)
        assert torch.equal(cache[2][0], kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Nothing was gated:UserWarning")
@pytest.mark.parametrize("stance", ["default", "eager_on_recompile"])
def test_freeu_and_deepcache_compiled(stance: str, backend: CountingBackend) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    settings = {"gate_step": 3, "deepcache": tgate_fx.DeepCache(2, 3)}
    eager = tgate_fx.gate(tiny.sd(), **settings)
    pipe = tgate_fx.compile(tiny.sd(), backend=backend, **settings)
    for each in (eager, pipe):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    expected = final(eager, **kwargs)
    if stance == "eager_on_recompile":  # the full steps are compiled by now, the shallow ones are not
        final(pipe, **tiny.inputs("sd"), num_inference_steps=1)
    graphs = len(backend.graphs)
    with torch.compiler.set_stance(stance):
        assert torch.equal(final(pipe, **kwargs), expected)
    assert len(backend.graphs) == (graphs if stance == "eager_on_recompile" else 4)


def test_deepcache_leaves_nothing_behind() -> None:
    pipe = tiny.sd()
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    expected = final(pipe, **kwargs)
    before = [set(vars(module)) for module in pipe.unet.modules()]
    tgate_fx.gate(pipe, 3, deepcache=tgate_fx.DeepCache(2, 1))
    cached = final(pipe, **kwargs)
    with tgate_fx.disabled(pipe):
        assert torch.equal(final(pipe, **kwargs), expected)
    assert torch.equal(final(pipe, **kwargs), cached)
    tgate_fx.restore(pipe)
    assert [set(vars(module)) for module in pipe.unet.modules()] == before
    assert torch.equal(final(pipe, **kwargs), expected)


def test_pipelines_that_share_a_unet_may_have_different_deep_branches() -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6}
    first = tgate_fx.gate(tiny.sd(), 4, deepcache=tgate_fx.DeepCache(3, 0))
    second = type(tiny.sd())(**first.components, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    one = final(first, **kwargs)
    tgate_fx.gate(second, None, deepcache=tgate_fx.DeepCache(2, 1))
    two = final(second, **kwargs)
    assert torch.equal(one, final(tgate_fx.gate(tiny.sd(), 4, deepcache=tgate_fx.DeepCache(3, 0)), **kwargs))
    assert torch.equal(two, final(tgate_fx.gate(tiny.sd(), None, deepcache=tgate_fx.DeepCache(2, 1)), **kwargs))
    assert torch.equal(final(first, **kwargs), one)
    tgate_fx.restore(first)
    assert torch.equal(final(second, **kwargs), two)
    tgate_fx.restore(second)
    assert not any("forward" in vars(module) for module in second.unet.modules())


def graph_names(graph: torch.fx.GraphModule) -> str:
    return " ".join(node.name for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("family", "settings", "graphs"),
    [
        pytest.param("sd-small", names(SETTINGS[0]), 3, marks=pytest.mark.slow),
        pytest.param("sd-small", names(SETTINGS[3]), 3, marks=pytest.mark.slow),
        pytest.param("sdxl-small", names(SETTINGS[0]), 3, marks=pytest.mark.slow),
        pytest.param("pixart-alpha", names(SETTINGS[2]), 4, marks=pytest.mark.slow),
        pytest.param("pixart-sigma", names(SETTINGS[1]), 3, marks=pytest.mark.slow),
        pytest.param("sd-small", {"gate_step": 6, "deepcache": tgate_fx.DeepCache(3, 0)}, 4, marks=pytest.mark.slow),
        pytest.param("sd", {"gate_step": None, "deepcache": tgate_fx.DeepCache(3, 1)}, 2, marks=pytest.mark.slow),
        pytest.param("sdxl-lcm", {"gate_step": 2}, 2, marks=pytest.mark.slow),
        ("pixart-alpha-lcm", {"gate_step": 1}, 2),
    ],
)
def test_compiled_rows_take_a_constant_number_of_graphs(
    family: str, settings: dict[str, Any], graphs: int, backend: CountingBackend
) -> None:
    pipe = tgate_fx.compile(tiny.make(family), **settings, backend=backend)
    eager = tgate_fx.gate(tiny.make(family), **settings)
    steps = 4 if family.endswith("lcm") else 18
    changes: list[dict[str, Any]] = [{}, {}, {"num_inference_steps": steps + 1}]
    if settings["gate_step"] is not None:
        changes[1]["gate_step"] = settings["gate_step"] + 1
    if settings.get("sp_interval", 1) > 1:
        changes[2].update(sp_interval=settings["sp_interval"] + 1, warm_up=1)
    for generation, change in enumerate(changes):
        kwargs = {**tiny.inputs(family), "num_inference_steps": steps, **change}
        if "prompt" in kwargs and kwargs["prompt"] is not None:
            kwargs["prompt"] = [f"a cat {generation}"]
        got = final(pipe, **kwargs)
        assert torch.equal(got, final(eager, **kwargs))
        assert len(backend.graphs) == graphs
        assert tgate_fx.report(pipe).recompiles == 0


@pytest.mark.slow
def test_a_shallow_graph_has_nothing_of_the_deep_branch(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.sd(), 4, deepcache=tgate_fx.DeepCache(2, 1), backend=backend)
    final(pipe, **tiny.inputs("sd"), num_inference_steps=8)
    full, shallow, post_full, post_shallow = map(graph_names, backend.graphs)
    for graph in (full, post_full):
        assert "mid_block" in graph
        assert "down_blocks_modules_1" in graph
    for graph in (shallow, post_shallow):
        assert "mid_block" not in graph
        assert "down_blocks_modules_1" not in graph
        assert "up_blocks_modules_0" not in graph
        assert "down_blocks_modules_0" in graph
        assert "up_blocks_modules_1" in graph
    assert "attn2" in shallow
    assert "attn2" not in post_shallow


@pytest.mark.slow
def test_a_reusing_graph_has_no_self_attention(backend: CountingBackend) -> None:
    pipe = tgate_fx.compile(tiny.make("sd-small"), 4, sp_interval=2, fi_interval=2, backend=backend)
    final(pipe, **tiny.inputs("sd"), num_inference_steps=8)
    phases = dict(zip(("capture", "reuse", "post", "post reuse"), map(graph_names, backend.graphs), strict=True))
    assert {name for name, graph in phases.items() if "attn1" in graph} == {"capture", "post"}
    assert {name for name, graph in phases.items() if "attn2" in graph} == {"capture", "reuse"}


@pytest.mark.parametrize("enable", ["before", "after"])
def test_an_enabled_deepcache_helper_is_refused(enable: str) -> None:
    pipe = tiny.sd()
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 5}
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=4, cache_branch_id=1)
    message = r"DeepCacheSDHelper is enabled.*expected none.*helper\.disable\(\).*DeepCache\(interval=4, branch=1\)"
    if enable == "before":
        expected = final(pipe, **kwargs)
        helper.enable()
        with pytest.raises(tgate_fx.UnsupportedError, match=message):
            tgate_fx.gate(pipe)
        helper.disable()
        assert torch.equal(final(pipe, **kwargs), expected)
    else:
        tgate_fx.gate(pipe, 2)
        expected = final(pipe, **kwargs)
        helper.enable()
        with pytest.raises(tgate_fx.UnsupportedError, match=message):
            final(pipe, **kwargs)
        helper.disable()
        assert torch.equal(final(pipe, **kwargs), expected)


class StraightLine:
    """A plain hook on the module that the deep branch ends in: in place of what it gives at the steps between, the line
    through the last two outputs that count. It computes everything, and knows nothing of tgate_fx.
    """

    def __init__(self, computed: list[list[int]]) -> None:
        self._computed = computed  # for each part of the run in which rows are the same, the steps that are kept
        self._index = -1

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        self._index += 1
        part = next(each for each in reversed(self._computed) if each[0] <= self._index)
        if self._index == part[0]:
            self._kept: list[tuple[int, torch.Tensor]] = []
        if self._index in part:
            self._kept = [*self._kept[-1:], (self._index, output[0].clone())]
        elif len(self._kept) == 1:
            return (self._kept[0][1], *output[1:])
        else:
            (first, start), (second, end) = self._kept
            return (torch.lerp(start, end, (self._index - first) / (second - first)), *output[1:])
        return None


def deep_line(gate: int | None) -> torch.Tensor:
    """DeepCache of interval 3 and order 1 on 11 steps, by plain hooks, and the gate by upstream's loader."""
    parts = [[0, 3, 6, 9]] if gate is None else [[0, 3, gate - 1], [gate, gate + 3]]
    pipe = tiny.sd()
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 11}
    exit_module = pipe.unet.get_submodule("up_blocks.1.attentions.0")
    exit_module.register_forward_hook(StraightLine(parts))
    return final(tgate_fx.gate(pipe, gate), **kwargs)


@pytest.mark.parametrize("gate", tiny.slow_but((None,), (None, 6)))
def test_a_deep_branch_in_a_straight_line(gate: int | None, backend: CountingBackend) -> None:
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 11}
    expected = deep_line(gate)
    deepcache = tgate_fx.DeepCache(3, 0, order=1)
    for pipe in (
        tgate_fx.gate(tiny.sd(), gate, deepcache=deepcache),
        tgate_fx.compile(tiny.sd(), gate, deepcache=deepcache, backend=backend),
    ):
        for _ in range(2):
            assert torch.equal(final(pipe, **kwargs), expected)
    assert len(backend.graphs) == (2 if gate is None else 4)
    held = tgate_fx.gate(tiny.sd(), gate, deepcache=tgate_fx.DeepCache(3, 0))
    assert not torch.equal(final(held, **kwargs), expected)


def test_refused_deepcache_settings() -> None:
    for branch in (6, 12):
        with pytest.raises(
            tgate_fx.UnsupportedError, match=rf"branch={branch}\) begins.*expected a branch from 0 to 5"
        ):
            tgate_fx.gate(tiny.sd(), deepcache=tgate_fx.DeepCache(3, branch))
    with pytest.raises(tgate_fx.UnsupportedError, match="PixArtTransformer2DModel has no down, mid and up blocks"):
        tgate_fx.gate(tiny.pixart(), deepcache=tgate_fx.DeepCache())
    for bad in ({"interval": 0}, {"interval": 1.5}, {"branch": -1}, {"branch": True}):
        with pytest.raises(tgate_fx.ArgumentError, match="expected an int ≥"):
            tgate_fx.DeepCache(**bad)
    for bad in (2, -1, True, 0.5):
        with pytest.raises(tgate_fx.ArgumentError, match=f"order={bad}.*expected 0 .*or 1 "):
            tgate_fx.DeepCache(order=bad)
    for bad in (3, {"interval": 3}, "yes"):
        with pytest.raises(tgate_fx.ArgumentError, match=r"deepcache=.*expected tgate_fx\.DeepCache\(interval"):
            tgate_fx.gate(tiny.sd(), deepcache=bad)
    with pytest.raises(tgate_fx.ArgumentError, match=r"deepcache was given with sp_interval=3.*one or the other"):
        tgate_fx.gate(tiny.sd(), sp_interval=3, deepcache=tgate_fx.DeepCache())


def test_sites_and_report_name_what_is_cached() -> None:
    pipe = tgate_fx.gate(tiny.sd(), 4, deepcache=tgate_fx.DeepCache(2, 0))
    assert [site.kind for site in tgate_fx.sites(pipe)] == ["cross-attention"] * 4 + ["deep branch"]
    assert tgate_fx.sites(pipe)[-1].name == "up_blocks.1.attentions.0"
    final(pipe, **tiny.inputs("sd"), num_inference_steps=7)
    phases = [step.phase for step in tgate_fx.report(pipe).steps]
    pre, post = ["pre-gate", "pre-gate, shallow"], ["post-gate", "post-gate, shallow"]
    assert phases == [*pre, pre[0], pre[0], *post, post[0]]
    pipe = tgate_fx.gate(tiny.sd(), 4, sp_interval=2)
    assert [site.kind for site in tgate_fx.sites(pipe)].count("self-attention") == 4
    final(pipe, **tiny.inputs("sd"), num_inference_steps=5)
    assert tgate_fx.report(pipe).steps[1].phase == "pre-gate, self-attention reused"


@pytest.mark.parametrize(
    ("loader", "family"),
    [
        *[(loader, family) for family, loader in LOADERS.items()],
        *[(loader, family) for family, loader in DEEPCACHE_LOADERS.items()],
        ("TgatePixArtLoader", "pixart-alpha"),
    ],
)
def test_loaders_have_upstreams_defaults(loader: str, family: str) -> None:
    upstream = getattr(tgate, loader.replace("PixArtLoader", "PixArtAlphaLoader"))(tiny.make(family))
    defaults = inspect.signature(upstream.tgate).parameters
    kwargs = {**tiny.inputs(family), "num_inference_steps": 12}
    explicit = {name: defaults[name].default for name in ("gate_step", "sp_interval", "fi_interval", "warm_up")}
    lcm = {"lcm": True} if family.endswith("lcm") else {}
    pipe = getattr(tgate_fx, loader)(tiny.make(family))
    assert getattr(tgate_fx.loaders, loader) is getattr(tgate_fx, loader)
    expected = final(upstream.tgate, **kwargs, **lcm)
    assert torch.equal(final(pipe.tgate, **kwargs, **lcm), expected)
    assert torch.equal(final(pipe.tgate, **kwargs, **lcm, **explicit), expected)


def test_loaders_in_the_documented_form() -> None:
    kwargs = {**tiny.inputs("sd"), "output_type": "np"}
    results = []
    for module in (tgate, tgate_fx):
        pipe = module.TgateSDLoader(tiny.sd(), gate_step=8, num_inference_steps=12).to("cpu")
        generator = torch.Generator().manual_seed(0)
        results.append(pipe.tgate(**kwargs, gate_step=8, num_inference_steps=12, generator=generator))
    assert type(results[0]) is type(results[1])
    assert (results[0].images == results[1].images).all()
    assert results[0].nsfw_content_detected == results[1].nsfw_content_detected


def test_a_loaders_keywords_are_defaults() -> None:
    """Upstream takes and ignores them."""
    kwargs = tiny.inputs("sd")
    pipe = tgate_fx.TgateSDLoader(tiny.sd(), gate_step=3, num_inference_steps=7)
    final(pipe.tgate, **kwargs)
    assert tgate_fx.report(pipe).gate == 3
    assert len(tgate_fx.report(pipe).steps) == 7


def test_upstreams_forwards_stay_and_ours_do_not() -> None:
    """After upstream's `tgate` a plain call of the pipeline reads stale caches; here it is untouched."""
    kwargs = {**tiny.inputs("sd"), "num_inference_steps": 6}
    expected = final(tiny.sd(), **kwargs)
    upstream = tgate.TgateSDLoader(tiny.sd())
    final(upstream.tgate, **kwargs, gate_step=3)
    assert not torch.equal(final(upstream, **kwargs), expected)
    pipe = tgate_fx.TgateSDLoader(tiny.sd())
    final(pipe.tgate, **kwargs, gate_step=3)
    assert torch.equal(final(pipe, **kwargs), expected)
    tgate_fx.restore(pipe)
    assert not hasattr(pipe, "tgate")
    assert torch.equal(final(pipe, **kwargs), expected)


def test_loaders_refuse_what_they_do_not_know() -> None:
    with pytest.raises(tgate_fx.ArgumentError, match="Unknown keyword gate: expected one of gate_step, num_inference"):
        tgate_fx.TgateSDLoader(tiny.sd(), gate=3)
    with pytest.raises(
        tgate_fx.UnsupportedError, match="given a StableDiffusionPipeline: expected a StableDiffusionXL"
    ):
        tgate_fx.TgateSDXLLoader(tiny.sd())
    pipe = tgate_fx.TgateSDLoader(tiny.sd())
    with pytest.raises(tgate_fx.StateError, match="gated already"):
        tgate_fx.TgateSDLoader(pipe)
    for unknown in ("lcm", "interval", "prompts"):
        with pytest.raises(tgate_fx.ArgumentError, match=f"Unknown keyword {unknown}: expected one of"):
            pipe.tgate("a cat", **{unknown: True})
    pixart = tgate_fx.TgatePixArtLoader(tiny.pixart())
    with pytest.raises(tgate_fx.ArgumentError, match=r"lcm=True was given with guidance_scale=4\.5.*leave lcm out"):
        pixart.tgate(**tiny.pixart_inputs(), lcm=True)
