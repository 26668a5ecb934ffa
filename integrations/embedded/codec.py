"""A fixed, exactly invertible video codec with the interface of diffusers' video autoencoders.

Every frame becomes a latent of its own: an orthonormal Haar transform of 2x2 pixels in each colour axis, with gains
that bring the nine channels of detail to a deviation near 1, as a learned codec's latents have, and let the three
means of a cell stand out from the noise for longer: a scene is laid out before its detail is. There is nothing to
train.
"""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


@dataclass
class PointDistribution:
    """The codec's "distribution": all mass on one latent, so sample and mode agree."""

    latent: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """The latent; `generator` is there for the interface's sake."""
        return self.latent

    def mode(self) -> Tensor:
        """The latent."""
        return self.latent


_COLOUR_AXES = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))
"""Brightness, red-blue and green-magenta, orthogonal."""
_HAAR_AXES = ((1.0, 1.0, 1.0, 1.0), (1.0, -1.0, 1.0, -1.0), (1.0, 1.0, -1.0, -1.0), (1.0, -1.0, -1.0, 1.0))
"""Mean, column, row and diagonal differences of 2x2 pixels in row-major order, orthogonal."""


class HaarVideoCodec(ModelMixin, ConfigMixin):
    """Videos [B, 3, T, H, W] in -1..1 to latents [B, 12, T, H/2, W/2] and back without loss (up to rounding).

    scaling_factor is 1: the gains already normalise. The empty list of names after the first entry of
    `block_out_channels` is not used for layers; its length tells diffusers' pipelines the spatial factor 2.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (12, 12),
        temporal_compression_ratio: int = 1,
        scaling_factor: float = 1.0,
        colour_gains: tuple[float, float, float] = (1.0, 2.0, 3.6),
        detail_gains: tuple[float, float, float, float] = (1.0, 3.0, 3.0, 5.0),
    ) -> None:
        super().__init__()
        if in_channels != 3 or latent_channels != 12:
            raise ValueError(f"the codec maps 3 colours to 12 channels, got {in_channels} and {latent_channels}")
        colours, details = torch.tensor(_COLOUR_AXES), torch.tensor(_HAAR_AXES) / 2
        colours = colours / colours.norm(dim=1, keepdim=True)
        matrix = torch.einsum("ci,dp->cdip", colours, details).reshape(12, 12)
        gains = torch.outer(torch.tensor(colour_gains), torch.tensor(detail_gains)).reshape(12)
        self.register_buffer("analysis", matrix * gains[:, None])
        self.register_buffer("synthesis", (matrix / gains[:, None]).T.contiguous())

    def encode(self, sample: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PointDistribution]:
        """sample: [B, 3, T, H, W] in -1..1, H and W even. `.latent_dist` holds [B, 12, T, H/2, W/2]."""
        distribution = PointDistribution(self._encoded(sample))
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def encode_frames(self, video: Tensor) -> Tensor:
        """Latents [B, T, 12, H/2, W/2] of videos [B, T, 3, H, W] in 0..1."""
        return self._encoded((2 * video - 1).transpose(1, 2)).transpose(1, 2)

    def _encoded(self, sample: Tensor) -> Tensor:
        if sample.ndim != 5 or sample.shape[1] != 3 or sample.shape[3] % 2 or sample.shape[4] % 2:
            raise ValueError(f"the codec encodes [B, 3, T, even H, even W], got {tuple(sample.shape)}")
        batch, _, frames, height, width = sample.shape
        cells = sample.reshape(batch, 3, frames, height // 2, 2, width // 2, 2)
        cells = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return (cells @ self.analysis.T).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latent: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """latent: [B, 12, T, h, w]. `.sample` holds [B, 3, T, 2h, 2w]."""
        if latent.ndim != 5 or latent.shape[1] != 12:
            raise ValueError(f"the codec decodes [B, 12, T, h, w], got {tuple(latent.shape)}")
        batch, _, frames, height, width = latent.shape
        cells = latent.permute(0, 2, 3, 4, 1) @ self.synthesis.T
        cells = cells.reshape(batch, frames, height, width, 3, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        sample = cells.reshape(batch, 3, frames, 2 * height, 2 * width)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
