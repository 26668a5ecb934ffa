"""Whole pipelines of Kandinsky 5 and 6 with random weights; diffusers has to have them when they are built."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from corrdit.integrations.diffusers.testing.tiny_pipelines import (
    CODEC,
    LATENT_CHANNELS,
    TEXT_CHANNELS,
    TEXT_TOKENS,
    prompts,
)

_SIZES: dict[str, Any] = {
    "in_visual_dim": LATENT_CHANNELS,
    "out_visual_dim": LATENT_CHANNELS,
    "in_text_dim": TEXT_CHANNELS,
    "in_text_dim2": 6,
    "time_dim": 8,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}


def _pipeline(kind: type[diffusers.DiffusionPipeline], transformer: torch.nn.Module) -> diffusers.DiffusionPipeline:
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return kind(
        transformer=transformer,
        vae=diffusers.AutoencoderKLHunyuanVideo(**CODEC, layers_per_block=1, norm_num_groups=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        **absent,
    )


def kandinsky5(pipeline: str = "Kandinsky5T2VPipeline", **changes: Any) -> diffusers.DiffusionPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(**{**_SIZES, **changes})
    # Fresh weights start at 0, so that no block would add anything.
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return _pipeline(getattr(diffusers, pipeline), transformer)


def kandinsky6() -> diffusers.DiffusionPipeline:
    audio = {"in_audio_dim": 2, "out_audio_dim": 2}
    released = dict.fromkeys(("text_token_padding", "ca_rope", "cross_gates", "fix_modulation"), True)
    transformer = diffusers.Kandinsky6Transformer3DModel(
        **_SIZES, **audio, **released, visual_token_type_num_embeddings=2
    )
    return _pipeline(diffusers.Kandinsky6TI2VAPipeline, transformer)


def kandinsky5_prompts(source: torch.Generator, **further: Any) -> dict[str, Any]:
    found = prompts(source, name="prompt_embeds_qwen", **further)
    for sign in ("", "negative_"):
        found[f"{sign}prompt_embeds_clip"] = torch.randn(1, 6, generator=source)
        found[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, TEXT_TOKENS], dtype=torch.int32)
    return found


def kandinsky6_prompts(source: torch.Generator, **further: Any) -> dict[str, Any]:
    """Of a call without audio, for which a pipeline without its codec is enough."""
    found = prompts(source, **further)
    for sign in ("", "negative_"):
        found[f"{sign}pooled_prompt_embeds"] = torch.randn(1, 6, generator=source)
    return {**found, "sample_audio": False}
