"""What gating a pipeline means, written down a second time with plain hooks: nothing here is of tgate_fx.

Sites are found from tensors alone. Every call of a denoiser is always computed whole; what the gate leaves out is
replaced afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Call = Callable[[], Any]

_CONTEXTS = ("encoder_hidden_states", "context")


@dataclass
class Recorded:
    """What one call of a denoiser was given, and what its modules were."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def changed(value: Any) -> Any:
    """The same structure, with other floating-point numbers in it, and images of tokens upside down."""
    if isinstance(value, torch.Tensor):
        if value.dtype is torch.int64 and value.ndim == 3:
            return value.flip(1)
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        return value + noise.to(value.device) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: changed(item) for name, item in value.items()}
    return type(value)(changed(item) for item in value) if type(value) in (list, tuple) else value


def copied(value: Any) -> Any:
    """The same structure in new lists, since some forwards empty those that they are given."""
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else value


def first_call(denoiser: nn.Module, generate: Call) -> Recorded:
    """The arguments of a denoiser's first call in a generation."""
    seen: list[Recorded] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(Recorded(copied(args), copied(kwargs)))

    with hooked(denoiser.register_forward_pre_hook(record, with_kwargs=True)):
        generate()
    return seen[0]


@contextlib.contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Context manager: these hooks go afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bound(module: nn.Module, recorded: Recorded) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(inspect.signature(type(module).forward).bind(module, *recorded.args, **recorded.kwargs).arguments)


def query_and_context(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[torch.Tensor]]:
    """What an attention asks with, and the tokens that it attends to; these are empty if they are not given apart."""
    query = args[0] if args else next((kwargs[name] for name in ("hidden_states", "x") if name in kwargs), None)
    given = [kwargs[name] for name in _CONTEXTS if kwargs.get(name) is not None] or list(args[1:2])
    context = [tensor for tensor in tensors_in(given) if tensor.ndim > 2]  # an embedding of the time has no tokens
    return query, [] if any(tensor is query for tensor in context) else context


def find_sites(denoiser: nn.Module, generate: Call, latents: str | tuple[str, ...], text: tuple[str, ...]) -> list[str]:
    """The names of the modules whose keys and values depend on the text alone, and whose query on the latents.

    They come in module order, which need not be the order in which they run.
    """
    recorded = first_call(denoiser, generate)
    arguments = bound(denoiser, recorded)
    arguments.pop("self", None)
    own = arguments.pop("kwargs", {})
    runs = []
    for names in ((), (latents,) if isinstance(latents, str) else latents, text):
        varied = {
            name: changed(value) if name in names else copied(value) for name, value in {**arguments, **own}.items()
        }
        runs.append(_calls(denoiser, varied))
    plain, other_latents, other_text = runs
    found = []
    for name in (name for name, _ in denoiser.named_modules() if name in plain):
        query, context = plain[name]
        if not context or not isinstance(query, torch.Tensor) or name not in other_latents or name not in other_text:
            continue
        fixed = all(map(torch.equal, context, other_latents[name][1]))
        reads_text = not all(map(torch.equal, context, other_text[name][1]))
        if fixed and reads_text and not torch.equal(query, other_latents[name][0]):
            found.append(name)
    # In the order of the modules, which may be called in another (VACE); the attention itself, not what holds it.
    order = [name for name, _ in denoiser.named_modules() if name in found]
    return [name for name in order if not any(other.startswith(f"{name}.") for other in found)]


