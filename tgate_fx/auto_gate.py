"""A gate that opens by itself: once both guidance branches predict nearly the same.

The rule is Adaptive Guidance's (Castillo et al., arXiv:2312.12487), which drops guidance from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import ArgumentError, as_float, checked_count
from .inputs import tensors_in


@dataclass(frozen=True)
class AutoGate:
    """Open the gate once both branches' predictions are nearly the same, for every image of a batch.

    Attributes:
        similarity: the gate opens after the first step at which the cosine similarity of both branches' outputs is
            that large for every row; on an accelerator a step later, so that nothing waits for it.
        earliest: the first step that may be gated, ≥ 1.
        latest: the step at which the gate opens in any case; None if it may stay closed, as it does where a callback
            ends guidance before.
    """

    similarity: float = 0.991
    earliest: int = 1
    latest: int | None = None

    def __post_init__(self) -> None:
        similarity = as_float(self.similarity)
        if similarity is None or not -1 <= similarity <= 1:
            raise ArgumentError(
                f"similarity={self.similarity!r} ({type(self.similarity).__name__}) is no cosine similarity: expected "
                "a number from -1 to 1, such as 0.991."
            )
        object.__setattr__(self, "similarity", similarity)
        object.__setattr__(self, "earliest", checked_count("earliest", self.earliest, least=1))
        if self.latest is not None:
            object.__setattr__(self, "latest", checked_count("latest", self.latest, least=self.earliest))


class Watch:
    """The similarities of one loop's steps, and when the gate opens.

    Attributes:
        similarity: of the branches, at the step that opened the gate; None if none did.
    """

    def __init__(self, rule: AutoGate) -> None:
        self._rule = rule
        self._seen: list[tuple[int, torch.Tensor, Any]] = []
        self.similarity: float | None = None

    def note(self, index: int, conditional: Any, unconditional: Any) -> None:
        """Compare both branches' outputs at the step with this index; does not wait for the device."""
        one, other = (tensors_in(output)[0].flatten(1).float() for output in (conditional, unconditional))
        similarity = torch.nn.functional.cosine_similarity(one, other).amin()
        if similarity.device.type != "cuda":
            self._seen.append((index, similarity, None))
            return
        copy = torch.empty((), dtype=similarity.dtype, device="cpu", pin_memory=True)
        copy.copy_(similarity, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(similarity.device))
        self._seen.append((index, copy, copied))

    def check_can_open(self) -> None:
        """Raise `ArgumentError`, in a generation without guidance, unless the gate opens in any case."""
        if self._rule.latest is None:
            raise ArgumentError(
                f"gate_step={self._rule} was given, and there is no guidance, of whose branches it could tell how much "
                "alike they are: expected guidance, or a latest step. Give gate_step as a number, or "
                "tgate_fx.AutoGate(latest=...)."
            )

    def opens_at(self, index: int) -> bool:
        """Return whether the step with this index, which begins, is the first gated one."""
        if index < self._rule.earliest:
            return False
        for noted, similarity, copied in self._seen:
            if noted + (copied is not None) < index:
                if copied is not None:
                    copied.synchronize()  # of the step before the last one: the device is at the last one yet
                value = float(similarity)
                if value >= self._rule.similarity:
                    self.similarity = value
                    return True
        self._seen = [each for each in self._seen if each[0] + (each[2] is not None) >= index]
        return self._rule.latest is not None and index >= self._rule.latest
