"""Whole pipelines of the other families with random weights; diffusers has to have them when they are built."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from corrdit.integrations.diffusers.testing.tiny_pipelines import (
    CODEC,
    IMAGE_CHANNELS,
    IMAGE_ENCODER,
    LATENT_CHANNELS,
    ROTARY,
    SIZES,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    cogvideox,
    image_encoder,
    masked_prompts,
    picture,
    prompts,
    wan_codec,
    wan_parts,
    wan_transformer,
)

FACE_CHANNELS = 8
FACE_SCALES = 5


def consisid(**changes: Any) -> diffusers.DiffusionPipeline:
    config = dict(cogvideox(**ROTARY).transformer.config)
    sizes = {name: value for name, value in config.items() if name in _ARGUMENTS_OF_CONSISID}
    transformer = diffusers.ConsisIDTransformer3DModel(**{**sizes, "in_channels": 2 * LATENT_CHANNELS, **changes})
    parts = {name: part for name, part in cogvideox().components.items() if name != "transformer"}
    # By its module: diffusers offers the class only beside OpenCV, which it needs for drawing key points of faces.
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    return ConsisIDPipeline(**parts, transformer=transformer)


_ARGUMENTS_OF_CONSISID = (
    *SIZES,
    *("attention_head_dim", "time_embed_dim", "text_embed_dim", "max_text_seq_length"),
    *("sample_width", "sample_height", "sample_frames", "use_rotary_positional_embeddings"),
)
FACE = {
    "is_train_face": True,
    "num_layers": 4,
    "LFE_id_dim": FACE_CHANNELS,
    "LFE_vit_dim": FACE_CHANNELS,
    "LFE_depth": FACE_SCALES,
    "LFE_num_scale": FACE_SCALES,
    "LFE_dim_head": FACE_CHANNELS,
    "LFE_num_heads": 1,
    "LFE_num_id_token": 2,
    "LFE_num_querie": 4,
    # Two thirds of the width of the tokens.
    "LFE_output_dim": 21,
    "LFE_ff_mult": 2,
    "cross_attn_dim_head": FACE_CHANNELS,
    "cross_attn_num_heads": 1,
}


def face_prompts(source: torch.Generator) -> dict[str, Any]:
    face = [torch.randn(1, 3, FACE_CHANNELS, generator=source) for _ in range(FACE_SCALES)]
    cond = torch.randn(1, FACE_CHANNELS, generator=source)
    return prompts(source, image=True, max_sequence_length=TEXT_TOKENS, id_vit_hidden=face, id_cond=cond)


def wanvace() -> diffusers.DiffusionPipeline:
    # The mask is given as the 8 x 8 pixels of a latent.
    channels = 2 * LATENT_CHANNELS + 64
    transformer = wan_transformer("WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=channels)
    return diffusers.WanVACEPipeline(**wan_parts(transformer))


def wananimate() -> diffusers.DiffusionPipeline:
    transformer = wan_transformer(
        "WanAnimateTransformer3DModel",
        in_channels=IMAGE_CHANNELS,
        latent_channels=LATENT_CHANNELS,
        **IMAGE_ENCODER,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        num_layers=4,
    )
    return diffusers.WanAnimatePipeline(**wan_parts(transformer), **image_encoder())


def animated_prompts(source: torch.Generator) -> dict[str, Any]:
    def video(size: int) -> list[Image.Image]:
        pixels = torch.randint(0, 256, (9, size, size, 3), generator=source, dtype=torch.uint8)
        return [Image.fromarray(np.asarray(frame)) for frame in pixels]

    found = {**prompts(source, tokens=512), "image": video(64)[0]}
    return {**found, "pose_video": video(64), "face_video": video(16), "segment_frame_length": 9, "num_frames": None}


def chronoedit() -> diffusers.DiffusionPipeline:
    transformer = wan_transformer("ChronoEditTransformer3DModel", in_channels=IMAGE_CHANNELS, **IMAGE_ENCODER)
    return diffusers.ChronoEditPipeline(**wan_parts(transformer), **image_encoder())


def anyflow() -> diffusers.DiffusionPipeline:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    return diffusers.AnyFlowPipeline(**wan_parts(wan_transformer("AnyFlowTransformer3DModel"), scheduler=scheduler))


def skyreelsv2(**changes: Any) -> diffusers.DiffusionPipeline:
    return diffusers.SkyReelsV2Pipeline(**wan_parts(wan_transformer("SkyReelsV2Transformer3DModel", **changes)))


def skyreelsv2_image() -> diffusers.DiffusionPipeline:
    transformer = wan_transformer("SkyReelsV2Transformer3DModel", in_channels=IMAGE_CHANNELS, **IMAGE_ENCODER)
    return diffusers.SkyReelsV2ImageToVideoPipeline(**wan_parts(transformer), **image_encoder())


def allegro() -> diffusers.DiffusionPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        **SIZES,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=TEXT_CHANNELS,
        sample_height=8,
        sample_width=8,
        sample_frames=24,
    )
    codec = diffusers.AutoencoderKLAllegro(**CODEC, layers_per_block=1, norm_num_groups=2, sample_size=64)
    codec.enable_tiling()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", beta_schedule="scaled_linear", clip_sample=False)
    return diffusers.AllegroPipeline(None, None, codec, transformer, scheduler)


def easyanimate(pipeline: str = "EasyAnimatePipeline", **changes: Any) -> diffusers.DiffusionPipeline:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        **{**SIZES, **changes},
        attention_head_dim=16,
        patch_size=2,
        mmdit_layers=2,
        time_embed_dim=8,
        add_norm_text_encoder=True,
        text_embed_dim=TEXT_CHANNELS,
    )
    codec = diffusers.AutoencoderKLMagvit(**CODEC, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(codec, None, None, transformer, scheduler)


def inpainting_prompts(source: torch.Generator) -> dict[str, Any]:
    """With a video of which nothing is given."""
    video, mask = torch.rand(1, 3, 9, 64, 64, generator=source), torch.full((1, 1, 9, 64, 64), 255.0)
    return {**masked_prompts(source), "video": video, "mask_video": mask}


PLAIN_GUIDANCE: dict[str, Any] = {
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}
"""Without the further calls of LTX-2's own guidance in each step."""


