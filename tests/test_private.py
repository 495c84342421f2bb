"""Private names of torch, accelerate and diffusers, taken away one by one: then happens what their door says."""

from __future__ import annotations

import ast
import gc
import inspect
import re
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import CacheMixin
from torch import nn
from torch.nn import functional

import tgate_fx
from tests import tiny
from tests.conftest import CountingBackend
from tests.replay import ReplayBackend, copies_of
from tests.test_refusals import says
from tests.test_regional import blocks_share_graphs
from tests.zoo import allegro
from tgate_fx import forward_patch, private
from tgate_fx.artifact import fingerprint
from tgate_fx.artifact import private as aot
from tgate_fx.compiled import dead_code, settings, variant
from tgate_fx.compiled import private as compiling

KWARGS = {**tiny.inputs("sd"), "num_inference_steps": 5}

Take = Callable[[str], None]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Take:
    """Takes a name away from the door alone, since torch itself would fail without most of them."""
    gone: set[str] = set()
    find = private.find
    for door in (private, compiling, aot):
        monkeypatch.setattr(door, "find", lambda path: None if path in gone else find(path))
    return gone.add


def compiled(backend: Any, **changes: Any) -> Any:
    return tgate_fx.compile(tiny.make("sd-small"), gate_step=2, backend=backend, **changes)


def expected() -> torch.Tensor:
    return tiny.latents(tgate_fx.gate(tiny.make("sd-small"), gate_step=2), **KWARGS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torch._dynamo.config.skip_nnmodule_hook_guards", {}),
        ("torch.nn.modules.module._global_forward_hooks", {}),
        ("torch.nn.modules.module._global_forward_pre_hooks", {}),
        ("torch._dynamo.lookup_backend", {}),
        ("torch.fx.experimental._config.use_duck_shape", {"dynamic": True}),
        ("torch._inductor.list_mode_options", {"backend": "inductor", "mode": "reduce-overhead"}),
    ],
)
def test_compiling_is_refused_when_it_is_asked_for(
    name: str, changes: dict[str, Any], take: Take, backend: CountingBackend
) -> None:
    plain = tiny.make("sd-small")
    tgate_fx.restore(tgate_fx.compile(plain, **{"backend": backend, **changes}))
    take(name)
    with pytest.raises(tgate_fx.UnsupportedError, match=says(f"has no {name}", "expected a torch from", "Install one")):
        tgate_fx.compile(plain, **{"backend": backend, **changes})
    if changes:  # without the setting it is not needed
        tgate_fx.restore(tgate_fx.compile(plain, backend=backend))
    assert torch.equal(tiny.latents(tgate_fx.gate(plain, gate_step=2), **KWARGS), expected())


