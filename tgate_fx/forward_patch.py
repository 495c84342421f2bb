"""An instance-level ``forward`` on a module, put beneath all hooks and taken off again.

diffusers' own ``HookRegistry`` does not serve here (0.42.1): a hook of its that lies over one of accelerate's is lost
when that is removed, as happens after every generation with offloading, and removing it leaves attributes behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn

from .errors import StateError
from .private import BENEATH_HOOK

_Copied = TypeVar("_Copied", bound="ForwardPatch")


class ForwardPatch:
    """What a module calls in place of its ``forward``. It is copied together with its module, but never pickled.

    No module is added or wrapped: state_dict keys, module names and hooks stay as they are.

    Attributes:
        original_forward: the forward that was there before; call it to run the module as it was.
    """

    original_forward: Callable[..., Any]

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def attach(self) -> None:
        """Take the place of the module's ``forward``, beneath the hooks that are on it."""
        name = BENEATH_HOOK if BENEATH_HOOK in vars(self._module) else "forward"
        self._was_class_forward = name not in vars(self._module)
        self.original_forward = getattr(self._module, name)
        setattr(self._module, name, self)

    def detach(self) -> None:
        """Put the earlier forward back, wherever hooks have moved this one to in the meantime.

        Where some other code has wrapped this one in a forward of its own, it stays inside that wrapper: it then only
        passes calls on.
        """
        attributes = vars(self._module)
        if attributes.get("forward") is self:
            if self._was_class_forward:
                del self._module.forward
            else:
                self._module.forward = self.original_forward
        elif attributes.get(BENEATH_HOOK) is self:
            setattr(self._module, BENEATH_HOOK, self.original_forward)

    @property
    def is_outermost(self) -> bool:
        """Whether a call of the module comes here first, and not to some other forward put on top."""
        return vars(self._module).get("forward") is self

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
