"""Full-size architectures by their public configurations, with random weights."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tgate_fx.architectures import ARCHITECTURES

TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
}


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, from the vocabulary that the `open_clip_torch` and `openai-clip` packages ship.

    Raises:
        SystemExit: neither is installed.
    """
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            path = Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")
            if path.exists():
                return _tokenizer_of(path)
    raise SystemExit("No CLIP vocabulary found. Install one: pip install --no-deps open_clip_torch")


def _tokenizer_of(path: Path) -> CLIPTokenizer:
    # 49,408 tokens: 256 bytes, each also as the end of a word, the merges, and two special ones.
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *[letter + "</w>" for letter in letters], *["".join(merge) for merge in merges]]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def stable_diffusion(arch: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline of full size: UNet, CLIP text encoder and VAE."""
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, projection_dim=768, **TEXT_ENCODERS[arch])
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=512,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(),
        unet=ARCHITECTURES[arch].build("cpu"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.eval().requires_grad_(False)
    return pipe.to(dtype)