@pytest.mark.parametrize(
    "name",
    [
        "torch._dynamo.eval_frame._debug_get_cache_entry_list",
        "torch._dynamo.eval_frame._stance",
        "torch._C._dynamo.eval_frame.reset_code",
        "torch._C._nn",
        "torch._C._log_api_usage_once",
        "torch._dynamo.exc.TorchDynamoException",
        "torch._dynamo.exc.FailOnRecompileLimitHit",
    ],
)
def test_generations_are_right_without(
    name: str, take: Take, backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    call = variant.Variant.__call__
    monkeypatch.setattr(variant.Variant, "__call__", lambda self, *args: (checked.append(self), call(self, *args))[1])
    take(name)
    pipe, eager = tiny.make("pixart-small"), tgate_fx.gate(tiny.make("pixart-small"), gate_step=2)
    tgate_fx.compile(pipe, gate_step=2, backend=backend)
    kwargs = {**tiny.inputs("pixart-small"), "num_inference_steps": 5}
    for _ in range(2):
        assert torch.equal(tiny.latents(pipe, **kwargs), tiny.latents(eager, **kwargs))
    assert tgate_fx.report(pipe).compiled_graphs == len(backend.graphs) == 2
    # Guards at every one of the five steps of two generations, or once for each phase of each.
    assert len(checked) == (10 if "eval_frame._" in name else 4)
    tgate_fx.restore(pipe)


@pytest.mark.slow
def test_modes_of_other_backends_are_none_of_its_business() -> None:
    given: list[object] = []

    def custom(graph: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        given.append(kwargs)
        return graph.forward

    assert torch.equal(tiny.latents(compiled(custom, mode="my-mode"), **KWARGS), expected())
    assert given == [{"mode": "my-mode"}] * 2


def test_the_entry_that_ran_last_is_in_front() -> None:
    """What leaving the guards out rests on, where one function has several graphs."""

    def double(value: torch.Tensor) -> torch.Tensor:
        return value * 2

    function = torch.compile(double, backend="eager", dynamic=False)
    last = {}
    for size in (2, 3, 2, 3, 3, 2):
        function(torch.ones(size))
        last.setdefault(size, compiling.last_run(double.__code__))
        assert compiling.last_run(double.__code__) is last[size] is not None
    assert last[2] is not last[3]


def test_guards_are_checked_without_what_entries_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "torch._dynamo.eval_frame._debug_get_cache_entry_list": lambda code: [SimpleNamespace(code=code)],
        "torch._dynamo.eval_frame._stance": SimpleNamespace(stance="default"),
    }
    monkeypatch.setattr(compiling, "find", found.__getitem__)
    code = expected.__code__
    assert compiling.last_run(code) is code
    for name, lacking in zip(found, (lambda code: [SimpleNamespace()], SimpleNamespace()), strict=True):
        with monkeypatch.context() as patch:
            patch.setitem(found, name, lacking)
            assert compiling.last_run(code) is None


def test_on_a_newer_torch_several_graphs_of_one_function_keep_their_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(value: torch.Tensor) -> torch.Tensor:
        return value * 2

    function = torch.compile(double, backend="eager", dynamic=False)
    monkeypatch.setattr(compiling, "_ORDER_SEEN", (2, 8))
    function(torch.ones(2))
    assert compiling.last_run(double.__code__) is not None
    function(torch.ones(3))
    assert compiling.last_run(double.__code__) is None


def test_errors_of_torch_reach_the_user_as_they_are(take: Take, backend: CountingBackend) -> None:
    pipe = compiled(backend)
    pipe.unet.mid_block.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(tgate_fx.CompileError):
        tiny.latents(pipe, **KWARGS)
    take("torch._dynamo.exc.TorchDynamoException")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        tiny.latents(pipe, **KWARGS)


@pytest.mark.parametrize("gone", tiny.slow_but((True,), (False, True)))
def test_the_recompile_limit(gone: bool, take: Take, backend: CountingBackend) -> None:
    """A phase whose modules changed too often gets a new function; without the name, torch's own error is raised."""
    if gone:
        take("torch._dynamo.exc.FailOnRecompileLimitHit")
    pipe = compiled(backend)
    with torch._dynamo.config.patch(recompile_limit=1):
        tiny.latents(pipe, **KWARGS)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
        if gone:
            with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
                tiny.latents(pipe, **KWARGS)
        else:
            tiny.latents(pipe, **KWARGS)


def test_a_lock_of_its_own(take: Take) -> None:
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    tiny.latents(pipe, **KWARGS)
    assert compiling.compile_lock() is torch._dynamo.convert_frame.compile_lock
    take("torch._dynamo.convert_frame.compile_lock")
    assert compiling.compile_lock() is compiling._own_lock
    assert list(tgate_fx.graphs(pipe)) == ["pre-gate", "post-gate"]


@pytest.mark.parametrize("name", ["torch._ops.OpOverload", "torch.ops.aten._assert_tensor_metadata.default"])
def test_graphs_are_traced_without(name: str, take: Take) -> None:
    """FX's own rule decides then, and may keep more."""
    pipe = tgate_fx.gate(tiny.make("sd-small"), gate_step=2)
    tiny.latents(pipe, **KWARGS)
    before = sum(tgate_fx.graphs(pipe)["post-gate"].operations().values())
    assert compiling.is_operator(torch.ops.aten.clone.default)
    assert compiling.is_metadata_assertion(torch.ops.aten._assert_tensor_metadata.default)
    take(name)
    assert sum(tgate_fx.graphs(pipe)["post-gate"].operations().values()) >= before
    assert compiling.is_operator(torch.ops.aten.clone.default) is ("aten" in name)
    assert compiling.is_metadata_assertion(torch.ops.aten._assert_tensor_metadata.default) is ("_ops" in name)


def test_without_a_schema_an_operator_may_do_anything() -> None:
    assert not compiling.writes(torch.ops.aten.add.Tensor)
    assert compiling.returns(torch.ops.aten.add.Tensor)
    without_effect = {"is_mutable": False, "returns": ["Tensor"]}
    assert not compiling.writes(SimpleNamespace(_schema=SimpleNamespace(**without_effect)))
    for operator in (SimpleNamespace(), SimpleNamespace(_schema=SimpleNamespace())):  # no _schema, nothing in it
        assert compiling.writes(operator)
        assert not compiling.returns(operator)
    assert not compiling.is_metadata_assertion(None)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch._C._log_api_usage_once, "torch._C._log_api_usage_once"),
        (functional.gelu, "torch._C._nn"),
    ],
)
def test_without_the_name_of_a_function_its_calls_stay(function: object, name: str, take: Take) -> None:
    node = SimpleNamespace(op="call_function", target=function, args=(), kwargs={})
    assert not dead_code.may_have_an_effect(node)  # type: ignore[arg-type]
    take(name)
    assert dead_code.may_have_an_effect(node)  # type: ignore[arg-type]


