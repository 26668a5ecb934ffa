"""Frames of a video as a codec takes them, and as a transformer is conditioned on them."""

from __future__ import annotations

import abc
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.layouts import Arguments, Pipeline


def prepared_frames(
    video: np.ndarray | torch.Tensor,
    size: tuple[int | None, int | None],
    *,
    stride: tuple[int, int],
    name: str,
    first: tuple[int, int] | None = None,
    antialias: bool = True,
) -> torch.Tensor:
    """Video frames float `[T, 3, height, width]` in -1..1 on the CPU, resized bilinearly and not rounded.

    Args:
        video: uint8 `[T, H, W, 3]`.
        size: (height, width) to resize to; None for the video's own.
        stride: (dy, dx) pixels a token spans.
        name: of the model, for messages.
        first: (height, width) to which frames are resized before that; None for none.
        antialias: whether with antialiasing.

    Raises:
        ValueError: not such a video, or a size that is no whole number of tokens.
    """
    frames = torch.as_tensor(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"video must be uint8 [T, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    height, width = size[0] or frames.shape[1], size[1] or frames.shape[2]
    for side, pixels, step in zip(("height", "width"), (height, width), stride, strict=True):
        if pixels % step:
            raise ValueError(
                f"{side} {pixels} is not a multiple of {step}, the pixels a token of {name} spans; give "
                f"{side}={max(step, round(pixels / step) * step)}"
            )
    images = frames.permute(0, 3, 1, 2)
    resized = []
    for image in images.split(1):
        image = image.float()
        for wanted in ((height, width),) if first is None else (first, (height, width)):
            if tuple(image.shape[2:]) != tuple(wanted):
                image = F.interpolate(image, tuple(wanted), mode="bilinear", antialias=antialias)
        resized.append(image)
    return torch.cat(resized).clamp(0, 255) / 127.5 - 1


def conditioning_latents(image: torch.Tensor, latents: torch.Tensor, *, frames_per_token: int) -> torch.Tensor:
    """Latents a transformer is conditioned on, `[B, 1 or F, C, h, w]` as the codec counts frames.

    Args:
        image: `[1 or B, frames_per_token or F, C, h, w]`; the first of the latents that one token joins stands for one
            frame of tokens.
        latents: `[B, F, C, h, w]`, the noisy ones.
        frames_per_token: latents joined in a token.

    Raises:
        ValueError: other numbers of frames or samples, or another size.
    """
    one = image.shape[1] == frames_per_token
    batch, frames = len(latents), latents.shape[1]
    fits = len(image) in (1, batch) and (one or image.shape[1] == frames) and image.shape[2:] == latents.shape[2:]
    if not fits:
        raise ValueError(
            f"image must be latents of one frame or of all {frames // frames_per_token}, of the size of the noisy ones "
            f"{list(latents.shape)}, got {list(image.shape)}"
        )
    return (image[:, :1] if one else image).expand(batch, -1, -1, -1, -1)


PIXELS_PER_ENCODER_CALL = 480 * 720
"""Frames are given to the codec in groups of about this many pixels, so that memory does not grow with the video."""


class FrameEncoder(abc.ABC):
    """The half of a backbone that makes latents of videos."""

    pipe: Pipeline
    name: str
    transformer: torch.nn.Module
    preset: Preset

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return self.pipe._execution_device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the transformer's input."""
        return cast(torch.dtype, self.transformer.dtype)

    @property
    @abc.abstractmethod
    def token_stride(self) -> tuple[int, int]:
        """(dy, dx): pixels of the encoded video a token spans."""

    @property
    @abc.abstractmethod
    def frames_per_token(self) -> int:
        """Latent frames of the codec that one frame of tokens stands for."""

    @property
    def spatial_compression(self) -> int:
        """Pixels a latent spans."""
        return int(self.pipe.vae_scale_factor_spatial)

    @property
    def temporal_compression(self) -> int:
        """Video frames a latent frame stands for, the first one excepted."""
        return int(self.pipe.vae_scale_factor_temporal)

    @abc.abstractmethod
    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        """The codec's latents `[B, C, F, h, w]` as the transformer was trained on them."""

    def encode_frames(
        self,
        video: np.ndarray | torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        first: tuple[int, int] | None = None,
        antialias: bool = True,
    ) -> torch.Tensor:
        """Every frame as a latent of its own: no temporal compression.

        Args:
            video: uint8 `[T, H, W, 3]`.
            height: height to resize to before encoding; None for the preset's or the video's own.
            width: likewise.
            first: (height, width) to which frames are resized before that; None for none.
            antialias: whether frames are resized with antialiasing.

        Returns:
            Latents `[T, C, h, w]`.

        Raises:
            ValueError: not such a video, or a size that is not a multiple of `token_stride`.
        """
        frames = self._prepared(video, height, width, first=first, antialias=antialias)
        group = max(1, PIXELS_PER_ENCODER_CALL // (frames.shape[2] * frames.shape[3]))
        latents = [self._encode(part[:, :, None].to(self.device)) for part in frames.split(group)]
        return torch.cat(latents)[:, :, 0].repeat(1, self.frames_per_token, 1, 1)

    def encode_video(
        self, video: np.ndarray | torch.Tensor, *, height: int | None = None, width: int | None = None
    ) -> torch.Tensor:
        """The video through the codec as it was trained, temporally compressed; `latent_frame_map` says how.

        Arguments, result and errors as for `encode_frames`, with F latent frames instead of T. The last frame is
        repeated until the codec's and the transformer's temporal strides fit.
        """
        frames = self._prepared(video, height, width)
        missing = len(self.latent_frame_map(len(frames), padded=True)) * self.frames_per_token
        length = (missing - 1) * self.temporal_compression + 1
        frames = torch.cat([frames, frames[-1:].expand(length - len(frames), -1, -1, -1)])
        latents = self._encode(frames.transpose(0, 1)[None].to(self.device))[0].transpose(0, 1)
        count = len(latents) // self.frames_per_token
        return latents.reshape(count, self.frames_per_token * latents.shape[1], *latents.shape[2:])

    def latent_frame_map(self, frames: int, *, padded: bool = False) -> list[list[int]]:
        """Which video frames each latent frame of `encode_video` stands for.

        Args:
            frames: T.
            padded: also list frame indices past the end, which repeat the last frame.
        """
        ratio = self.temporal_compression
        single = 1 + -(-(frames - 1) // ratio)
        joined = -(-single // self.frames_per_token)
        groups: list[list[int]] = [[] for _ in range(joined)]
        for latent in range(joined * self.frames_per_token):
            start = 0 if latent == 0 else (latent - 1) * ratio + 1
            covered = range(start, start + (1 if latent == 0 else ratio))
            groups[latent // self.frames_per_token] += [index for index in covered if padded or index < frames]
        return groups

    def _prepared(
        self,
        video: np.ndarray | torch.Tensor,
        height: int | None,
        width: int | None,
        *,
        first: tuple[int, int] | None = None,
        antialias: bool = True,
    ) -> torch.Tensor:
        own = self.preset.reading
        size, stride = (height or own.height, width or own.width), self.token_stride
        return prepared_frames(video, size, stride=stride, name=self.name, first=first, antialias=antialias)

    @property
    def decoder_arguments(self) -> Arguments:
        """What the codec's decoder is given beside the latents."""
        return {}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The video that latents `[F, C, h, w]` of `encode_video` stand for, float `[T, 3, H, W]` in about -1..1."""
        frames, _, height, width = latents.shape
        given = latents.to(self.device).float().reshape(1, frames * self.frames_per_token, -1, height, width)
        given = given.transpose(1, 2)
        # Normalisation scales and shifts, so its values for 0 and 1 say how to undo it.
        offset = self.normalized(torch.zeros_like(given))
        scale = self.normalized(torch.ones_like(given)) - offset
        video = self.pipe.vae.decode(
            ((given - offset) / scale).to(self.pipe.vae.dtype), **self.decoder_arguments, return_dict=False
        )[0]
        return video[0].transpose(0, 1).float()

    @torch.no_grad()
    def _encode(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[B, 3, T, H, W]` to normalised latents `[B, C, F, h, w]`."""
        vae = self.pipe.vae
        if vae is None:
            raise ValueError(f"{self.name} was loaded without its video codec (vae), so videos cannot be encoded")
        latents = self.normalized(vae.encode(clips.to(vae.dtype)).latent_dist.mode()).to(self.dtype)
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"the codec of {self.name} in {vae.dtype} gives latents that are NaN or infinite; load the model in "
                "bfloat16 or float32"
            )
        return latents
