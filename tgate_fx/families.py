"""The facts of each model family, as data: one row for each denoiser class."""

from __future__ import annotations

from dataclasses import dataclass

from .guidance import GuidanceForm
from .one_batch import OneBatch, ReversedBatch
from .rows import Rows
from .separate_calls import PairedCalls, SeparateCalls


@dataclass(frozen=True)
class Family:
    """What differs between denoisers.

    Attributes:
        rows: which inputs follow the batch.
        text: the names of the inputs that carry the text, which no step reads once every cross-attention is cached.
        guidance: how guidance branches reach the denoiser.
        after_gate: the branch that goes on after the gate, unless the user says otherwise.
        sizes_are_numbers: whether position embeddings are computed from the latents' size as Python numbers, so that no
            graph of the whole model serves every size.
    """

    rows: Rows
    text: tuple[str, ...] = ("encoder_hidden_states", "encoder_attention_mask")
    guidance: type[GuidanceForm] = OneBatch
    after_gate: str = "negative"
    sizes_are_numbers: bool = False


_TEXT = ("encoder_hidden_states", "encoder_attention_mask")
_UNET = ("sample", "timestep_cond", "attention_mask", *_TEXT)
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")

_BOXES = ("boxes", "positive_embeddings", "masks")  # GLIGEN's

_MASKS = frozenset(("ip_adapter_masks",))  # one for each IP-Adapter
_IMAGES = frozenset(("image_embeds",))  # a list of such, where it is for IP-Adapters


def _wan(*batched: str, shared: tuple[str, ...] = ()) -> Family:
    """Wan and the models made from it."""
    text = ("encoder_hidden_states", "encoder_hidden_states_image")
    return Family(
        Rows(frozenset(("hidden_states", *text, *batched)), frozenset(shared)),
        text=text,
        guidance=SeparateCalls,
        after_gate="positive",
    )


