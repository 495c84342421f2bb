"""An instance-level ``forward`` on a module, installed in the innermost slot and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn

from .errors import StateError

_Copied = TypeVar("_Copied", bound="Replacement")

# accelerate's hooks replace `module.forward` and keep the one they found here: beneath them is the place that
# survives their being removed and added again (diffusers does so after every generation with CPU offload).
_BENEATH_HOOK = "_old_forward"


class Replacement:
    """What stands in a forward slot: it is copied together with its module, but never pickled.

    Attributes:
        inner: the forward that was there before.
    """

    inner: Callable[..., Any]

    def __deepcopy__(self: _Copied, memo: dict[int, Any]) -> _Copied:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "A gated or split denoiser cannot be pickled or given to torch.save: expected a plain module, or its "
            "state_dict. Call tgate_fx.restore first, or use save_pretrained or state_dict(), which hold the weights "
            "alone."
        )


class ForwardSlot:
    """One replacement of one module's ``forward``.

    No module is added or wrapped: state_dict keys, module names and hooks stay as they are.

    Attributes:
        inner: the forward that was there before; call it to run the module as it was.
    """

    def __init__(self, module: nn.Module, replacement: Replacement) -> None:
        self.module = module
        self.replacement = replacement
        name = _BENEATH_HOOK if _BENEATH_HOOK in vars(module) else "forward"
        self._was_class_forward = name not in vars(module)
        self.inner: Callable[..., Any] = getattr(module, name)
        setattr(module, name, replacement)

    @property
    def is_outermost(self) -> bool:
        """Whether a call of the module comes to the replacement first."""
        return vars(self.module).get("forward") is self.replacement

    def remove(self) -> None:
        """Put the earlier forward back, wherever hooks have moved the replacement to in the meantime.

        Where some other code has wrapped the replacement in a forward of its own, it stays inside that wrapper:
        it then only passes calls on.
        """
        attributes = vars(self.module)
        if attributes.get("forward") is self.replacement:
            if self._was_class_forward:
                del self.module.forward
            else:
                self.module.forward = self.inner
        elif attributes.get(_BENEATH_HOOK) is self.replacement:
            setattr(self.module, _BENEATH_HOOK, self.inner)