def ltx2(pipeline: str = "LTX2Pipeline") -> diffusers.DiffusionPipeline:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    transformer = diffusers.LTX2VideoTransformer3DModel(
        **SIZES,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        caption_channels=TEXT_CHANNELS,
    )
    codec = diffusers.AutoencoderKLLTX2Video(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    size = {"num_attention_heads": 2, "attention_head_dim": TEXT_CHANNELS // 2, "num_layers": 1}
    streams = {f"{stream}_connector_{name}": value for stream in ("video", "audio") for name, value in size.items()}
    registers = {f"{stream}_connector_num_learnable_registers": None for stream in ("video", "audio")}
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=codec,
        audio_vae=audio,
        text_encoder=None,
        tokenizer=None,
        connectors=LTX2TextConnectors(TEXT_CHANNELS, text_proj_in_factor=1, **streams, **registers),
        transformer=transformer,
        vocoder=LTX2Vocoder(
            in_channels=16,
            hidden_channels=8,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
        ),
    )


def motifvideo(pipeline: str = "MotifVideoPipeline", **changes: Any) -> diffusers.DiffusionPipeline:
    config = {
        **SIZES,
        "num_layers": 2,
        "num_single_layers": 2,
        "in_channels": 2 * LATENT_CHANNELS + 1,
        "attention_head_dim": 10,
        "rope_axes_dim": (2, 4, 4),
        "text_embed_dim": TEXT_CHANNELS,
        **changes,
    }
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=wan_codec(),
        text_encoder=None,
        tokenizer=None,
        transformer=diffusers.MotifVideoTransformer3DModel(**config),
        guider=diffusers.ClassifierFreeGuidance(5.0),
        **({"feature_extractor": None} if "Image" in pipeline else {}),
    )


GLYPH_CHANNELS = 6


def hunyuanvideo15(pipeline: str = "HunyuanVideo15Pipeline") -> diffusers.DiffusionPipeline:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        **{**SIZES, "in_channels": 2 * LATENT_CHANNELS + 1},
        attention_head_dim=10,
        rope_axes_dim=(2, 4, 4),
        num_refiner_layers=1,
        text_embed_dim=TEXT_CHANNELS,
        text_embed_2_dim=GLYPH_CHANNELS,
        image_embed_dim=8,
        target_size=64,
        task_type="i2v" if "Image" in pipeline else "t2v",
    )
    codec = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    pipe = kind(
        transformer=transformer,
        vae=codec,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(5.0),
        **absent,
        **(_siglip() if "Image" in pipeline else {}),
    )
    # The padding alone is 2,000 tokens, whatever the model.
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = TEXT_TOKENS, 4, 5
    return pipe


def _siglip() -> dict[str, Any]:
    """A picture as 4 features, and what prepares it."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**size, image_size=32, patch_size=16))
    return {"image_encoder": model, "feature_extractor": SiglipImageProcessor(size={"height": 32, "width": 32})}


def glyph_prompts(source: torch.Generator, *, image: bool = False) -> dict[str, Any]:
    found = masked_prompts(source, name="prompt_embeds_mask")
    if image:
        # The size of the video is that of the picture.
        found |= {"image": picture(source), "height": None, "width": None}
    for sign, valid in (("", 2), ("negative_", 0)):
        found[f"{sign}prompt_embeds_2"] = torch.randn(1, 4, GLYPH_CHANNELS, generator=source)
        found[f"{sign}prompt_embeds_mask_2"] = torch.arange(4)[None] < valid
    return found
