"""Whole pipelines of CogVideoX, HunyuanVideo, LTX, Mochi and Wan with random weights, and prompts for them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from PIL import Image

TEXT_TOKENS = 8
TEXT_CHANNELS = 16
LATENT_CHANNELS = 4


def prompts(
    source: torch.Generator,
    *,
    image: bool = False,
    tokens: int = TEXT_TOKENS,
    name: str = "prompt_embeds",
    **further: Any,
) -> dict[str, Any]:
    """A prompt and a negative one, and a picture if wanted."""
    names = (name, f"negative_{name}")
    found = {each: torch.randn(1, tokens, TEXT_CHANNELS, generator=source) for each in names}
    return {**found, **({"image": torch.rand(1, 3, 64, 64, generator=source)} if image else {}), **further}


def picture(source: torch.Generator) -> Image.Image:
    """For pipelines that take no tensor."""
    return Image.fromarray(torch.randint(0, 256, (64, 64, 3), generator=source, dtype=torch.uint8).numpy())


def masked_prompts(
    source: torch.Generator, *, pooled: bool = False, name: str = "prompt_attention_mask", **further: Any
) -> dict[str, Any]:
    """Prompts of different lengths."""
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds") if pooled else ()
    pooled_prompts = {each: torch.randn(1, 8, generator=source) for each in names}
    valid = torch.arange(TEXT_TOKENS)[None]
    masks = {name: valid < TEXT_TOKENS - 2, f"negative_{name}": valid < TEXT_TOKENS - 5}
    return {**prompts(source, **further), **masks, **pooled_prompts}


ROTARY = {"use_rotary_positional_embeddings": True}
SIZES = {"num_attention_heads": 2, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 3}
CODEC = {"latent_channels": LATENT_CHANNELS, "block_out_channels": (8, 8, 8, 8)}


def cogvideox(**changes: Any) -> diffusers.DiffusionPipeline:
    codec = diffusers.AutoencoderKLCogVideoX(**CODEC, layers_per_block=1, norm_num_groups=2)
    samples = {"sample_width": 8, "sample_height": 8, "sample_frames": 9}
    text = {"text_embed_dim": TEXT_CHANNELS, "max_text_seq_length": TEXT_TOKENS}
    config = {**SIZES, "attention_head_dim": 16, "time_embed_dim": 8, **text, **samples, **changes}
    transformer = diffusers.CogVideoXTransformer3DModel(**config)
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    return diffusers.CogVideoXPipeline(None, None, codec, transformer, scheduler)


def cogvideox_image() -> diffusers.DiffusionPipeline:
    parts = cogvideox(**ROTARY, in_channels=2 * LATENT_CHANNELS).components
    return diffusers.CogVideoXImageToVideoPipeline(**parts)


def hunyuanvideo(pipeline: str = "HunyuanVideoPipeline", **changes: Any) -> diffusers.DiffusionPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **{**SIZES, "num_layers": 2, **changes},
        num_single_layers=2,
        num_refiner_layers=1,
        attention_head_dim=10,
        rope_axes_dim=(2, 4, 4),
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_CHANNELS,
        pooled_projection_dim=8,
    )
    codec = diffusers.AutoencoderKLHunyuanVideo(**CODEC, layers_per_block=1, norm_num_groups=4)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    if pipeline == "HunyuanVideoImageToVideoPipeline":
        absent["image_processor"] = None
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(transformer=transformer, vae=codec, scheduler=scheduler, **absent)


def wan_transformer(kind: str = "WanTransformer3DModel", **changes: Any) -> torch.nn.Module:
    """A transformer of Wan's family."""
    config = {
        **SIZES,
        "patch_size": (1, 2, 2),
        "attention_head_dim": 12,
        "text_dim": TEXT_CHANNELS,
        "freq_dim": 256,
        "ffn_dim": 32,
        "cross_attn_norm": True,
        "rope_max_seq_len": 32,
        **changes,
    }
    model: torch.nn.Module = getattr(diffusers, kind)(**config)
    return model


def wan_codec() -> torch.nn.Module:
    """The codec that Wan's family, and others, have."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * LATENT_CHANNELS,
        latents_std=[0.9] * LATENT_CHANNELS,
    )


def wan_parts(transformer: torch.nn.Module, **further: Any) -> dict[str, Any]:
    """The components of a pipeline of Wan's family."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = {"tokenizer": None, "text_encoder": None}
    return {**text, "vae": wan_codec(), "scheduler": scheduler, "transformer": transformer, **further}


def wan(*, boundary_ratio: float | None = None, expand_timesteps: bool = False) -> diffusers.DiffusionPipeline:
    second = None if boundary_ratio is None else wan_transformer()
    return diffusers.WanPipeline(
        **wan_parts(wan_transformer(), transformer_2=second),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
    )


IMAGE_CHANNELS = 2 * LATENT_CHANNELS + 4
"""Of the noisy latents, those of an image, and the mask of what is given, as Wan's image-to-video models take them."""
IMAGE_FEATURES = 8
IMAGE_ENCODER = {"image_dim": IMAGE_FEATURES, "added_kv_proj_dim": 24}


def wan_image(**changes: Any) -> diffusers.DiffusionPipeline:
    """As Wan 2.2, or with the options of an image encoder as Wan 2.1, whose attention to text counts on 512 tokens."""
    parts = wan_parts(wan_transformer(in_channels=IMAGE_CHANNELS, **changes))
    encoder = image_encoder() if changes else {"image_processor": None, "image_encoder": None}
    return diffusers.WanImageToVideoPipeline(**parts, **encoder)


def image_encoder() -> dict[str, Any]:
    """A picture as 257 features, and what prepares it."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    size = {"hidden_size": IMAGE_FEATURES, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**size, image_size=32, patch_size=2))
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return {"image_encoder": model, "image_processor": CLIPImageProcessor(**sizes)}


def ltx(pipeline: str = "LTXPipeline") -> diffusers.DiffusionPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **SIZES, attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_CHANNELS
    )
    codec = diffusers.AutoencoderKLLTXVideo(
        **CODEC,
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(scheduler, codec, None, None, transformer)


def mochi() -> diffusers.DiffusionPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        in_channels=LATENT_CHANNELS,
        patch_size=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_CHANNELS,
        time_embed_dim=4,
        max_sequence_length=TEXT_TOKENS,
    )
    # Fresh weights start at 0, which makes the rotary embedding do nothing.
    torch.nn.init.normal_(transformer.pos_frequencies)
    codec = diffusers.AutoencoderKLMochi(
        latent_channels=LATENT_CHANNELS,
        latents_mean=None,
        latents_std=None,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, codec, None, None, transformer)
