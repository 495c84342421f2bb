"""The door to private and undocumented names of torch.compile and its graphs, as `tgate_fx.private` is to others."""

from __future__ import annotations

import ctypes
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedError
from ..private import find

# The newest torch on which Dynamo was seen to keep the cache entry that ran last in front.
_ORDER_SEEN = (2, 15)

_GLOBAL_HOOKS = ("torch.nn.modules.module._global_forward_hooks", "torch.nn.modules.module._global_forward_pre_hooks")
_HOOK_GUARDS = "torch._dynamo.config.skip_nnmodule_hook_guards"
_DUCK_SHAPE = "torch.fx.experimental._config.use_duck_shape"
_LOOKUP_BACKEND = "torch._dynamo.lookup_backend"
_LIST_MODE_OPTIONS = "torch._inductor.list_mode_options"
_PACKED = tuple(f"torch.ops.mkldnn.{name}" for name in ("data_ptr", "_nbytes", "_get_mkldnn_serialized_md"))
_FAIL_AT_LIMIT = "torch._dynamo.config.fail_on_recompile_limit_hit"

# The names without which results would be wrong: what each is needed for, and what to do instead.
_USE_GATE = "use tgate_fx.gate, which does not compile"
_REQUIRED = {
    **dict.fromkeys(_GLOBAL_HOOKS, ("to see hooks that compiled graphs would not run", _USE_GATE)),
    _HOOK_GUARDS: ("to notice hooks that are registered on modules later", _USE_GATE),
    _LOOKUP_BACKEND: ("to hand graphs to compilers", _USE_GATE),
    _DUCK_SHAPE: ("for dynamic=True", "leave dynamic out"),
    _LIST_MODE_OPTIONS: ("for a mode of inductor", "give options instead"),
    _FAIL_AT_LIMIT: ("to compare with torch.compile alone", "leave that out"),
}

_own_lock = threading.RLock()


# On compiling


def check_can_compile(*, dynamic: bool, inductor_mode: bool) -> None:
    """Raise `UnsupportedError` if this torch lacks a name without which compiled phases would be wrong."""
    skipped = [_FAIL_AT_LIMIT, *([] if dynamic else [_DUCK_SHAPE]), *([] if inductor_mode else [_LIST_MODE_OPTIONS])]
    for path in _REQUIRED:
        if path not in skipped:
            _require(path)


def has_global_hooks() -> bool:
    """Return whether forward hooks are registered for all modules, which compiled graphs do not run. Without the names:
    compiling is refused, and so is running what is compiled already.
    """
    return any(map(_require, _GLOBAL_HOOKS))


def compile_lock() -> AbstractContextManager[Any]:
    """Return the lock under which torch.compile compiles: tracers keep their state in one place for the whole process.

    Without the name: a lock of tgate_fx's own, and tracing while another thread compiles may fail.
    """
    lock: AbstractContextManager[Any] | None = find("torch._dynamo.convert_frame.compile_lock")
    return _own_lock if lock is None else lock


def last_run(code: types.CodeType) -> types.CodeType | None:
    """Return what Dynamo made of this code when it last ran it, without its guards; None if that is not certain.

    The public ``set_stance(skip_guard_eval_unsafe=True)`` leaves guards out too, but takes twice as long at every step
    (125 µs instead of 51 to 61 around an SD-1.5 graph, torch 2.13), and for every thread of the process. Without the
    names: None, and guards are checked at every step.
    """
    entries = find("torch._dynamo.eval_frame._debug_get_cache_entry_list")
    stance = find("torch._dynamo.eval_frame._stance")
    # Under another stance than these, none of the entries may have run.
    if entries is None or getattr(stance, "stance", None) not in ("default", "fail_on_recompile"):
        return None
    found = entries(code)
    if not found or (len(found) > 1 and _torch_version() > _ORDER_SEEN):
        return None
    last: types.CodeType | None = getattr(found[0], "code", None)
    return last


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def forget(code: types.CodeType) -> None:
    """Drop the graphs that Dynamo keeps for this code. Without the name: they are kept as long as their modules are."""
    reset = find("torch._C._dynamo.eval_frame.reset_code")
    if reset is not None:
        reset(code)


