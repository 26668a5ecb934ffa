"""LTX-2: LTX-Video with a stream of audio beside the video, connected with it block by block.

Source: diffusers, `LTX2VideoTransformer3DModel` and `LTX2Pipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.ltx import LTXBackbone
from corrdit.integrations.diffusers.family_layouts import LTX2Layout
from corrdit.integrations.diffusers.layouts import Arguments, Text

AUDIO_TOKENS = 1
"""Of silence, which a video read by itself is kept apart from."""


class LTX2Backbone(LTXBackbone):
    """LTX-2, text to video; run on a video by itself its streams are apart (`isolate_modalities`)."""

    layout = LTX2Layout
    pipelines = ("LTX2Pipeline", "LTX2ImageToVideoPipeline")
    partly = MappingProxyType({})
    longest_shift = 2.05

    @property
    def text_tokens(self) -> int:
        return 1024

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().prompt_shapes
        return {**shapes, "audio_encoder_hidden_states": shapes["encoder_hidden_states"]}

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        text = super().encoded_prompt(prompt)
        side = getattr(self.pipe.tokenizer, "padding_side", "left")
        mask = text["encoder_attention_mask"]
        video, audio, mask = self.pipe.connectors(text["encoder_hidden_states"], mask, padding_side=side)
        found = {"encoder_hidden_states": video, "encoder_attention_mask": mask, "audio_encoder_hidden_states": audio}
        return {name: value.to(self.dtype) for name, value in found.items()}

    def text_with(self, text: Text, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**super().text_with(text, prompt_embeds), "audio_encoder_hidden_states": prompt_embeds.to(self.dtype)}

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        arguments = super().further_arguments(latents, times, text, image)
        del arguments["rope_interpolation_scale"]
        audio = latents.new_zeros(len(latents), AUDIO_TOKENS, self.config.audio_in_channels)
        silence = {"audio_hidden_states": audio, "audio_num_frames": AUDIO_TOKENS, "isolate_modalities": True}
        return {**arguments, **silence, "sigma": times}
