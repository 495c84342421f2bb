"""Cosmos 1, Predict 2, Predict 2.5 and Transfer 2.5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2_5_TransferPipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosControlNetModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos
from diffusers.utils import is_torchvision_available
from torch.nn import functional

from . import STEPS, Entry, generator, noise, quiet, seeded
from .wan import unipc
from .wan import vae as wan_vae
from .wan_image_to_video import picture


class Transforms:
    """The one thing that Cosmos needs of torchvision, which diffusers does not install."""

    class InterpolationMode:
        NEAREST = "nearest"

    class functional:  # noqa: N801
        @staticmethod
        def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
            return functional.interpolate(image, size, mode=interpolation)


if not is_torchvision_available():
    vars(transformer_cosmos)["transforms"] = vars(controlnet_cosmos)["transforms"] = Transforms

_WIDTH = 24
_IMAGE_CONTEXT = {"img_context_dim_in": 8, "img_context_dim_out": _WIDTH}
_SHARED: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "rope_scale": (2.0, 1.0, 1.0),
}


class Unchecked:
    """In place of the checker of what is generated."""

    def to(self, device: Any) -> None:
        pass


def transformer(**changes: Any) -> Any:
    return seeded(
        lambda: CosmosTransformer3DModel(
            **{
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 2,
                "concat_padding_mask": True,
                **_SHARED,
                **changes,
            }
        )
    )


def cosmos_vae() -> Any:
    return seeded(
        lambda: AutoencoderKLCosmos(
            latent_channels=16,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            patch_size=4,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )
    )


def edm() -> Any:
    return EDMEulerScheduler(sigma_data=0.5, sigma_max=80.0, sigma_min=0.002, final_sigmas_type="sigma_min")


def pipeline(cls: type[Any], **parts: Any) -> Any:
    return quiet(cls(**{"tokenizer": None, "text_encoder": None, "safety_checker": Unchecked(), **parts}))


def first(cls: type[Any], **changes: Any) -> Any:
    return pipeline(cls, transformer=transformer(**changes), vae=cosmos_vae(), scheduler=edm())


def second(cls: type[Any], **changes: Any) -> Any:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    return pipeline(cls, transformer=transformer(**changes), vae=wan_vae(), scheduler=scheduler)


def predict() -> Any:
    return pipeline(
        Cosmos2_5_PredictBasePipeline,
        transformer=transformer(in_channels=17, use_crossattn_projection=True, **_PROJECTION),
        vae=wan_vae(),
        scheduler=unipc(),
    )


_PROJECTION = {"crossattn_proj_in_channels": 32, "encoder_hidden_states_channels": 32}


def transfer() -> Any:
    return pipeline(
        Cosmos2_5_TransferPipeline,
        transformer=transformer(in_channels=17, img_context_num_tokens=3, controlnet_block_every_n=1, **_IMAGE_CONTEXT),
        controlnet=seeded(
            lambda: CosmosControlNetModel(
                n_controlnet_blocks=2,
                in_channels=18,
                latent_channels=18,
                model_channels=_WIDTH,
                **_SHARED,
                **_IMAGE_CONTEXT,
            ),
            seed=1,
        ),
        vae=wan_vae(),
        scheduler=unipc(),
    )


def inputs(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 16, 32, seed=1),
        "negative_prompt_embeds": noise(1, 16, 32, seed=2),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
        "output_type": "latent",
        "generator": generator(),
        **changes,
    }


def image_inputs() -> dict[str, Any]:
    given = inputs()
    del given["num_frames"]
    return given


ENTRIES = [
    Entry("CosmosTextToWorldPipeline", lambda: first(CosmosTextToWorldPipeline), inputs, form="calls"),
    Entry(
        "CosmosVideoToWorldPipeline",
        lambda: first(CosmosVideoToWorldPipeline, in_channels=17),
        lambda: inputs(image=picture(32)),
        form="calls",
    ),
    Entry(
        "CosmosVideoToWorldPipeline with input frames guidance",
        lambda: first(CosmosVideoToWorldPipeline, in_channels=17),
        lambda: inputs(image=picture(32), input_frames_guidance=True),
        form="calls",
    ),
    Entry(
        "Cosmos2TextToImagePipeline",
        lambda: second(Cosmos2TextToImagePipeline),
        image_inputs,
        form="calls",
        output="images",
    ),
    Entry(
        "Cosmos2VideoToWorldPipeline",
        lambda: second(Cosmos2VideoToWorldPipeline, in_channels=17),
        lambda: inputs(image=picture(32)),
        form="calls",
    ),
    Entry("Cosmos2_5_PredictBasePipeline", predict, inputs, form="calls"),
    Entry(
        "Cosmos2_5_PredictBasePipeline with a video",
        predict,
        lambda: inputs(video=[picture(32, seed) for seed in range(5)], num_latent_conditional_frames=1),
        form="calls",
    ),
    Entry(
        "Cosmos2_5_TransferPipeline",
        transfer,
        lambda: inputs(controls=[picture(32, seed) for seed in range(5)], num_frames_per_chunk=5),
        form="calls",
    ),
    Entry(
        "Cosmos2_5_TransferPipeline in two chunks",
        transfer,
        lambda: inputs(controls=[picture(32, seed) for seed in range(9)], num_frames=9, num_frames_per_chunk=5),
        form="calls",
        loop=STEPS,
    ),
    Entry(
        "Cosmos2VideoToWorldPipeline unguided",
        lambda: second(Cosmos2VideoToWorldPipeline, in_channels=17),
        lambda: inputs(image=picture(32), guidance_scale=1.0),
        form="none",
    ),
]
