"""Read pictures with the classifier: which attributes are right, and how far two sets of pictures are apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.linalg import sqrtm

from tgate_fx.demo.scenes import Scene

from .data import labels
from .models import Classifier

CLASSIFIER_WEIGHTS = Path(__file__).parent / "classifier.safetensors"


def load_classifier() -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(CLASSIFIER_WEIGHTS).items()})
    return classifier.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def read(classifier: Classifier, pictures: torch.Tensor) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The features [N, 128] and, for every attribute, the index of the answer [N], of pictures in [-1, 1]."""
    parts = pictures.contiguous(memory_format=torch.channels_last).split(500)  # the first layers take much memory
    features = torch.cat([classifier.features(part) for part in parts])
    answers = {
        name: head(features).argmax(1).numpy() for name, head in zip(classifier.answers, classifier.heads, strict=True)
    }
    return features.numpy(), answers


def right_answers(scenes: Sequence[Scene], answers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For every attribute and picture: 1 if it is as the caption says, 0 if not, NaN if the caption says nothing of it.

    Only attributes that a scene has are asked for: a picture of one object is not judged by a second.
    """
    asked = labels(scenes)
    return {
        name: np.where(asked[name].numpy() < 0, np.nan, (answers[name] == asked[name].numpy()).astype(float))
        for name in asked
    }


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The distance between Gaussians fitted to two sets of features [N, D] (Heusel et al., arXiv:1706.08500)."""
    means = [features.mean(0) for features in (first, second)]
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    product = sqrtm(covariances[0] @ covariances[1])
    spread = np.trace(covariances[0] + covariances[1] - 2 * np.real(product))
    return float(((means[0] - means[1]) ** 2).sum() + spread)
