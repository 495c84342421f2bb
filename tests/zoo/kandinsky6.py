"""Kandinsky 6, with and without sound and an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel

from . import STEPS, Entry, generator, noise, quiet, seeded
from .kandinsky5 import video_vae
from .wan_image_to_video import picture


class Sound:
    """In place of the decoder of sound and of the vocoder, of which only these numbers are asked."""

    config = SimpleNamespace(sample_rate=44_100)
    latent_hop_length = 1024


def make() -> Any:
    transformer = seeded(
        lambda: Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=16,
            time_dim=16,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
            in_audio_dim=4,
            out_audio_dim=4,
            visual_token_type_num_embeddings=2,
        )
    )
    pipe = Kandinsky6TI2VAPipeline(
        transformer=transformer,
        vae=video_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=Sound(),
        vocoder=Sound(),
    )
    return quiet(pipe)


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 8, 32, seed=1),
        "pooled_prompt_embeds": noise(1, 16, seed=2),
        "negative_prompt_embeds": noise(1, 8, 32, seed=3),
        "negative_pooled_prompt_embeds": noise(1, 16, seed=4),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


_BOTH = ("hidden_states", "audio_hidden_states")

ENTRIES = [
    Entry("Kandinsky6TI2VAPipeline", make, inputs, form="calls", latents=_BOTH),
    Entry(
        "Kandinsky6TI2VAPipeline from an image",
        make,
        lambda: inputs(image=picture(32)),
        form="calls",
        latents=_BOTH,
    ),
]