@pytest.mark.slow
def test_without_marks_cuda_graphs_copy_their_cache(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_has_cuda_graphs", lambda device: True)
    take("torch._dynamo.mark_static_address")
    replay = ReplayBackend()
    pipe = compiled(replay, options={"triton.cudagraphs": True})
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected())
    assert copies_of(replay, "cache") > 0


def test_without_freezing_cpus_compile_plainly(take: Take) -> None:
    cpu = torch.device("cpu")
    assert settings.CompileSettings().freezes(cpu)
    take("torch._inductor.config.freezing")
    assert not settings.CompileSettings().freezes(cpu)
    assert settings.CompileSettings().options_for(cpu) is None


def test_without_inductors_list_nothing_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    for codecache in (SimpleNamespace(), SimpleNamespace(PyCodeCache=SimpleNamespace())):
        monkeypatch.setitem(compiling.sys.modules, "torch._inductor.codecache", codecache)  # type: ignore[arg-type]
        assert compiling.inductor_modules() == []


@pytest.mark.parametrize(
    "name", ["CpuMkldnnDeviceOp", "_get_mkldnn_device_op", "pack_linear_weight", "pack_linear", "is_lp_weight"]
)
def test_without_its_hook_inductor_chooses_for_linear_layers(name: str) -> None:
    class Packer:
        def pack_linear_weight(self, graph: object, is_lp_weight: bool) -> None: ...

        def pack_linear(self, graph: object, is_lp_weight: bool) -> None: ...

    passes = SimpleNamespace(CpuMkldnnDeviceOp=Packer, _get_mkldnn_device_op=lambda device: None)
    assert compiling._onednn_packer(passes) is not None
    if name == "is_lp_weight":
        Packer.pack_linear = lambda self, graph, other: None  # type: ignore[method-assign, assignment]
    else:
        delattr(passes if hasattr(passes, name) else Packer, name)
    assert compiling._onednn_packer(passes) is None


def test_without_the_file_of_its_hook_inductor_chooses_too(take: Take) -> None:
    take("torch._inductor.fx_passes.mkldnn_fusion")
    with compiling.linear_layers_in_onednn():
        pass


