"""Whole pipelines of Cosmos 1 to 3 with random weights; diffusers has to have them when they are built."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch

from corrdit.integrations.diffusers.testing.tiny_pipelines import (
    LATENT_CHANNELS,
    SIZES,
    TEXT_CHANNELS,
    wan_codec,
)


class NoSafetyChecker:
    """In place of NVIDIA's, whose package and weights a random model does not need."""

    def to(self, device: object) -> NoSafetyChecker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def _cosmos_transformer(**changes: Any) -> torch.nn.Module:
    model = diffusers.CosmosTransformer3DModel(
        **{
            **SIZES,
            "attention_head_dim": 12,
            "mlp_ratio": 2,
            "text_embed_dim": TEXT_CHANNELS,
            "adaln_lora_dim": 4,
            "max_size": (8, 32, 32),
            # Given as a picture, for whose resizing diffusers needs torchvision.
            "concat_padding_mask": False,
            **changes,
        }
    )
    if model.learnable_pos_embed is not None:
        for parameter in model.learnable_pos_embed.parameters():
            torch.nn.init.normal_(parameter)
    return model


def cosmos(pipeline: str = "CosmosTextToWorldPipeline", **changes: Any) -> diffusers.DiffusionPipeline:
    codec = diffusers.AutoencoderKLCosmos(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=4,
        latents_mean=None,
        latents_std=None,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", rho=7.0, final_sigmas_type="sigma_min"
    )
    kind: type[diffusers.DiffusionPipeline] = getattr(diffusers, pipeline)
    return kind(None, None, _cosmos_transformer(**changes), codec, scheduler, safety_checker=NoSafetyChecker())


def cosmos2() -> diffusers.DiffusionPipeline:
    transformer = _cosmos_transformer(
        in_channels=LATENT_CHANNELS + 1, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return diffusers.Cosmos2VideoToWorldPipeline(
        None, None, transformer, wan_codec(), scheduler, safety_checker=NoSafetyChecker()
    )


def cosmos25() -> diffusers.DiffusionPipeline:
    transformer = _cosmos_transformer(
        in_channels=LATENT_CHANNELS + 1,
        extra_pos_embed_type=None,
        rope_scale=(1.0, 3.0, 3.0),
        use_crossattn_projection=True,
        crossattn_proj_in_channels=TEXT_CHANNELS,
        encoder_hidden_states_channels=TEXT_CHANNELS,
    )
    # As the published one, whose range of noise Predict2's scheduler has, too.
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = diffusers.UniPCMultistepScheduler(use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01, **flow)
    return diffusers.Cosmos2_5_PredictBasePipeline(
        None, None, transformer, wan_codec(), scheduler, safety_checker=NoSafetyChecker()
    )


WORDS = ("<pad>", "<unk>", "<eos>", "<|vision_start|>", "a", "red", "disc", "moves", "left", "over", "sand")


def cosmos3() -> diffusers.DiffusionPipeline:
    """Of a model that reads token ids itself, so that its pipeline has a tokenizer and no text encoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    transformer = diffusers.Cosmos3OmniTransformer(
        head_dim=12,
        hidden_size=24,
        intermediate_size=32,
        latent_channel=LATENT_CHANNELS,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_key_value_heads=2,
        patch_latent_dim=4 * LATENT_CHANNELS,
        vocab_size=len(WORDS),
        rope_axes_dim=(2, 2, 2),
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0, use_karras_sigmas=False
    )
    return diffusers.Cosmos3OmniPipeline(transformer, fast, wan_codec(), scheduler, enable_safety_checker=False)


def worded_prompts(source: torch.Generator) -> dict[str, Any]:
    return {"prompt": "a red disc moves left", "negative_prompt": "sand"}
