"""What stands in place of a gated denoiser's ``forward``: it passes each call to the generation that it belongs to."""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .class_names import class_names
from .errors import StateError
from .forward_patch import ForwardPatch
from .sites import Sites

# The attribute of the denoiser that has its dispatch.
DISPATCH = "_tgate_dispatch"

# The owner of a dispatch that `tgate_fx.split` has attached, and of one that came with a copy of its denoiser.
SPLIT = "split"
COPIED = "copied"

RunStep = Callable[[Sequence[Any], Mapping[str, Any]], Any]  # one call of the denoiser, by its args and kwargs


# How far up the stack the caller of the denoiser is: beyond this, and three functions of torch.nn.Module.
_OUTSIDE_OF_TORCH = 4


class _Generation(NamedTuple):
    """What takes the calls of a dispatch.

    Attributes:
        run_step: runs one.
        calls_back: whether other pipelines may be called in the middle of it.
        caller: the pipeline whose calls they are, where others may be; None for a loop by hand.
    """

    run_step: RunStep
    calls_back: bool
    caller: Any

    def takes_call(self) -> bool:
        """Return whether the call that is being made is one of its own, not of a pipeline that a callback called."""
        return not self.calls_back or _calling_pipeline() is self.caller


class _Running(threading.local):
    """What takes the calls of each dispatch, for the generations that this thread is in the middle of."""

    def __init__(self) -> None:
        self.by_dispatch: dict[int, _Generation] = {}


_running = _Running()


def _calling_pipeline() -> Any:
    """Return the pipeline that is being called, the innermost of several; None if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if "DiffusionPipeline" in class_names(type(caller)):
                return caller
        frame = frame.f_back
    return None


class Dispatch(ForwardPatch):
    """Stands in place of the ``forward`` of a gated denoiser.

    Within a generation of a gated pipeline it passes each call to that; at all other times, and for every other
    pipeline that shares the denoiser, it calls the denoiser's own forward with every site LIVE.

    Attributes:
        sites: the sites of the denoiser.
        parameters: the names of its forward's parameters.
        gates: the gates of pipelines that use this dispatch; not kept alive, for a pipeline may go without `restore`.
        marks: `SPLIT`, if that uses it too; or `COPIED`.
        lock: is taken while the denoiser runs, since the roles of the sites are shared by all who call it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.sites = Sites(denoiser)
        self.__signature__ = inspect.signature(denoiser.forward)
        self.parameters = tuple(self.__signature__.parameters)
        self.gates: weakref.WeakSet[Any] = weakref.WeakSet()
        self.marks: set[str] = set()
        self._warned = False
        self.lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser, in place of its ``forward``."""
        if torch.compiler.is_dynamo_compiling():  # somebody else's graph around this denoiser
            return self.original_forward(*args, **kwargs)
        generation = _running.by_dispatch.get(id(self))
        run_step = generation.run_step if generation is not None and generation.takes_call() else None
        if run_step is None and not self._warned and self.gates and _calling_pipeline() is None:
            self._warned = True
            warnings.warn(
                f"The {type(self._module).__name__} of a gated pipeline was called outside of a generation, and ran "
                "ungated: expected calls of the pipeline. Around a loop of your own use tgate_fx.generation(pipe, "
                "steps, guided=...).",
                stacklevel=_OUTSIDE_OF_TORCH,
            )
        with self.lock:
            return self.original_forward(*args, **kwargs) if run_step is None else run_step(args, kwargs)

    @classmethod
    def of(cls, denoiser: nn.Module) -> Dispatch | None:
        """Return the dispatch of this denoiser, if any."""
        return vars(denoiser).get(DISPATCH)

    @classmethod
    def attach_to(cls, denoiser: nn.Module, owner: object) -> Dispatch:
        """Return the dispatch of this denoiser, attached if it is not yet, until every owner has detached."""
        dispatch = cls.of(denoiser)
        if dispatch is not None and not dispatch.gates and not dispatch.marks:
            with dispatch.lock:
                dispatch._take_off()  # whoever used it is gone
            dispatch = None
        if dispatch is None:
            dispatch = cls(denoiser)
            dispatch.attach()
            setattr(denoiser, DISPATCH, dispatch)
        dispatch.marks.discard(COPIED)
        dispatch._users_like(owner).add(owner)
        return dispatch

    def detach_from(self, owner: object) -> None:
        """Take the dispatch and the sites off the denoiser, if nobody else uses them."""
        self.marks.discard(COPIED)
        self._users_like(owner).discard(owner)
        if not self.gates and not self.marks:
            self._take_off()

    def _users_like(self, owner: object) -> Any:
        return self.marks if owner is SPLIT else self.gates

    def _take_off(self) -> None:
        self.detach()
        self.sites.detach()
        delattr(self._module, DISPATCH)

    def __deepcopy__(self, memo: dict[int, Any]) -> Dispatch:
        memo[id(self.lock)] = threading.RLock()
        memo[id(self.gates)] = weakref.WeakSet()  # no pipeline gates the copy
        memo[id(self.marks)] = {COPIED}
        return super().__deepcopy__(memo)

    @contextmanager
    def running(self, run_step: RunStep, *, calls_back: bool) -> Iterator[None]:
        """Context manager: the denoiser's calls in this thread go to ``run_step``, but for those of other pipelines.

        Args:
            run_step: runs one call.
            calls_back: whether other pipelines may be called meanwhile, by a callback.
        """
        running = _running.by_dispatch
        if id(self) in running:
            raise StateError(
                "The denoiser is in the middle of a generation in this thread: expected that to end before the next "
                "begins. Do not call a gated pipeline from a callback of another that shares its denoiser."
            )
        running[id(self)] = _Generation(run_step, calls_back, _calling_pipeline() if calls_back else None)
        try:
            yield
        finally:
            del running[id(self)]