@pytest.mark.slow
@blocks_share_graphs
def test_without_a_guards_value_blocks_compile_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiling.guarded_value(SimpleNamespace()) is None
    counts = []
    for _ in range(2):
        backend = CountingBackend()
        pipe = tgate_fx.compile(tiny.make("pixart-sigma"), gate_step=2, backend=backend, regional=True)
        tiny.latents(pipe, **tiny.inputs("pixart-sigma"), num_inference_steps=4)
        counts.append(len(backend.graphs))
        monkeypatch.setattr(compiling, "guarded_value", lambda guard: None)
    assert counts[0] < counts[1]


def test_without_their_names_blocks_are_found_by_their_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.make("sd-small")
    assert private.repeated_blocks(pipe.unet) == ("BasicTransformerBlock",)
    monkeypatch.delattr(type(pipe.unet), "_repeated_blocks")
    assert private.repeated_blocks(pipe.unet) == ()
    tgate_fx.compile(pipe, gate_step=2, backend=CountingBackend(), regional=True)
    assert torch.equal(tiny.latents(pipe, **KWARGS), expected())
    assert tgate_fx.report(pipe).compiled_graphs > 0


def test_without_the_names_of_hooks_a_module_may_have_some() -> None:
    assert not private.has_hooks(nn.Linear(1, 1))
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        assert private.has_hooks(SimpleNamespace(**{name: {}}))  # type: ignore[arg-type]  # the other is lacking


def test_without_the_name_of_what_resets_caches_nothing_is_put_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, without = (allegro.make().transformer for _ in range(2))
    before = set(vars(transformer))
    private.settle_cache_hooks(transformer)
    assert set(vars(transformer)) - before == {"_diffusers_hook"}
    monkeypatch.delattr(CacheMixin, "_reset_stateful_cache")
    private.settle_cache_hooks(without)
    assert set(vars(without)) == before


def test_without_the_names_of_hooks_none_are_seen() -> None:
    keeps, moves = SimpleNamespace(_is_stateful=True), SimpleNamespace(_is_stateful=False)
    module = nn.Linear(1, 1)
    vars(module).update(_diffusers_hook=SimpleNamespace(hooks={"a_cache": keeps, "group_offloading": moves}))
    assert private.caching_hooks(module) == ["a_cache"]
    assert private.untraceable(module) == ["group_offloading"]
    vars(module).update(_hf_hook=object())
    assert private.untraceable(module) == ["group_offloading", "accelerate"]
    vars(module).update(_hf_hook=SimpleNamespace(offload=False))
    assert private.untraceable(module) == ["group_offloading", "device_map"]
    without = nn.Linear(1, 1)
    vars(without).update(of_another_name=SimpleNamespace(hooks={"a_cache": keeps, "group_offloading": moves}))
    assert private.caching_hooks(without) == private.untraceable(without) == []


def test_without_versions_bits_are_read_all_the_same() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert private.version_of(weight) is not None  # its _version
    assert private.version_of(SimpleNamespace(is_inference=lambda: False)) is None  # type: ignore[arg-type]


