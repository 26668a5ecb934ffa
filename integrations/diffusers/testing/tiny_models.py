"""Whole pipelines of the supported families with random weights, small enough for a CPU test.

They have a real video codec of their family and no text encoder, so prompts are given as embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import backbone_of

TEXT_TOKENS = 8
TEXT_CHANNELS = 16
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class TinyModel:
    """One tiny model.

    Args:
        build: makes its pipeline; weights come from torch's global random numbers.
        generation: keyword arguments its pipeline's call needs beyond those all families share.
        height: of the smallest video that makes a grid of 4 x 4 tokens (2 x 2 for LTX).
    """

    build: Callable[..., diffusers.DiffusionPipeline]
    generation: Callable[[torch.Generator], dict[str, Any]]
    height: int = 64


def tiny_pipeline(name: str, *, seed: int = 0) -> diffusers.DiffusionPipeline:
    """A pipeline of the family, in evaluation mode, with weights that follow from the seed.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _model(name).build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_backbone(name: str, *, seed: int = 0) -> Backbone:
    """`tiny_pipeline` as a backbone."""
    return backbone_of(tiny_pipeline(name, seed=seed), name=f"tiny {name}")


def tiny_generation(name: str, *, steps: int = 3, guided: bool = True, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for a call of `tiny_pipeline(name)`: random prompts, nine frames, latents as output.

    Args:
        name: of the model.
        steps: denoising steps.
        guided: with classifier-free guidance.
        seed: of prompts and noise; every call makes a new generator.
    """
    model = _model(name)
    source = torch.Generator().manual_seed(seed)
    arguments = model.generation(source)
    if "hunyuanvideo" in name:
        arguments["true_cfg_scale"] = 5.0 if guided else 1.0
    else:
        arguments["guidance_scale"] = 5.0 if guided else 1.0
    if not guided:
        arguments = {key: value for key, value in arguments.items() if not key.startswith("negative")}
    return {
        "num_inference_steps": steps,
        "num_frames": 13 if name == "mochi" else 9,
        "height": model.height,
        "width": model.height,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed + 1),
        **arguments,
    }


def _model(name: str) -> TinyModel:
    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; known are {', '.join(TINY_MODELS)}")
    return TINY_MODELS[name]


def _prompts(source: torch.Generator, *, image: bool = False, **further: Any) -> dict[str, Any]:
    names = ("prompt_embeds", "negative_prompt_embeds")
    prompts = {name: torch.randn(1, TEXT_TOKENS, TEXT_CHANNELS, generator=source) for name in names}
    return {**prompts, **({"image": torch.rand(1, 3, 64, 64, generator=source)} if image else {}), **further}


def _masked_prompts(source: torch.Generator, *, pooled: bool = False) -> dict[str, Any]:
    """Prompts of different lengths."""
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds") if pooled else ()
    pooled_prompts = {name: torch.randn(1, 8, generator=source) for name in names}
    valid = torch.arange(TEXT_TOKENS)[None]
    masks = {
        "prompt_attention_mask": valid < TEXT_TOKENS - 2,
        "negative_prompt_attention_mask": valid < TEXT_TOKENS - 5,
    }
    return {**_prompts(source), **masks, **pooled_prompts}


_SIZES = {"num_attention_heads": 2, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "num_layers": 3}
_CODEC = {"latent_channels": LATENT_CHANNELS, "block_out_channels": (8, 8, 8, 8)}


def _cogvideox(**changes: Any) -> diffusers.DiffusionPipeline:
    codec = diffusers.AutoencoderKLCogVideoX(**_CODEC, layers_per_block=1, norm_num_groups=2)
    samples = {"sample_width": 8, "sample_height": 8, "sample_frames": 9}
    text = {"text_embed_dim": TEXT_CHANNELS, "max_text_seq_length": TEXT_TOKENS}
    config = {**_SIZES, "attention_head_dim": 16, "time_embed_dim": 8, **text, **samples, **changes}
    transformer = diffusers.CogVideoXTransformer3DModel(**config)
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    return diffusers.CogVideoXPipeline(None, None, codec, transformer, scheduler)


def _cogvideox_image() -> diffusers.DiffusionPipeline:
    parts = _cogvideox(**_ROTARY, in_channels=2 * LATENT_CHANNELS).components
    return diffusers.CogVideoXImageToVideoPipeline(**parts)


def _hunyuanvideo() -> diffusers.DiffusionPipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **{**_SIZES, "num_layers": 2},
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
    codec = diffusers.AutoencoderKLHunyuanVideo(**_CODEC, layers_per_block=1, norm_num_groups=4)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.HunyuanVideoPipeline(transformer=transformer, vae=codec, scheduler=scheduler, **absent)


def _wan_transformer(in_channels: int = LATENT_CHANNELS) -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        **{**_SIZES, "in_channels": in_channels},
        patch_size=(1, 2, 2),
        attention_head_dim=12,
        text_dim=TEXT_CHANNELS,
        freq_dim=256,
        ffn_dim=32,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )


def _wan(boundary_ratio: float | None = None) -> diffusers.DiffusionPipeline:
    codec = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1] * LATENT_CHANNELS,
        latents_std=[0.9] * LATENT_CHANNELS,
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=codec,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=_wan_transformer(),
        transformer_2=None if boundary_ratio is None else _wan_transformer(),
        boundary_ratio=boundary_ratio,
    )


def _wan_image() -> diffusers.DiffusionPipeline:
    """As Wan 2.2: a mask of four channels and the latents of the image beside the noisy ones, no image encoder."""
    parts = {name: part for name, part in _wan().components.items() if name not in ("transformer", "transformer_2")}
    transformer = _wan_transformer(2 * LATENT_CHANNELS + 4)
    return diffusers.WanImageToVideoPipeline(**parts, transformer=transformer, image_processor=None, image_encoder=None)


def _ltx() -> diffusers.DiffusionPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **_SIZES, attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT_CHANNELS
    )
    codec = diffusers.AutoencoderKLLTXVideo(
        **_CODEC,
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return diffusers.LTXPipeline(scheduler, codec, None, None, transformer)


def _mochi() -> diffusers.DiffusionPipeline:
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


_ROTARY = {"use_rotary_positional_embeddings": True}
_short_prompts = partial(_prompts, max_sequence_length=TEXT_TOKENS)

TINY_MODELS = {
    "cogvideox": TinyModel(_cogvideox, _short_prompts),
    "cogvideox-rotary": TinyModel(partial(_cogvideox, **_ROTARY), _short_prompts),
    "cogvideox-1.5": TinyModel(
        partial(_cogvideox, **_ROTARY, patch_size_t=2, patch_bias=False, sample_height=32, sample_width=32),
        _short_prompts,
    ),
    "cogvideox-image": TinyModel(_cogvideox_image, partial(_short_prompts, image=True)),
    "hunyuanvideo": TinyModel(_hunyuanvideo, partial(_masked_prompts, pooled=True)),
    "wan": TinyModel(_wan, _prompts),
    "wan-2.2": TinyModel(partial(_wan, boundary_ratio=0.875), _prompts),
    "wan-image": TinyModel(_wan_image, partial(_prompts, image=True)),
    "ltx": TinyModel(_ltx, _masked_prompts, height=128),
    "mochi": TinyModel(_mochi, _masked_prompts),
}
"""Tiny models by name: the five families and the variants that differ for a capture."""