# Denoiser classes whose gated pipelines are tested against an oracle. Some of their inputs come in added_cond_kwargs.
FAMILIES = {
    # image_embeds is a list with one item for each IP-Adapter, class_labels the level or the embedding of an image.
    "UNet2DConditionModel": Family(
        Rows(
            frozenset(
                (
                    *_UNET,
                    *_RESIDUALS,
                    "down_intrablock_additional_residuals",
                    "class_labels",
                    "text_embeds",
                    "time_ids",
                    "image_embeds",
                    *_BOXES,
                )
            ),
            shared=_MASKS,
            only_attended=_IMAGES,
        )
    ),
    "UNetControlNetXSModel": Family(
        Rows(frozenset((*_UNET, "class_labels", "text_embeds", "time_ids", "controlnet_cond"))), after_gate="positive"
    ),
    # The text also makes the embedding of the time, so that every step reads it.
    "Kandinsky3UNet": Family(Rows(frozenset(("sample", *_TEXT))), text=(), after_gate="positive"),
    "DreamLiteUNetModel": Family(Rows(frozenset((*_UNET, "time_ids"))), after_gate="positive"),
    # It is conditioned on two texts.
    "AudioLDM2UNet2DConditionModel": Family(
        Rows(frozenset((*_UNET, "encoder_hidden_states_1", "encoder_attention_mask_1", "class_labels"))),
        text=(*_TEXT, "encoder_hidden_states_1", "encoder_attention_mask_1"),
        after_gate="positive",
    ),
    # Pooled, the text also joins the embedding of the image's size.
    "UVit2DModel": Family(
        Rows(frozenset(("input_ids", "encoder_hidden_states", "pooled_text_emb", "micro_conds"))),
        text=("encoder_hidden_states",),
        after_gate="positive",
    ),
    "PixArtTransformer2DModel": Family(
        Rows(frozenset(("hidden_states", "attention_mask", *_TEXT, "resolution", "aspect_ratio"))),
        sizes_are_numbers=True,
    ),
    # guidance is a scale that is embedded (Sprint).
    "SanaTransformer2DModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT, "attention_mask", "guidance", "controlnet_block_samples"))),
        after_gate="positive",
    ),
    "SanaVideoTransformer3DModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT, "attention_mask", "guidance"))), after_gate="positive"
    ),
    # The timestep has a column for each frame.
    "SanaWMTransformer3DModel": Family(
        Rows(
            frozenset(("hidden_states", *_TEXT, "mask", "camera_conditions", "chunk_plucker")),
            frozenset(("img_hw",)),
        ),
        text=(*_TEXT, "mask"),
        after_gate="positive",
    ),
    # The text has a row for each frame.
    "UNetMotionModel": Family(
        Rows(
            frozenset((*_UNET, *_RESIDUALS, "text_embeds", "time_ids", "image_embeds")),
            shared=_MASKS,
            only_attended=_IMAGES,
        ),
        after_gate="positive",
    ),
    "UNet3DConditionModel": Family(Rows(frozenset((*_UNET, *_RESIDUALS, "class_labels"))), after_gate="positive"),
    "I2VGenXLUNet": Family(
        Rows(
            frozenset(("sample", "timestep_cond", "encoder_hidden_states", "fps", "image_latents", "image_embeddings"))
        ),
        after_gate="positive",
    ),
    "UNetSpatioTemporalConditionModel": Family(
        Rows(
            frozenset(("sample", "encoder_hidden_states", "added_time_ids")),
            channels_dim=2,  # [batch, frames, channels, height, width]
        ),
        # Upstream's loader for Stable Video Diffusion calls what it keeps negative, but takes it from the encoder
        # without guidance: it is the image itself, the positive branch.
        after_gate="positive",
    ),
    # The timestep may have a column for each token.
    "LTXVideoTransformer3DModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT, "video_coords")), channels_dim=2),  # [batch, tokens, channels]
        after_gate="positive",
    ),
    # Two outputs. From LTX 2.3 on the text is scaled by sigma in every block. Masks of perturbations belong to calls of
    # spatio-temporal guidance, which are no branches.
    "LTX2VideoTransformer3DModel": Family(
        Rows(
            frozenset(
                (
                    "hidden_states",
                    "audio_hidden_states",
                    *_TEXT,
                    "audio_encoder_hidden_states",
                    "audio_encoder_attention_mask",
                    "audio_timestep",
                    "sigma",
                    "audio_sigma",
                    "video_coords",
                    "audio_coords",
                    "video_self_attention_mask",
                    "video_keyframes_mask",
                )
            ),
            channels_dim=2,  # [batch, tokens, channels]
        ),
        text=(*_TEXT, "audio_encoder_hidden_states", "audio_encoder_attention_mask"),
        after_gate="positive",
    ),
    # Pooled, one of its two texts also joins the embedding of the time; the list of residuals is emptied.
    "HunyuanDiT2DModel": Family(
        Rows(
            frozenset(
                (
                    "hidden_states",
                    "encoder_hidden_states",
                    "text_embedding_mask",
                    "encoder_hidden_states_t5",
                    "text_embedding_mask_t5",
                    "image_meta_size",
                    "style",
                    "controlnet_block_samples",
                )
            ),
            frozenset(("image_rotary_emb",)),
        ),
        text=("encoder_hidden_states", "text_embedding_mask", "text_embedding_mask_t5"),
        after_gate="positive",
    ),
    # Its position embeddings are like PixArt's. The text is repeated for each frame within.
    "LatteTransformer3DModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT))), after_gate="positive", sizes_are_numbers=True
    ),
    "AllegroTransformer3DModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT, "attention_mask")), frozenset(("image_rotary_emb",))),
        after_gate="positive",
    ),
    # Both timesteps have a column for each frame.
    "AnyFlowTransformer3DModel": Family(
        Rows(
            frozenset(("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image", "r_timestep")),
            channels_dim=2,  # [batch, frames, channels, height, width]
        ),
        text=("encoder_hidden_states", "encoder_hidden_states_image"),
        after_gate="positive",
    ),
    # Pooled, the text also joins the embedding of the time, so that every step reads it.
    "LuminaNextDiT2DModel": Family(
        Rows(frozenset(("hidden_states", "encoder_hidden_states", "encoder_mask")), frozenset(("image_rotary_emb",))),
        text=(),
        guidance=ReversedBatch,
        after_gate="positive",
    ),
    # The text has the duration with it, which also joins the embedding of the time.
    "StableAudioDiTModel": Family(
        Rows(
            frozenset(("hidden_states", *_TEXT, "global_hidden_states", "attention_mask")),
            frozenset(("rotary_embedding",)),
        ),
        after_gate="positive",
    ),
    "StableAudio3DiTModel": Family(
        Rows(frozenset(("hidden_states", *_TEXT, "global_hidden_states", "local_add_cond"))), after_gate="positive"
    ),
    # Its adaptive projected guidance has momentum, with which it does not end at the gate, but fades.
    "AceStepTransformer1DModel": Family(
        Rows(
            frozenset(("hidden_states", "encoder_hidden_states", "timestep_r", "context_latents")),
            channels_dim=2,  # [batch, length, channels]
        ),
        text=("encoder_hidden_states",),
        guidance=ReversedBatch,
        after_gate="positive",
    ),
    "WanTransformer3DModel": _wan(),
    "WanVACETransformer3DModel": _wan("control_hidden_states", shared=("control_hidden_states_scale",)),
    "WanAnimateTransformer3DModel": _wan("pose_hidden_states", "face_pixel_values"),
    "SkyReelsV2Transformer3DModel": _wan(),
    "ChronoEditTransformer3DModel": _wan(),
    "HeliosTransformer3DModel": Family(
        Rows(
            frozenset(
                (
                    "hidden_states",
                    "encoder_hidden_states",
                    "latents_history_short",
                    "latents_history_mid",
                    "latents_history_long",
                )
            ),
            frozenset(
                (
                    "indices_hidden_states",
                    "indices_latents_history_short",
                    "indices_latents_history_mid",
                    "indices_latents_history_long",
                )
            ),
        ),
        text=("encoder_hidden_states",),
        guidance=SeparateCalls,
        after_gate="positive",
    ),
    "CosmosTransformer3DModel": Family(
        Rows(
            frozenset(
                (
                    "hidden_states",
                    "encoder_hidden_states",
                    "attention_mask",
                    "block_controlnet_hidden_states",
                    "condition_mask",
                )
            ),
            frozenset(("padding_mask",)),
            conditioned="condition_mask",  # where Cosmos 1 has other noise in each call
        ),
        text=("encoder_hidden_states", "attention_mask"),
        guidance=PairedCalls,
        after_gate="positive",
    ),
    "Kandinsky5Transformer3DModel": Family(
        Rows(
            frozenset(("hidden_states", "encoder_hidden_states", "pooled_projections")),
            frozenset(("visual_rope_pos", "text_rope_pos", "sta_mask")),
            channels_dim=4,  # [batch, frames, height, width, channels]
        ),
        text=("encoder_hidden_states", "text_rope_pos"),
        guidance=PairedCalls,  # in another dtype than the scheduler's, each call's timestep is cast anew
        after_gate="positive",
    ),
    "Kandinsky6Transformer3DModel": Family(
        Rows(
            frozenset(("hidden_states", "audio_hidden_states", *_TEXT, "pooled_projections", "visual_token_type_ids")),
            frozenset(("visual_rope_pos",)),
            channels_dim=4,  # [batch, frames, height, width, channels]
        ),
        guidance=SeparateCalls,
        after_gate="positive",
    ),
    "LongCatAudioDiTTransformer": Family(
        Rows(
            frozenset(("hidden_states", *_TEXT, "attention_mask", "latent_cond")),
            channels_dim=2,  # [batch, length, channels]
        ),
        guidance=SeparateCalls,
        after_gate="positive",
    ),
}


def family_of(cls: type[object]) -> Family | None:
    """Return the row of a denoiser class or of the class that it derives from, if there is one."""
    return next((FAMILIES[base.__name__] for base in cls.__mro__ if base.__name__ in FAMILIES), None)
