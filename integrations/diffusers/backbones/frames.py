"""Frames of a video as a codec takes them, and as a transformer is conditioned on them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F

from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.layouts import Arguments, Pipeline


class Posterior(Protocol):
    """What a codec of diffusers says of the latents of clips."""

    mean: torch.Tensor
    std: torch.Tensor

    def mode(self) -> torch.Tensor: ...


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


def with_image_and_mask(latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """Latents `[B, F, 2 C + 1, h, w]`: noisy ones, those given (zeros behind them), and which are given.

    Args:
        latents: `[B, F, C, h, w]`.
        image: `[B, 1 or F, C, h, w]`, or None for nothing.
    """
    given, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :, :1])
    if image is not None:
        given[:, : image.shape[1]], mask[:, : image.shape[1]] = image, 1
    return torch.cat([latents, given, mask], dim=2)


def _drawn(posterior: Posterior, seeds: Sequence[int | None]) -> torch.Tensor:
    """The mode, or a sample with noise that is drawn on the CPU, so that it is the same on every device.

    A codec without a spread, whose posterior has no mean, has the mode for its only sample.
    """
    if all(seed is None for seed in seeds) or not hasattr(posterior, "mean"):
        return posterior.mode()
    mean = posterior.mean
    noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed or 0)) for seed in seeds]
    return mean + posterior.std * torch.stack(noise).to(mean)


PIXELS_PER_ENCODER_CALL = 480 * 720
"""Frames are given to the codec in groups of about this many pixels, so that memory does not grow with the video."""


class FrameEncoder(abc.ABC):
    """The half of a backbone that makes latents of videos."""

    pipe: Pipeline
    name: str
    transformer: torch.nn.Module
    preset: Preset
    first_frame_alone: ClassVar[bool] = True
    """Whether the codec's first latent stands for one frame, and not for as many as the others."""

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
        """Video frames a latent frame stands for; the first may stand for one (`first_frame_alone`)."""
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
        posterior_seeds: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Every frame as a latent of its own: no temporal compression.

        Args:
            video: uint8 `[T, H, W, 3]`.
            height: height to resize to before encoding; None for the preset's or the video's own.
            width: likewise.
            first: (height, width) to which frames are resized before that; None for none.
            antialias: whether frames are resized with antialiasing.
            posterior_seeds: one for each frame, from which its latents are drawn as the codec's posterior says
                (DiffTrack's released code draws them); None takes the most likely ones.

        Returns:
            Latents `[T, C, h, w]`.

        Raises:
            ValueError: not such a video, or a size that is not a multiple of `token_stride`.
        """
        frames = self._prepared(video, height, width, first=first, antialias=antialias)
        group = max(1, PIXELS_PER_ENCODER_CALL // (frames.shape[2] * frames.shape[3]))
        one = 1 if self.first_frame_alone else self.temporal_compression
        seeds = [None] * len(frames) if posterior_seeds is None else list(posterior_seeds)
        if len(seeds) != len(frames):
            raise ValueError(f"{len(seeds)} posterior_seeds were given for {len(frames)} frames; give one for each")
        latents = [
            self._encode(part[:, :, None].expand(-1, -1, one, -1, -1).to(self.device), seeds[start : start + group])
            for start, part in zip(range(0, len(frames), group), frames.split(group), strict=False)
        ]
        return torch.cat(latents)[:, :, 0].repeat(1, self.frames_per_token, 1, 1)

    def encode_video(
        self,
        video: np.ndarray | torch.Tensor,
        *,
        height: int | None = None,
        width: int | None = None,
        first: tuple[int, int] | None = None,
        antialias: bool = True,
        posterior_seed: int | None = None,
    ) -> torch.Tensor:
        """The video through the codec as it was trained, temporally compressed; `latent_frame_map` says how.

        Arguments, result and errors as for `encode_frames`, with F latent frames instead of T. The last frame is
        repeated until the codec's and the transformer's temporal strides fit.
        """
        frames = self._prepared(video, height, width, first=first, antialias=antialias)
        length = sum(map(len, self.latent_frame_map(len(frames), padded=True)))
        frames = torch.cat([frames, frames[-1:].expand(length - len(frames), -1, -1, -1)])
        latents = self._encode(frames.transpose(0, 1)[None].to(self.device), [posterior_seed])[0].transpose(0, 1)
        count = len(latents) // self.frames_per_token
        return latents.reshape(count, self.frames_per_token * latents.shape[1], *latents.shape[2:])

    def latent_frame_map(self, frames: int, *, padded: bool = False) -> list[list[int]]:
        """Which video frames each latent frame of `encode_video` stands for.

        Args:
            frames: T.
            padded: also list frame indices past the end, which repeat the last frame.
        """
        ratio = self.temporal_compression
        first = 1 if self.first_frame_alone else ratio
        single = 1 + -(-max(0, frames - first) // ratio)
        joined = -(-single // self.frames_per_token)
        groups: list[list[int]] = [[] for _ in range(joined)]
        for latent in range(joined * self.frames_per_token):
            start = 0 if latent == 0 else (latent - 1) * ratio + first
            covered = range(start, start + (first if latent == 0 else ratio))
            groups[latent // self.frames_per_token] += [index for index in covered if padded or index < frames]
        return groups

    def fitting_frames(self, frames: int) -> int:
        """The most of these frames that the codec takes as they are; 0 where it takes none."""
        alone = 1 if self.first_frame_alone else 0
        return (frames - alone) // self.temporal_compression * self.temporal_compression + alone

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

    def posterior(self, clips: torch.Tensor) -> Posterior:
        """What the codec makes of clips `[B, 3, T, H, W]`: latents `[B, C, F, h, w]` with their spread."""
        found: Posterior = self.pipe.vae.encode(clips).latent_dist
        return found

    @torch.no_grad()
    def _encode(self, clips: torch.Tensor, seeds: Sequence[int | None] = ()) -> torch.Tensor:
        """Clips `[B, 3, T, H, W]` to normalised latents `[B, C, F, h, w]`, drawn where a clip has a seed."""
        vae = self.pipe.vae
        if vae is None:
            raise ValueError(f"{self.name} was loaded without its video codec (vae), so videos cannot be encoded")
        latents = self.normalized(_drawn(self.posterior(clips.to(vae.dtype)), seeds)).to(self.dtype)
        if not torch.isfinite(latents).all():
            raise ValueError(
                f"the codec of {self.name} in {vae.dtype} gives latents that are NaN or infinite; load the model in "
                "bfloat16 or float32"
            )
        return latents
