"""MobileNetV2 (Sandler et al., arXiv:1801.04381) as far as its features, under torchvision's names of the weights.

torchvision itself has to be of the very build that torch is, which a CPU's torch from a package index mostly is not.
"""

from __future__ import annotations

import torch
from torch import nn

# Of each group of blocks: how much they expand, their channels, how many there are, and the stride of the first.
_GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STAGES = (1, 3, 6, 13, 18)  # the layers after which the resolution is halved next, and the last one


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class _Block(nn.Module):
    """An inverted residual."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *([_convolution(inputs, width)] if expand > 1 else []),
            _convolution(width, width, 3, stride, groups=width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv(value)
        return value + result if self.adds else result


class MobileNetV2(nn.Module):
    """What turns pictures [N, 3, H, W] into features of five stages."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_convolution(3, 32, 3, 2)]
        channels = 32
        for expand, outputs, count, stride in _GROUPS:
            for index in range(count):
                layers.append(_Block(channels, outputs, stride if index == 0 else 1, expand))
                channels = outputs
        self.features = nn.Sequential(*layers, _convolution(channels, 1280))

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of each stage."""
        found, value = [], pictures
        for index, layer in enumerate(self.features):
            value = layer(value)
            if index in _STAGES:
                found.append(value)
        return found
