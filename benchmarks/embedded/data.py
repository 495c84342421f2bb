"""Pictures of scenes as tensors, drawn from seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from tgate_fx.demo.scenes import Scene

from .drawing import draw
from .models import Classifier


def pictures(scenes: Sequence[Scene], seed: int, *, progress: bool = False) -> torch.Tensor:
    """A drawing of each scene: uint8 [N, 3, 64, 64]."""
    rng = random.Random(seed)
    drawn = [draw(scene, rng) for scene in tqdm(scenes, desc="drawing", disable=not progress)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def normalised(drawn: torch.Tensor) -> torch.Tensor:
    """Pixels of uint8 as floats in [-1, 1]."""
    return (drawn.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def labels(scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """The index of the right answer for each of the classifier's questions, -100 where a scene has no such object."""
    rows = [scene.attributes() for scene in scenes]
    return {
        name: torch.tensor([values.index(row[name]) if name in row else -100 for row in rows])
        for name, values in Classifier.answers.items()
    }
