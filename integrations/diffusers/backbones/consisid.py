"""ConsisID: CogVideoX-5B's image-to-video model with the features of a face between its blocks.

Source: diffusers, `ConsisIDTransformer3DModel` and `ConsisIDPipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from corrdit.integrations.diffusers.backbones.cogvideox import CogVideoXBackbone
from corrdit.integrations.diffusers.family_layouts import ConsisIDLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text

FACE_TOKENS = 577
"""Features of a face picture in each of the layers the model is given."""


class ConsisIDBackbone(CogVideoXBackbone):
    """ConsisID, image to video; run on a video by itself it is given no face (features of zeros)."""

    layout = ConsisIDLayout
    pipelines = ("ConsisIDPipeline",)
    partly = MappingProxyType({})

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        arguments, config = super().further_arguments(latents, times, text, image), self.config
        if config.is_train_face:
            face = latents.new_zeros(len(latents), FACE_TOKENS, config.LFE_vit_dim)
            arguments["id_cond"] = latents.new_zeros(len(latents), config.LFE_id_dim)
            arguments["id_vit_hidden"] = [face] * config.LFE_num_scale
        return arguments
