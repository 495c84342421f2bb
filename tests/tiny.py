"""Tiny pipelines of the real classes with random weights, made without a network."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

TOKENS = 77
TEXT_WIDTH = 32

# transformers 5 has two, of which this one needs no torchvision; transformers 4 has one, which needs none.
IMAGE_PROCESSOR = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

# For a UNet of one block on each way and one between them, the only one with attention: it compiles fastest.
ONE_BLOCK = {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "block_out_channels": (16,),
}


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters and the prompts' commonest pairs."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = {token: index for index, token in enumerate([*letters, *[letter + "</w>" for letter in letters]])}
    for pair in ("ca", "cat</w>", "do", "dog</w>", "re", "red</w>"):
        vocab[pair] = len(vocab)
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    if transformers.__version__ >= "5":
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)
    with tempfile.TemporaryDirectory() as folder:  # transformers 4 reads them from files only
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab))
        files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
        return CLIPTokenizer(*map(str, files), model_max_length=TOKENS)


def text_encoder(cls: type[Any] = CLIPTextModel, width: int = TEXT_WIDTH) -> Any:
    last = len(tokenizer()) - 1
    config = CLIPTextConfig(
        vocab_size=last + 1,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    return cls(config).eval()


def image_processor(size: int) -> Any:
    return IMAGE_PROCESSOR(crop_size=size, size={"shortest_edge": size})


def vae(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **changes,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes}).eval()


def scheduler(name: str = "DDIM") -> Any:
    """A scheduler of diffusers, by the name of its class without 'Scheduler'."""
    config: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name in ("DDIM", "PNDM"):
        config.update(set_alpha_to_one=False, steps_offset=1)
    if name == "DDIM":
        config.update(clip_sample=False)
    if name == "PNDM":
        config.update(skip_prk_steps=True)
    return getattr(diffusers, name + "Scheduler")(**config)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd(cls: str = "StableDiffusionPipeline", seed: int = 0, **unet_changes: Any) -> Any:
    torch.manual_seed(seed)
    lcm = cls.startswith("LatentConsistency")
    return _quiet(
        getattr(diffusers, cls)(
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=tokenizer(),
            unet=unet(**({"time_cond_proj_dim": 8} if lcm else {}), **unet_changes),
            scheduler=scheduler("LCM" if lcm else "DDIM"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sdxl(cls: str = "StableDiffusionXLPipeline", seed: int = 0, **unet_changes: Any) -> Any:
    torch.manual_seed(seed)
    changes: dict[str, Any] = {
        "cross_attention_dim": 2 * TEXT_WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 8,
        "transformer_layers_per_block": (2, 1),
    }
    return _quiet(
        getattr(diffusers, cls)(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(**{**changes, **unet_changes}),
            scheduler=scheduler(),
            add_watermarker=False,
        )
    )


def svd(seed: int = 0) -> Any:
    """Stable Video Diffusion: call it with `svd_inputs`."""
    torch.manual_seed(seed)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    ).eval()
    temporal_vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
    ).eval()
    vision = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=37,
        patch_size=16,
    )
    return _quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=temporal_vae,
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                interpolation_type="linear",
                prediction_type="v_prediction",
                sigma_max=700.0,
                sigma_min=0.002,
                steps_offset=1,
                timestep_spacing="leading",
                timestep_type="continuous",
                use_karras_sigmas=True,
            ),
            feature_extractor=image_processor(32),
        )
    )


def svd_inputs() -> dict[str, Any]:
    image = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    return {"image": image, "height": 32, "width": 32, "num_frames": 2, "decode_chunk_size": 1}


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    config: dict[str, Any] = {
        "sample_size": 8,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 3,
        "caption_channels": TEXT_WIDTH,
        "in_channels": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    return PixArtTransformer2DModel(**{**config, **changes}).eval()


def pixart(cls: str = "PixArtAlphaPipeline", seed: int = 0, **transformer_changes: Any) -> Any:
    """PixArt without tokenizer and text encoder: call it with `pixart_inputs`.

    With ``sample_size=128`` the alpha pipeline also conditions on resolution and aspect ratio.
    """
    torch.manual_seed(seed)
    return _quiet(
        getattr(diffusers, cls)(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            transformer=pixart_transformer(**transformer_changes),
            scheduler=scheduler("DPMSolverMultistep"),
        )
    )


def pixart_inputs(prompts: int = 1, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = (prompts, 12, TEXT_WIDTH)
    mask = torch.ones(prompts, 12)
    mask[:, 9:] = 0
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": torch.randn(shape, generator=generator),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": torch.randn(shape, generator=generator),
        "negative_prompt_attention_mask": torch.ones(prompts, 12),
        "use_resolution_binning": False,
        "height": 16,
        "width": 16,
    }


def text_inputs(prompts: int = 1) -> dict[str, Any]:
    return {"prompt": ["a red cat", "two dogs", "a dog on a hill"][:prompts], "height": 16, "width": 16}


MAKERS: dict[str, Callable[..., Any]] = {
    "sd": sd,
    "sd-2.1": functools.partial(sd, use_linear_projection=True, attention_head_dim=[2, 4]),
    "sd-img2img": functools.partial(sd, "StableDiffusionImg2ImgPipeline"),
    "sd-inpaint": functools.partial(sd, "StableDiffusionInpaintPipeline"),
    "sd-inpaint-9": functools.partial(sd, "StableDiffusionInpaintPipeline", in_channels=9),
    "sd-lcm": functools.partial(sd, time_cond_proj_dim=8),
    "lcm": functools.partial(sd, "LatentConsistencyModelPipeline"),
    "lcm-img2img": functools.partial(sd, "LatentConsistencyModelImg2ImgPipeline"),
    "sdxl": sdxl,
    "sdxl-img2img": functools.partial(sdxl, "StableDiffusionXLImg2ImgPipeline"),
    "sdxl-inpaint": functools.partial(sdxl, "StableDiffusionXLInpaintPipeline"),
    "sdxl-lcm": functools.partial(sdxl, time_cond_proj_dim=8),
    "pixart-alpha": functools.partial(pixart, sample_size=128, use_additional_conditions=True),
    "pixart-alpha-256": pixart,  # the 256-pixel checkpoints have no condition on the size
    "pixart-alpha-lcm": pixart,
    "pixart-sigma": functools.partial(pixart, "PixArtSigmaPipeline"),
}


# The pipeline whose inputs are no text, besides.
EVERY_MAKER = {**MAKERS, "svd": svd}

# Those whose denoisers differ in form: every other's is like one of these.
DISTINCT = ("sd", "sd-2.1", "sd-inpaint-9", "sd-lcm", "sdxl", "pixart-alpha", "pixart-sigma", "svd")

# What Dynamo traces fastest, for what is not about the model.
_SMALL: dict[str, Callable[..., Any]] = {
    "sd-small": functools.partial(sd, **ONE_BLOCK),
    "sd-img2img-small": functools.partial(sd, "StableDiffusionImg2ImgPipeline", **ONE_BLOCK),
    "sd-inpaint-small": functools.partial(sd, "StableDiffusionInpaintPipeline", **ONE_BLOCK),
    "sdxl-small": functools.partial(sdxl, transformer_layers_per_block=1, **ONE_BLOCK),
    "pixart-small": functools.partial(pixart, num_layers=1),
}


def make(family: str, seed: int = 0) -> Any:
    return {**EVERY_MAKER, **_SMALL}[family](seed=seed)


def slow_but(first: Sequence[Any], values: Iterable[Any]) -> list[Any]:
    """A test's values for one parameter, of which the default run has these only."""
    return [value if value in first else pytest.param(value, marks=pytest.mark.slow) for value in values]


def inputs(family: str, prompts: int = 1) -> dict[str, Any]:
    """What a call of this family's pipeline needs, beside the number of steps."""
    if family == "svd":
        return svd_inputs()
    if family.startswith("pixart"):
        return {**pixart_inputs(prompts), **({"guidance_scale": 0.0} if family.endswith("lcm") else {})}
    result = text_inputs(prompts)
    if "img2img" in family or "inpaint" in family:
        del result["height"], result["width"]
        generator = torch.Generator().manual_seed(3)
        result["image"] = torch.rand((prompts, 3, 16, 16), generator=generator)
        result["strength"] = 0.6
    if "inpaint" in family:
        result["mask_image"] = (torch.rand((prompts, 1, 16, 16), generator=generator) > 0.5).float()
        result.update(height=16, width=16)
    return result


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def latents(pipe: Any, *, seed: int = 7, **kwargs: Any) -> torch.Tensor:
    """The latents that one call of the pipeline ends with."""
    generator = torch.Generator().manual_seed(seed)
    result: torch.Tensor = pipe(**kwargs, generator=generator, output_type="latent", return_dict=False)[0]
    assert torch.isfinite(result).all()
    return result
