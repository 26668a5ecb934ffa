"""CogVideoX: joint attention with the text first, absolute (2B) or rotary (5B, 1.5) positions.

Source: diffusers, `CogVideoXTransformer3DModel` and the `CogVideoXPipeline` family. Latents are `[B, F, C, h, w]`;
1.5 joins two latent frames in one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout


class CogVideoXLayout(TransformerLayout):
    """Where CogVideoX keeps its attention, and its token axis: text, then frames."""

    guidance = "batched"

    def attention_modules(self, transformer: torch.nn.Module) -> list[torch.nn.Module]:
        return [block.attn1 for block in transformer.transformer_blocks]

    def patch_size(self, transformer: torch.nn.Module) -> tuple[int, int, int]:
        config = transformer.config
        return (config.patch_size_t or 1, config.patch_size, config.patch_size)

    def read_call(self, transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> ForwardCall:
        latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
        batch, frames, _, height, width = latents.shape
        grid = replace(self.video_grid(transformer, frames, height, width), text_tokens=text.shape[1], text_first=True)
        return ForwardCall(batch=batch, grid=grid, timestep=arguments["timestep"])