def _calls(denoiser: nn.Module, arguments: dict[str, Any]) -> dict[str, tuple[Any, list[torch.Tensor]]]:
    seen: dict[str, tuple[Any, list[torch.Tensor]]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, context = query_and_context(module, args, kwargs)
            seen[name] = (
                query.clone() if isinstance(query, torch.Tensor) else query,
                [tensor.clone() for tensor in context],
            )

        return hook

    modules = [(name, module) for name, module in denoiser.named_modules() if "Attention" in type(module).__name__]
    handles = [module.register_forward_pre_hook(watch(name), with_kwargs=True) for name, module in modules]
    with hooked(*handles), torch.no_grad():
        denoiser(**arguments)
    return seen


@dataclass
class Network:
    """One denoiser: its sites, and what the gate has kept of them."""

    module: nn.Module
    sites: list[str]
    gate: int | None = None
    kept: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    first_output: Any = None
    before: dict[int, Any] = field(default_factory=dict)  # the outputs of the last full step, by call
    computed: list[tuple[int, Any]] = field(default_factory=list)  # what counts, after the gate
    forecast: int = 0  # how many steps were extrapolated

    def last_full(self, step: int, full: tuple[int, ...]) -> int:
        """The last step up to this one of which nothing is replaced."""
        assert self.gate is not None
        if step < self.gate:
            return step
        return max([self.gate - 1, *[each for each in full if self.gate <= each <= step]])

    def extrapolated(self, step: int) -> Any:
        """What the last two outputs that count say of a step."""
        *earlier, (last, output) = self.computed
        if not earlier:
            return mapped(torch.clone, output)
        before, start = earlier[-1]
        slope = (step - last) / (last - before)
        return both_mapped(lambda now, then: now + slope * (now - then), output, start)


def blended(unconditional: torch.Tensor, conditional: torch.Tensor, weight: float) -> torch.Tensor:
    """What is cached of both branches."""
    if weight == 0.5:
        return (unconditional + conditional) / 2
    return unconditional + weight * (conditional - unconditional)


def gated(
    networks: list[Network],
    generate: Call,
    gate: int,
    form: str,
    calls: int = 1,
    keep: str = "positive",
    loop: int | None = None,
    companions: list[Network] | None = None,
    companions_form: str = "batch",
    weight: float = 0.5,
    forecast: int = 1,
    steps: int | None = None,
    level: Callable[[int], float] | None = None,
    full: tuple[int, ...] = (),
) -> Any:
    """Generate with the gate.

    Args:
        networks: the denoisers.
        generate: calls the pipeline.
        gate: the first gated step.
        form: how guidance reaches them: "batch", "reversed", "calls", "none" or "whole", of which nothing is cut.
        calls: how many calls a step has.
        keep: the branch that goes on, of a batch.
        loop: how many steps each of the pipeline's loops has, if it has several; each is gated by itself.
        companions: what runs once a step, before the denoiser does; of a batch all rows are computed, for of what it
            gives the denoiser only one branch's rows go on.
        companions_form: how guidance reaches these, "batch" or "none".
        weight: of the conditional branch, in what is cached of both.
        forecast: from the gate on only every such step's output counts, and that of the last one; between, it is
            extrapolated.
        steps: how many there are, for that.
        level: for guidance that goes on, by a step's index: what a difference of predictions times this is one of
            noise.
        full: steps after the gate of which nothing is replaced, and what they give is kept from there on.
    """
    position = {"calls": -1}
    # From the order of the branches to unconditional, conditional, and back.
    ordered = slice(None, None, -1 if form == "reversed" else 1)
    half = ("negative", "positive")[ordered].index(keep) if form in ("batch", "reversed") else 0
    handles = []
    for network in networks:

        def begin(module: nn.Module, args: Any, kwargs: Any, network: Network = network) -> None:
            position["calls"] += 1
            if loop is not None and position["calls"] == loop * calls:
                position["calls"] = 0
            if network.gate is None:
                network.gate = max(gate, position["calls"] // calls + 1)

        def keep_or_replace(name: str, network: Network) -> Any:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
                step, call = divmod(position["calls"], calls)
                if network.last_full(step, full) == step:
                    network.kept[name, call] = output
                    return output
                kept = network.kept[name, 0]
                if form in ("batch", "reversed"):
                    return torch.cat([blended(*kept.chunk(2)[ordered], weight)] * 2)
                return blended(network.kept[name, 1], kept, weight) if calls == 2 else kept

            return hook

        def answer(module: nn.Module, args: Any, output: Any, network: Network = network) -> Any:
            step, call = divmod(position["calls"], calls)
            assert network.gate is not None
            last = network.last_full(step, full)
            if last == step:
                network.before[call] = output
                if call == 0 and step >= network.gate:
                    network.computed.append((step, mapped(torch.clone, output)))
                return output
            if call == 0:
                computed = (step - max(last, network.gate)) % forecast == 0 or step + 1 == steps
                if computed:
                    network.computed.append((step, mapped(torch.clone, output)))
                else:
                    output = network.extrapolated(step)
                    network.forecast += 1
                network.first_output = output
            if form in ("batch", "reversed"):
                if level is None:
                    return mapped(lambda tensor: torch.cat([tensor.chunk(2)[half]] * 2), output)
                (both,) = network.before.values()
                factor = level(last) / level(step)

                def guided(now: torch.Tensor, then: torch.Tensor) -> torch.Tensor:
                    unconditional, conditional = then.chunk(2)[ordered]
                    own = now.chunk(2)[half]
                    return torch.cat([own - factor * (conditional - unconditional), own][ordered])

                return both_mapped(guided, output, both)
            if level is None or call == 0 or calls == 1:
                return network.first_output
            factor = level(last) / level(step)
            difference = both_mapped(torch.sub, network.before[0], network.before[1])
            return both_mapped(lambda own, ahead: own - factor * ahead, network.first_output, difference)

        handles.append(network.module.register_forward_pre_hook(begin, with_kwargs=True))
        handles += [
            network.module.get_submodule(name).register_forward_hook(keep_or_replace(name, network))
            for name in network.sites
        ]
        handles.append(network.module.register_forward_hook(answer))
    handles += [
        handle
        for each in companions or ()
        for handle in _companion_hooks(each, position, gate, companions_form, weight, full)
    ]
    with hooked(*handles):
        return generate()


def _companion_hooks(
    network: Network, position: dict[str, int], gate: int, form: str, weight: float, full: tuple[int, ...]
) -> list[Any]:
    """Hooks that replace what the sites give after each full step, or after the first one that comes later.

    Args:
        network: the companion.
        position: how often the denoiser was called before.
        gate: the first gated step.
        form: "batch" or "none".
        weight: of the conditional branch.
        full: steps after the gate of which nothing is replaced.
    """
    kept_at: dict[str, int] = {}

    def keep_or_replace(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            step = position["calls"] + 1
            last = max([gate - 1, *[each for each in full if gate <= each <= step]])
            if step < last:
                return output
            if kept_at.get(name, -1) < last:
                kept_at[name] = step
            if kept_at[name] == step:
                network.kept[name, 0] = output
                return output
            kept = network.kept[name, 0]
            if form == "none":
                return kept
            return torch.cat([blended(*kept.chunk(2), weight)] * 2)

        return hook

    return [network.module.get_submodule(name).register_forward_hook(keep_or_replace(name)) for name in network.sites]


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same structure with a function of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)(**{name: mapped(function, item) for name, item in value.items()})
    return type(value)(mapped(function, item) for item in value) if type(value) in (list, tuple) else value


def both_mapped(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], value: Any, other: Any) -> Any:
    """The first of two values of the same structure, with a function of each of its tensors and the other's."""
    following = iter(tensors_in(other))
    return mapped(lambda tensor: function(tensor, next(following)), value)
