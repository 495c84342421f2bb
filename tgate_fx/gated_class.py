"""The class of a gated pipeline: a subclass of its own, of which each call is one generation."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from .errors import StateError

# Where a pipeline has its gate.
ATTRIBUTE = "_tgate"

_PLAIN_CLASS = "_tgate_plain_class"

# What `gate` takes that a call of the pipeline takes too.
KEYWORDS = (
    "gate_step",
    "sp_interval",
    "fi_interval",
    "warm_up",
    "after_gate",
    "cache_weight",
    "forecast",
    "guidance",
    "full_steps",
)


class _AsGated:
    """The default of those keywords, for which None has a meaning of its own."""

    def __repr__(self) -> str:
        return "<as gated>"


AS_GATED = _AsGated()


def gate_of(pipe: Any) -> Any:
    """Return what was put on this pipeline, if anything."""
    return getattr(pipe, "__dict__", {}).get(ATTRIBUTE)


def plain_class(cls: type[Any]) -> type[Any]:
    """Return the class that a gated pipeline's is made from; of another one's, itself."""
    return getattr(cls, _PLAIN_CLASS, None) or cls


@functools.cache
def gated_class(base: type[Any]) -> type[Any]:
    """Return a subclass of a pipeline's class whose call is one generation; it has the same name, module and behaviour.

    Only gated instances get this class: the pipeline class itself is never changed. An instance of it that was made
    from a gated one, and is not gated itself, is a plain pipeline.
    """

    @functools.wraps(base.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        gated = gate_of(self)
        if gated is None:
            return base.__call__(self, *args, **kwargs)
        return gated.generate(self, base.__call__, args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        if gate_of(self) is not None:
            raise StateError(
                "A gated pipeline can be neither copied nor pickled, since its denoiser's forwards belong to it alone: "
                "expected a plain one. Call tgate_fx.restore(pipe) first, or make another with from_pipe."
            )
        return base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]

    __call__.__signature__ = _with_keywords(inspect.signature(base.__call__))  # type: ignore[attr-defined]
    attributes: dict[str, Any] = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
    attributes |= {"__reduce_ex__": __reduce_ex__, _PLAIN_CLASS: base}
    if isinstance(getattr(base, "guidance_rescale", None), property):

        def guidance_rescale(self: Any) -> Any:
            # Where guidance sees one branch twice, rescaling would blend two equal predictions and only round them.
            gated = gate_of(self)
            return 0.0 if gated is not None and gated.branch_sliced else base.guidance_rescale.fget(self)

        attributes["guidance_rescale"] = property(guidance_rescale)
    return type(base.__name__, (base,), {**attributes, "__qualname__": base.__qualname__})


def _with_keywords(signature: inspect.Signature) -> inspect.Signature:
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=AS_GATED) for name in KEYWORDS]
    parameters = sorted([*signature.parameters.values(), *added], key=lambda parameter: parameter.kind)
    return signature.replace(parameters=parameters)