def hook_guards() -> AbstractContextManager[Any]:
    """Return a context manager, to be entered often: hooks that are registered on modules later are noticed.

    Without the name: compiling is refused.
    """
    _require(_HOOK_GUARDS)
    return _patch(torch._dynamo.config, skip_nnmodule_hook_guards=False)


def sizes_apart() -> AbstractContextManager[Any]:
    """Return a context manager, to be entered often: sizes that are equal when a graph is made may differ later.

    Without the name: ``dynamic=True`` is refused.
    """
    _require(_DUCK_SHAPE)
    return _patch(find(_DUCK_SHAPE.rpartition(".")[0]), use_duck_shape=False)


def can_freeze() -> bool:
    """Return whether inductor has ``freezing``. Without the name: it is left out, which is slower on a CPU."""
    return find("torch._inductor.config.freezing") is not None


def frozen_parameters() -> AbstractContextManager[Any]:
    """Return a context manager, to be entered often: Dynamo leaves weights in graphs, as inductor's freezing needs.

    Dynamo looks at inductor's own setting, not at the options. Without the name: nothing freezes, see `can_freeze`.
    """
    return _patch(torch._inductor.config, freezing=True)


def compile_errors() -> tuple[type[Exception], ...]:
    """Return the error by which torch.compile says that a function cannot be compiled. Without the name: none, and
    torch's own errors reach the user.
    """
    found = find("torch._dynamo.exc.TorchDynamoException")
    return () if found is None else (found,)


def recompile_limit_errors() -> tuple[type[Exception], ...]:
    """Return the error at torch.compile's recompile limit. Without the name: none, and torch's reaches the user."""
    found = find("torch._dynamo.exc.FailOnRecompileLimitHit")
    return () if found is None else (found,)


