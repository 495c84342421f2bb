"""What else has the UNet of Stable Diffusion: other inputs beside the text, or an image in its place."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from transformers import CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests import tiny

from . import STEPS, Entry, generator, noise, quiet, seeded
from .controlnet import UNET, WIDTH, image, inputs, pipeline


def unet(**changes: Any) -> Any:
    return seeded(lambda: tiny.unet(**{**tiny.ONE_BLOCK, **changes}))


def unclip_parts() -> dict[str, Any]:
    return {
        "unet": unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        "image_normalizer": seeded(lambda: StableUnCLIPImageNormalizer(embedding_dim=WIDTH)),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": tiny.tokenizer(),
        "text_encoder": seeded(tiny.text_encoder),
    }


def unclip() -> Any:
    """A transformer makes the image's embedding from the text first; it has self-attention only and is not gated."""
    return pipeline(
        "StableUnCLIPPipeline",
        prior_tokenizer=tiny.tokenizer(),
        prior_text_encoder=seeded(lambda: tiny.text_encoder(CLIPTextModelWithProjection)),
        prior=seeded(
            lambda: PriorTransformer(num_attention_heads=2, attention_head_dim=8, embedding_dim=WIDTH, num_layers=1)
        ),
        prior_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
        **unclip_parts(),
    )


def image_encoder() -> Any:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=16,
        intermediate_size=37,
        patch_size=8,
    )
    return seeded(lambda: CLIPVisionModelWithProjection(config))


def variation() -> Any:
    return quiet(
        diffusers.StableDiffusionImageVariationPipeline(
            vae=seeded(tiny.vae),
            image_encoder=image_encoder(),
            unet=unet(),
            scheduler=tiny.scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def latent_diffusion() -> Any:
    return quiet(
        diffusers.LDMTextToImagePipeline(
            vqvae=seeded(tiny.vae),
            bert=seeded(tiny.text_encoder),
            tokenizer=tiny.tokenizer(),
            unet=unet(),
            scheduler=tiny.scheduler(),
        )
    )


def cycle() -> Any:
    return pipeline(
        "CycleDiffusionPipeline",
        tokenizer=tiny.tokenizer(),
        text_encoder=seeded(tiny.text_encoder),
        unet=unet(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def marigold(kind: str = "Depth", targets: int = 1, **settings: Any) -> Any:
    """The image is conditioning, and the text is empty."""
    pipe = pipeline(
        f"Marigold{kind}Pipeline",
        unet=unet(in_channels=4 + 4 * targets, out_channels=4 * targets),
        prediction_type=kind.lower(),
        **settings,
    )
    pipe.empty_text_embedding = noise(1, 2, WIDTH, seed=1, scale=3)
    return pipe


def worded(**changes: Any) -> dict[str, Any]:
    """A prompt, for pipelines that embed it themselves."""
    given = {"prompt": "a red cat", "negative_prompt": "dogs", **changes}
    return {name: value for name, value in inputs(**given).items() if not name.endswith("prompt_embeds")}


def one_image(**changes: Any) -> dict[str, Any]:
    return inputs(image=image(), strength=1.0, **changes)


def varied() -> dict[str, Any]:
    given = inputs(image=noise(1, 3, 16, 16, seed=5), height=16, width=16)
    return {name: value for name, value in given.items() if not name.endswith("prompt_embeds")}


def depth(**changes: Any) -> dict[str, Any]:
    return {
        "image": image(),
        "num_inference_steps": STEPS,
        "processing_resolution": 0,
        "output_latent": True,
        "generator": generator(),
        **changes,
    }


def from_source() -> dict[str, Any]:
    given = worded(source_prompt="dogs", image=image(), strength=1.0, source_guidance_scale=2.0)
    del given["negative_prompt"]
    return given


def from_words() -> dict[str, Any]:
    given = worded(height=64, width=64, output_type="pt")
    del given["negative_prompt"]
    return given


ENTRIES = [
    Entry(
        "StableUnCLIPPipeline",
        unclip,
        lambda: worded(height=16, width=16, prior_num_inference_steps=2),
        **UNET,
    ),
    Entry(
        "StableUnCLIPImg2ImgPipeline",
        lambda: pipeline(
            "StableUnCLIPImg2ImgPipeline", feature_extractor=None, image_encoder=image_encoder(), **unclip_parts()
        ),
        lambda: inputs(image_embeds=noise(1, WIDTH, seed=6), height=16, width=16),
        **UNET,
    ),
    Entry("StableDiffusionImageVariationPipeline", variation, varied, **UNET),
    Entry(
        "StableDiffusionDepth2ImgPipeline",
        lambda: pipeline(
            "StableDiffusionDepth2ImgPipeline", unet=unet(in_channels=5), depth_estimator=None, feature_extractor=None
        ),
        lambda: one_image(depth_map=noise(1, 16, 16, seed=6)),
        **UNET,
    ),
    Entry("LDMTextToImagePipeline", latent_diffusion, from_words, **UNET),
    # It guides at every scale but 1.
    Entry("LDMTextToImagePipeline below 1", latent_diffusion, lambda: {**from_words(), "guidance_scale": -4.0}, **UNET),
    Entry("MarigoldDepthPipeline", marigold, depth, form="none", **{**UNET, "output": "latent"}),
    Entry("CycleDiffusionPipeline", cycle, from_source, **UNET),
]
