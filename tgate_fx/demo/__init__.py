"""The embedded pipeline: small, trained on drawn scenes by `benchmarks/embedded`, and loaded without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import PreTrainedTokenizerBase

WEIGHTS = Path(__file__).parent / "weights"


def load() -> StableDiffusionPipeline:
    """Return a Stable Diffusion pipeline that draws one to three simple objects: 64×64 pixels, float32, on the CPU.

    It knows the words of `tgate_fx.demo.scenes` and no others: sizes, colours, shapes, where things are, and the
    background.
    """
    from diffusers import StableDiffusionPipeline

    pipe: Any = StableDiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
        str(WEIGHTS), tokenizer=None, local_files_only=True
    )
    pipe.register_modules(tokenizer=tokenizer())
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        module.float()  # the weights are stored in half precision
    loaded: StableDiffusionPipeline = pipe
    return loaded


def tokenizer() -> PreTrainedTokenizerBase:
    """The pipeline's tokenizer. (The class that it names reads its file in transformers 5, but not in 4.)"""
    from transformers import AutoTokenizer

    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)
    return loaded
