"""The parts of the embedded pipeline and the classifier that judges it, untrained."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tgate_fx.demo.scenes import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, TEXTURES

from .drawing import SIZE

TOKENS = 32  # the longest caption has 25
TEXT_WIDTH = 192
LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of this vocabulary, made as transformers 5 makes it."""
    vocab, merges = vocabulary()
    given: Any = {"vocab": vocab, "merges": merges}  # pairs, though its signature says strings
    return CLIPTokenizer(**given, model_max_length=TOKENS)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges, by which each of the captions' words is one token, and other words are spelled in letters."""
    said = " ".join([*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *TEXTURES, *LAYOUTS])
    words = sorted(set(re.findall(r"\w+", said + " a and in the left right of above below on background")))
    letters = [chr(code) for code in range(33, 127)]
    merges = _merges(words)
    tokens = [*letters, *[letter + "</w>" for letter in letters], *map("".join, merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return vocab, merges


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The byte-pair merges, commonest first, after which each of these words is whole.

    The tokenizers library breaks ties between equally common pairs by chance; here the order is fixed.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in spelled for pair in itertools.pairwise(parts)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(parts, best) for parts in spelled]
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def text_encoder() -> CLIPTextModel:
    words = tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=TEXT_WIDTH,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def denoiser() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def scheduler() -> DPMSolverMultistepScheduler:
    config = {
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "clip_sample": False,  # for DDIM and DDPM made from it, which by default clip pictures, not latents
    }
    made: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(config)
    return made


class Classifier(nn.Module):
    """Reads a picture: its layout, its background, and up to three objects in the order of the layout.

    Attributes:
        answers: for every attribute the values it can have, in the order of its logits.
    """

    answers: dict[str, tuple[str, ...]] = {  # noqa: RUF012
        "layout": LAYOUTS,
        "background": BACKGROUNDS,
        "texture": TEXTURES,
        **{
            f"{name} {place}": values
            for place in range(3)
            for name, values in (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
        },
    }

    def __init__(self, width: int = 24, features: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            layers += [nn.Conv2d(out, out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (SIZE // 16) ** 2, features), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(features, len(values)) for values in self.answers.values())

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the answers are read from: [N, 128], for pictures [N, 3, 64, 64] in [-1, 1]."""
        features: torch.Tensor = self.trunk(pictures)
        return features

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in zip(self.answers, self.heads, strict=True)}
