"""AudioLDM 2: two texts, each read by transformers of its own."""

from __future__ import annotations

from typing import Any

from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded

WIDTHS = 16, 24


def vocoder() -> Any:
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        sampling_rate=16000,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1]],
        normalize_before=False,
    )
    return seeded(lambda: SpeechT5HifiGan(config))


def pipeline() -> Any:
    unet = seeded(
        lambda: AudioLDM2UNet2DConditionModel(
            block_out_channels=(16,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=((None, *WIDTHS),),  # the first transformer of three reads no text
            attention_head_dim=8,
            norm_num_groups=8,
        )
    )
    encoder = seeded(tiny.text_encoder)
    return quiet(
        AudioLDM2Pipeline(
            vae=seeded(tiny.vae),
            text_encoder=None,
            text_encoder_2=encoder,  # only asked for its dtype, as is the next
            projection_model=None,
            language_model=encoder,
            tokenizer=None,
            tokenizer_2=None,
            feature_extractor=None,
            unet=unet,
            scheduler=tiny.scheduler(),
            vocoder=vocoder(),
        )
    )


def inputs() -> dict[str, Any]:
    masks = {
        "attention_mask": (noise(1, 12) < 1).long(),
        "negative_attention_mask": (noise(1, 12, seed=5) < 1).long(),
    }
    return {
        "prompt_embeds": noise(1, 12, WIDTHS[1], seed=1),
        "negative_prompt_embeds": noise(1, 12, WIDTHS[1], seed=2),
        "generated_prompt_embeds": noise(1, 8, WIDTHS[0], seed=3),
        "negative_generated_prompt_embeds": noise(1, 8, WIDTHS[0], seed=4),
        "audio_length_in_s": 0.004,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **masks,
    }


ENTRIES = [
    Entry(
        "AudioLDM2Pipeline",
        pipeline,
        inputs,
        text=("encoder_hidden_states", "encoder_hidden_states_1"),
        latents="sample",
        output="audios",
        denoisers=("unet",),
    )
]
