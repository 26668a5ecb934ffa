"""Wan Animate: a character, whose latent is the first frame, moved by the poses and the face of another video.

Source: diffusers, `WanAnimateTransformer3DModel` and `WanAnimatePipeline`.
"""

from __future__ import annotations

import torch

from corrdit.integrations.diffusers.backbones.wan import WanBackbone
from corrdit.integrations.diffusers.family_layouts import WanAnimateLayout
from corrdit.integrations.diffusers.layouts import Arguments, Text

_BEHIND = "its pipeline denoises a character before the video's frames, in segments as long as segment_frame_length"
_LIMITS = {"analysis": _BEHIND, "transfer": _BEHIND}


class WanAnimateBackbone(WanBackbone):
    """Wan Animate; run on a video by itself its first frame is the character, and pose and face are blank."""

    layout = WanAnimateLayout
    pipelines = ("WanAnimatePipeline",)
    limits = _LIMITS

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        batch, frames = latents.shape[:2]
        if frames < 2:
            raise ValueError(f"{self.name} takes a character and at least one frame, but got one latent frame")
        size = self.config.motion_encoder_size
        seen = (frames - 2) * self.temporal_compression + 1
        return {
            **super().further_arguments(latents, times, text, image),
            "pose_hidden_states": self.arranged(torch.zeros_like(latents[:, 1:])),
            # As the pipeline blanks a face for the unconditional prediction.
            "face_pixel_values": latents.new_full((batch, 3, seen, size, size), -1.0),
        }
