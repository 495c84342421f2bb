"""Perturbed-attention guidance: a third chunk in the batch, in which some self-attentions do nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from . import Entry, hunyuandit, kolors, pixart, sana
from . import animatediff as animate
from .controlnet import SDXL, UNET, from_image, image, inpaint, inputs, pipeline, pooled, sd, with_controlnet, xl
from .sd_variants import one_image, unet

SCALE = {"pag_scale": 3.0}
WHOLE: dict[str, Any] = {**UNET, "form": "whole"}
SD, XL = "StableDiffusion", "StableDiffusionXL"


def xl_alone(name: str) -> Any:
    return pipeline(name, unet=unet(**SDXL), text_encoder_2=None, tokenizer_2=None, add_watermarker=False)


def inpainted(**changes: Any) -> dict[str, Any]:
    given = inpaint(**SCALE, **changes)
    del given["control_image"]
    return given


def clear(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with a text that changes more within a few steps."""
    return {name: 20 * value if name.endswith("prompt_embeds") else value for name, value in inputs.items()}


def like(entry: Entry, pipeline: str, make: Any, given: Any = None) -> Entry:
    """The entry of a pipeline without this guidance, for the one with it."""
    given = given or entry.inputs
    return dataclasses.replace(entry, pipeline=pipeline, make=make, inputs=lambda: {**given(), **SCALE}, form="whole")


BESIDE: dict[str, Any] = {**WHOLE, "companions": ("controlnet",), "companions_form": "none", "graphs": 4}

ENTRIES = [
    Entry(f"{SD}PAGPipeline", lambda: sd(f"{SD}PAGPipeline"), lambda: inputs(height=16, width=16, **SCALE), **WHOLE),
    # Near the end its scale is 0; the batch stays as it is.
    Entry(
        f"{SD}PAGPipeline adaptive",
        lambda: sd(f"{SD}PAGPipeline"),
        lambda: inputs(height=16, width=16, pag_adaptive_scale=0.006, **SCALE),
        **WHOLE,
    ),
    # Two chunks, of which none is without the text.
    Entry(
        f"{SD}PAGPipeline unguided",
        lambda: sd(f"{SD}PAGPipeline"),
        lambda: inputs(height=16, width=16, **{**SCALE, "guidance_scale": 1.0}),
        **WHOLE,
    ),
    Entry(f"{SD}PAGImg2ImgPipeline", lambda: sd(f"{SD}PAGImg2ImgPipeline"), lambda: one_image(**SCALE), **WHOLE),
    Entry(f"{SD}PAGInpaintPipeline", lambda: sd(f"{SD}PAGInpaintPipeline"), inpainted, **WHOLE),
    Entry(
        f"{SD}ControlNetPAGPipeline",
        lambda: with_controlnet(f"{SD}ControlNetPAGPipeline"),
        lambda: inputs(image=image(), **SCALE),
        **BESIDE,
    ),
    Entry(
        f"{SD}ControlNetPAGInpaintPipeline",
        lambda: with_controlnet(f"{SD}ControlNetPAGInpaintPipeline"),
        lambda: inpaint(**SCALE),
        **BESIDE,
    ),
    Entry(
        f"{XL}PAGPipeline",
        lambda: xl_alone(f"{XL}PAGPipeline"),
        lambda: inputs(height=16, width=16, **pooled(**SCALE)),
        **WHOLE,
    ),
    Entry(
        f"{XL}PAGImg2ImgPipeline",
        lambda: xl_alone(f"{XL}PAGImg2ImgPipeline"),
        lambda: one_image(**pooled(**SCALE)),
        **WHOLE,
    ),
    Entry(
        f"{XL}PAGInpaintPipeline", lambda: xl_alone(f"{XL}PAGInpaintPipeline"), lambda: inpainted(**pooled()), **WHOLE
    ),
    Entry(
        f"{XL}ControlNetPAGPipeline",
        lambda: xl(f"{XL}ControlNetPAGPipeline"),
        lambda: inputs(image=image(), **pooled(**{**SCALE, "guidance_scale": 8.0})),
        **BESIDE,
    ),
    Entry(
        f"{XL}ControlNetPAGImg2ImgPipeline",
        lambda: xl(f"{XL}ControlNetPAGImg2ImgPipeline"),
        lambda: from_image(**pooled(**SCALE)),
        **BESIDE,
    ),
    like(pixart.ENTRIES[-1], "PixArtSigmaPAGPipeline", lambda: pixart.make("PixArtSigmaPAGPipeline")),
    like(hunyuandit.ENTRIES[0], "HunyuanDiTPAGPipeline", lambda: hunyuandit.pipeline("HunyuanDiTPAGPipeline")),
    like(sana.ENTRIES[0], "SanaPAGPipeline", lambda: sana.pipeline("SanaPAGPipeline")),
    like(
        kolors.ENTRIES[0],
        "KolorsPAGPipeline",
        lambda: kolors.pipeline("pipeline_pag_kolors", "KolorsPAGPipeline", package="pag"),
        lambda: clear(kolors.embedded()),
    ),
    like(animate.ENTRIES[0], "AnimateDiffPAGPipeline", lambda: animate.pipeline("AnimateDiffPAGPipeline")),
]