def test_a_denoiser_compiled_in_place_that_is_not_seen_is_refused_later(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.make("sd-small")
    assert private.is_compiled_in_place(torch.compile(pipe.unet, backend="eager"))  # by _orig_mod
    assert not private.is_compiled_in_place(pipe.unet)
    pipe.unet.compile(backend="eager")
    assert private.is_compiled_in_place(pipe.unet)  # by _compiled_call_impl
    monkeypatch.setattr(private, "is_compiled_in_place", lambda module: False)
    tgate_fx.gate(pipe, gate_step=2)
    with pytest.raises(tgate_fx.StateError, match=says("without a call of pipe.unet", "restore")):
        tiny.latents(pipe, **KWARGS)


def test_without_the_place_beneath_hooks_a_lost_gate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private.BENEATH_HOOK == "_old_forward"
    monkeypatch.setattr(forward_patch, "BENEATH_HOOK", "_of_another_name")
    pipe = tiny.make("sd-small")
    add_hook_to_module(pipe.unet, ModelHook())
    tgate_fx.gate(pipe, gate_step=2)
    remove_hook_from_module(pipe.unet)
    with pytest.raises(tgate_fx.StateError, match=says("without a call of pipe.unet", "restore")):
        tiny.latents(pipe, **KWARGS)


def test_without_what_diffusers_keeps_its_public_names_serve() -> None:
    pipe = tiny.make("sd-small")
    vars(pipe).pop("_progress_bar_config")
    assert private.progress_bar_config(pipe) == {}
    tgate_fx.gate(pipe, gate_step=0.5)
    for other in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if other:  # another name for _num_timesteps
                patch.setattr(private, "STEP_COUNT", "_of_another_name")
            tiny.latents(pipe, **KWARGS)
        assert tgate_fx.report(pipe).gate == 2


def test_without_what_diffusers_records_the_steps_that_run_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of the four steps that are left of eight."""
    pipe = tgate_fx.gate(tiny.make("sdxl"), gate_step=0.5)
    kwargs = {**tiny.inputs("sdxl"), "num_inference_steps": 8, "denoising_end": 0.5}
    for name in ("_num_timesteps", "_of_another_name"):
        monkeypatch.setattr(private, "STEP_COUNT", name)
        tiny.latents(pipe, **kwargs)
        assert tgate_fx.report(pipe).gate == 2


def test_state_of_another_name_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"_modules", "_parameters", "_buffers", "_internal_dict", "_is_hf_initialized"} == private.MODULE_STATE
    layer = nn.Linear(1, 1)
    before = fingerprint.structure(layer)
    layer._is_hf_initialized = True
    assert fingerprint.structure(layer) == before
    monkeypatch.setattr(fingerprint, "_LEFT_OUT", frozenset())
    assert fingerprint.structure(layer) != before


def test_comparisons_are_refused_that_could_run_eagerly_unseen(take: Take) -> None:
    take("torch._dynamo.config.fail_on_recompile_limit_hit")
    with pytest.raises(tgate_fx.UnsupportedError, match=says("fail_on_recompile_limit_hit", "leave that out")):
        compiling.fail_at_recompile_limit()


def test_what_benchmarks_count(take: Take) -> None:
    assert len(compiling.graphs_and_breaks()) == 2
    take("torch._dynamo.utils.counters")
    assert compiling.graphs_and_breaks() == (0, 0)
    assert compiling.cuda_graph_skips() == 0
    weights = torch.eye(2)
    take("torch.ops.mkldnn._linear_pointwise")
    assert torch.equal(compiling.onednn_product(weights, weights), weights)


def test_packed_weights_are_not_shared_where_they_cannot_be_read(take: Take) -> None:
    weight = torch.eye(4).to_mkldnn()
    behind = compiling.packed(weight)
    assert behind is not None
    assert behind.data.nbytes == 64
    for name in ("data_ptr", "_nbytes", "_get_mkldnn_serialized_md"):
        take(f"torch.ops.mkldnn.{name}")
        assert compiling.packed(weight) is None


_TABLES = (aot._NEEDED, aot._NEEDED_FOR_PACKED_WEIGHTS)
NEEDED = sorted({f"{owner}.{name}" for table in _TABLES for owner, names in table.items() for name in names})


@pytest.mark.parametrize("name", [*NEEDED, *aot._C_FUNCTIONS])
def test_artifacts_are_refused_before_anything_is_done(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    has, functions = aot._has, [each for each in aot._C_FUNCTIONS if each != name]
    monkeypatch.setattr(aot, "_has", lambda owner, each: f"{owner}.{each}" != name and has(owner, each))
    monkeypatch.setattr(aot, "_torch_c", lambda: SimpleNamespace(**dict.fromkeys(functions)))
    pipe = tgate_fx.compile(tiny.make("sd-small"))
    message = says(f"has no {name}", "expected torch 2.9", "tgate_fx.warmup")
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        tgate_fx.save(pipe, tmp_path / "artifact")
    tgate_fx.restore(pipe)
    with pytest.raises(tgate_fx.UnsupportedError, match=message):
        tgate_fx.load(pipe, tmp_path / "artifact")
    assert not list(tmp_path.iterdir())
    assert torch.isfinite(tiny.latents(pipe, **KWARGS)).all()


def test_without_their_names_caches_are_kept_whole_and_taken_to_be_on(take: Take) -> None:
    assert aot.caches_are_on()
    assert not isinstance(aot.caches_of_their_own(), nullcontext)
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert not aot.caches_are_on()
        take("torch._inductor.config.fx_graph_cache")
        take("torch._inductor.config.force_disable_caches")
        take("torch.compiler._cache.CacheArtifactManager.with_fresh_cache")
        assert aot.caches_are_on()
        assert isinstance(aot.caches_of_their_own(), nullcontext)


def test_without_their_names_tensors_are_written_one_by_one(take: Take) -> None:
    for gone in (False, True):
        if gone:
            take("torch._foreach_mul_")
            take("torch._foreach_copy_")
        tensors = [torch.tensor(value) for value in (0.5, 2.0)]
        own = [tensor.clone() for tensor in tensors]
        compiling.multiply_each(tensors, 0.5)
        assert [float(tensor) for tensor in tensors] == [0.25, 1.0]
        compiling.copy_each(tensors, own)
        assert [float(tensor) for tensor in tensors] == [0.5, 2.0]


def test_without_a_count_of_uses_packed_weights_are_right_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(tensor: torch.Tensor) -> None:
        raise AttributeError("_use_count")

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    source = weight.to_mkldnn()  # whose memory is read next
    data, description = aot.packed_with_description(source)
    kept = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    monkeypatch.setattr(torch.Tensor, "_use_count", property(gone), raising=False)
    tensor = aot.packed_tensor(kept, "float32", (64, 64), (64, 1), description)
    assert torch.equal(tensor.to_dense(), weight)
    is_there = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert is_there() is not None


def test_without_torchs_name_a_wrapper_says_by_pythons_what_it_wraps() -> None:
    def own() -> None: ...

    assert private.wrapped(SimpleNamespace(_torchdynamo_orig_callable=own)) is own
    assert private.wrapped(SimpleNamespace(__wrapped__=own)) is own
    assert private.wrapped(torch.no_grad()(own)) is own
    assert private.wrapped(own) is None


def test_without_the_name_a_model_with_a_lora_takes_a_scale_all_the_same() -> None:
    module = nn.Linear(1, 1)
    assert not private.takes_loras(module)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        assert private.takes_loras(SimpleNamespace(**{name: True}))  # type: ignore[arg-type]


def names_of(door: types.ModuleType) -> set[str]:
    """The names that a door uses: dotted ones, those of attributes it asks for, and settings it changes."""
    tree = ast.parse(inspect.getsource(door))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    names = {each for each in strings if re.fullmatch(r"(torch(\.\w+)*\.)?_[a-z]\w*(\.\w+)*", each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("getattr", "hasattr"):
                names.update(each.value for each in node.args[1:2] if isinstance(each, ast.Constant))
            elif node.func.id == "_patch":
                names.update(str(keyword.arg) for keyword in node.keywords)
    return names


def test_every_name_of_the_doors_is_taken_away_here() -> None:
    here = Path(__file__).read_text()
    missing = []
    for door in (private, compiling, aot):
        for name in sorted(names_of(door)):
            in_needed = any(f"{name}." in f"{each}." for each in NEEDED)
            if not in_needed and not re.search(rf"\b{name.rpartition('.')[2]}\b", here):
                missing.append(f"{door.__name__}: {name}")
    assert missing == []
