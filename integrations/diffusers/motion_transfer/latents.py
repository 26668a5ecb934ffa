"""Latents between the layout that a transformer is given and `[F, C, h, w]` as the codec counts them."""

from __future__ import annotations

import torch
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import Arguments
from corrdit.integrations.diffusers.motion_transfer.objectives import at_latents


class LatentLayout:
    """The latents in the hidden states of a backbone's transformer.

    Args:
        backbone: whose they are.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Noisy latents, and the condition of a model that has one beside them."""
        if not getattr(self._backbone, "has_condition", False):
            return hidden, None
        axis = self._backbone.channel_axis
        latents, condition = hidden.tensor_split([self._backbone.latent_channels], dim=axis)
        return latents, condition

    def joined(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """The hidden states of latents and a condition."""
        return latents if condition is None else torch.cat([latents, condition], dim=self._backbone.channel_axis)

    def of_maps(self, maps: Tensor) -> Tensor:
        """Latents `[F, C, h, w]` of the backbone as the transformer is given them, in its precision."""
        arguments = self._backbone.call_arguments(codec_latents(self._backbone, maps), 0.0, {})
        return self.split(arguments["hidden_states"])[0]

    def maps(self, latents: Tensor, grid: TokenGrid) -> Tensor:
        """What the transformer is given for a grid as `[F, C, h, w]` with F and C as the codec counts them."""
        return self._backbone.output_latents(latents, torch.empty(self._size(grid), device="meta"))[0]

    def region(self, region: Tensor) -> Tensor:
        """A region of tokens `[F, h, w]` as the transformer's latents, 1 inside and 0 outside."""
        grid = TokenGrid(*region.shape)
        size = self._size(grid)
        inside = at_latents(region, torch.empty(size[1:])).float().expand(size[1:])
        # As the backbone counts frames and channels.
        return self.of_maps(inside.reshape(grid.frames, -1, *size[3:]))

    def _size(self, grid: TokenGrid) -> tuple[int, int, int, int, int]:
        """`[1, F, C, h, w]` of the codec."""
        backbone = self._backbone
        frames, rows, columns = backbone.layout().patch_size(backbone.transformer)
        return (1, grid.frames * frames, backbone.latent_channels, grid.height * rows, grid.width * columns)


def codec_latents(backbone: Backbone, latents: Tensor) -> Tensor:
    """Latents `[F, C, h, w]` of a backbone as `[1, F, C, h, w]` with F and C as the codec counts them."""
    frames, _, height, width = latents.shape
    joined = backbone.frames_per_token
    latents = latents.to(device=backbone.device, dtype=backbone.dtype)
    return latents.reshape(1, frames * joined, -1, height, width)


class SkippedOutput(tuple[Tensor, ...]):
    """What a forward returns in a step that is walked through: zeros, which the steered scheduler does not take."""

    def __new__(cls, arguments: Arguments, latents: Tensor) -> SkippedOutput:
        streams = [latents, *(arguments[name] for name in ("audio_hidden_states",) if name in arguments)]
        return super().__new__(cls, map(torch.zeros_like, streams))

    @property
    def sample(self) -> Tensor:
        """The prediction, as a model output has it."""
        return self[0]