def backend_of(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that compiles graphs, of a torch.compile backend. Without the name: compiling is refused."""
    found: Callable[..., Any] = _require(_LOOKUP_BACKEND)(backend)
    return found


def mode_options(mode: str) -> dict[str, Any]:
    """Return the inductor options that a torch.compile mode stands for. Without the name: modes are refused."""
    options: dict[str, Any] = _require(_LIST_MODE_OPTIONS)(mode)
    return options


def guarded_value(guard: Any) -> Any:
    """Return what a guard of torch.compile's ``guard_filter_fn`` is about. Without the name: None, and regions compile
    one by one.
    """
    return getattr(guard, "value", None)


def _require(path: str) -> Any:
    """Return what a name of `_REQUIRED` stands for, or raise `UnsupportedError`."""
    found = find(path)
    if found is None:
        purpose, instead = _REQUIRED[path]
        raise UnsupportedError(
            f"torch {torch.__version__} has no {path}, which tgate_fx needs {purpose}: expected a torch from 2.9 to "
            f"{'.'.join(map(str, _ORDER_SEEN))}. Install one, or {instead}."
        )
    return found


def _patch(config: Any, **values: Any) -> AbstractContextManager[Any]:
    patch: AbstractContextManager[Any] = config.patch(**values)
    return patch


# On graphs


def operator_namespaces() -> tuple[Any, ...]:
    """Return where torch keeps its operators as functions. Without the name: dead code stays."""
    return tuple(each for each in (torch, find("torch._C._nn")) if each is not None)


def is_api_statistic(function: Any) -> bool:
    """Return whether a function only counts calls, for torch's statistics. Without the name: dead code stays."""
    return function is not None and function is find("torch._C._log_api_usage_once")


def is_operator(function: Any) -> bool:
    """Return whether a function is an ATen operator's overload. Without the name: FX's own rule says what is dead."""
    cls = find("torch._ops.OpOverload")
    return cls is not None and isinstance(function, cls)


def is_metadata_assertion(function: Any) -> bool:
    """Return whether a function only asserts what torch.export knew of a tensor. Without the name: dead code stays."""
    return function is not None and function is find("torch.ops.aten._assert_tensor_metadata.default")


def writes(operator: Any) -> bool:
    """Return whether an ATen operator writes to its inputs. Without the name: it may, and dead code stays."""
    return bool(getattr(getattr(operator, "_schema", None), "is_mutable", True))


def returns(operator: Any) -> bool:
    """Return whether an ATen operator returns anything. Without the name: it may not, and dead code stays."""
    return bool(getattr(getattr(operator, "_schema", None), "returns", False))


def inductor_modules() -> list[types.ModuleType]:
    """Return the modules that inductor made and keeps; none before it is imported. Without the name: none, and frozen
    weights are not freed before the process ends.
    """
    codecache = sys.modules.get("torch._inductor.codecache")
    modules: list[types.ModuleType] = getattr(getattr(codecache, "PyCodeCache", None), "modules", [])
    return modules


@contextmanager
def linear_layers_in_onednn() -> Iterator[None]:
    """Context manager: inductor packs every linear layer of frozen CPU graphs for oneDNN. Without the names: by its own
    choice, which is MKL for float32.

    Enter it where Dynamo compiles, which it does in one thread at a time: the choice is the whole process's.
    """
    passes = find("torch._inductor.fx_passes.mkldnn_fusion")
    packer = _onednn_packer(passes)
    if packer is None:
        yield
        return
    choice = passes._get_mkldnn_device_op
    passes._get_mkldnn_device_op = lambda device: packer if device == "cpu" else choice(device)
    try:
        yield
    finally:
        passes._get_mkldnn_device_op = choice


def _onednn_packer(passes: Any) -> Any:
    """Return what packs every layer for oneDNN; None if this inductor has no such hook."""
    own: Any = getattr(passes, "CpuMkldnnDeviceOp", None)
    names = ("pack_linear_weight", "pack_linear")
    methods = [getattr(own, name, None) for name in names]
    if not hasattr(passes, "_get_mkldnn_device_op") or not all(map(_takes_precision, methods)):
        return None

    # Inductor gives all layers of lower precision to oneDNN, and is told that every layer is one.
    def always(name: str) -> Any:
        return lambda self, graph, _, *rest: getattr(own, name)(self, graph, True, *rest)

    return type("PacksForOnednn", (own,), {name: always(name) for name in names})()


def _takes_precision(method: Any) -> bool:
    return method is not None and list(inspect.signature(method).parameters)[1:3] == ["graph", "is_lp_weight"]


class Packed(NamedTuple):
    """A tensor in oneDNN's layout: the memory behind it, and oneDNN's description of how it is laid out."""

    data: memoryview
    description: bytes


def packed(tensor: torch.Tensor) -> Packed | None:
    """Return what is behind a tensor in oneDNN's layout. Without the names: None, and graphs share no weights."""
    address, size, described = map(find, _PACKED)
    if address is None or size is None or described is None:
        return None
    data = memoryview((ctypes.c_ubyte * size(tensor)).from_address(address(tensor)))
    return Packed(data, bytes(described(tensor).tolist()))


def multiply_each(tensors: list[torch.Tensor], factor: Any) -> None:
    """Multiply tensors in place, all at once. Without the name: one by one."""
    together = find("torch._foreach_mul_")
    if together is not None:
        together(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


def copy_each(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Write values into tensors, all at once. Without the name: one by one."""
    together = find("torch._foreach_copy_")
    if together is not None:
        together(tensors, values)
        return
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


# For benchmarks


def fail_at_recompile_limit() -> AbstractContextManager[Any]:
    """Return a context manager: torch.compile fails at its recompile limit instead of running eagerly from there on.

    Without the name: an `UnsupportedError`.
    """
    _require(_FAIL_AT_LIMIT)
    return _patch(torch._dynamo.config, fail_on_recompile_limit_hit=True)


def graphs_and_breaks() -> tuple[int, int]:
    """Return how many graphs torch.compile made in this process, and how many graph breaks. Without the name: 0."""
    counters = find("torch._dynamo.utils.counters") or {}
    return counters.get("stats", {}).get("unique_graphs", 0), sum(counters.get("graph_break", {}).values())


def cuda_graph_skips() -> int:
    """Return how many graphs inductor made without the CUDA graph that was asked for. Without the name: 0."""
    counters = find("torch._dynamo.utils.counters") or {}
    skips: int = counters.get("inductor", {}).get("cudagraph_skips", 0)
    return skips


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's product as oneDNN computes it. Without the name: as torch does."""
    linear = find("torch.ops.mkldnn._linear_pointwise")
    if linear is None:
        return torch.nn.functional.linear(left, right)
    product: torch.Tensor = linear(left, right, None, "none", [], "")
    return product
