"""What of a video is compared with the reference: one motion description and its loss for each method."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.motion import (
    attention_flow_loss,
    coarse_centers,
    moft_channels,
    moft_loss,
    smm_loss,
    temporal_attention,
    temporal_attention_loss,
)


class MotionMethod:
    """A description of motion, read from one attention layer or from a block's output, and a loss on it.

    A method has the two functions of what it reads: what it keeps of the reference, and the loss against that, a
    differentiable scalar in float32 or float64.

    Args:
        settings: of the transfer.

    Attributes:
        reads: "attention" (queries and keys `[1, H, N, D]`) or "features" (the block's output for the video tokens,
            `[F, C, h, w]`).
    """

    reads: ClassVar[Literal["attention", "features"]]

    def __init__(self, settings: TransferSettings) -> None:
        self.settings = settings

    def reference_of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Any:
        """What the loss compares with, from the reference's queries and keys."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}")

    def loss_of_attention(
        self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, *, reference: Any
    ) -> Tensor:
        """The loss from queries and keys, and what was kept of the reference."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}")

    def reference_of_features(self, features: Tensor) -> Any:
        """What the loss compares with, from the reference's features."""
        return features

    def loss_of_features(self, features: Tensor, reference: Any) -> Tensor:
        """The loss from features, and what was kept of the reference."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}")


class AttentionMotionFlow(MotionMethod):
    """DiTFlow: displacement of every token between all frames, soft for the new video, the best match for the
    reference."""

    reads = "attention"

    def reference_of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        options = self._options(q, k, grid)
        if self.settings.flow_reference == "soft":
            temperature = self.settings.temperature
            return ops.soft_displacement(q, k, grid, temperature=temperature, key_mask=key_mask, **options)
        return ops.hard_displacement(q, k, grid, key_mask=key_mask, **options)

    def loss_of_attention(
        self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, *, reference: Tensor
    ) -> Tensor:
        settings, options = self.settings, self._options(q, k, grid)
        return attention_flow_loss(
            q, k, grid, reference,
            variant=settings.loss_variant, temperature=settings.temperature, key_mask=key_mask, **options,
        )  # fmt: skip

    def _options(self, q: Tensor, k: Tensor, grid: TokenGrid) -> dict[str, Any]:
        settings = self.settings
        shared = {"heads": settings.heads, "frames": settings.span, "backend": settings.backend}
        center = None if settings.tile is None else coarse_centers(q, k, grid, settings.tile, **shared)  # type: ignore[arg-type]
        return {**shared, "window": settings.window, "center": center}


class SpatialMarginalMean(MotionMethod):
    """SMM: how the spatial mean of the features differs between frames."""

    reads = "features"

    def loss_of_features(self, features: Tensor, reference: Tensor) -> Tensor:
        return smm_loss(features, reference, variant=self.settings.loss_variant)


class MotionFeatures(MotionMethod):
    """MOFT: the channels of the time-centred features that carry motion."""

    reads = "features"

    def reference_of_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, moft_channels(features, self.settings.motion_channels)

    def loss_of_features(self, features: Tensor, reference: tuple[Tensor, Tensor]) -> Tensor:
        if not bool(torch.isfinite(features).all()):
            # The run stops at a loss that is not finite, and says at which step.
            return features.sum() * math.nan
        return moft_loss(features, *reference)


class ClonedAttention(MotionMethod):
    """MotionClone, with its temporal attention cut out of the joint one."""

    reads = "attention"

    def reference_of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        if grid.frames < 3:
            raise ValueError(
                f"motionclone compares how a frame divides its attention among the others; of {grid.frames} latent "
                "frames each has one other. Give a longer video, or another method"
            )
        return temporal_attention(q, k, grid)

    def loss_of_attention(
        self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, *, reference: Tensor
    ) -> Tensor:
        return temporal_attention_loss(temporal_attention(q, k, grid), reference)


_METHODS: dict[str, type[MotionMethod]] = {
    "ditflow": AttentionMotionFlow,
    "smm": SpatialMarginalMean,
    "moft": MotionFeatures,
    "motionclone": ClonedAttention,
}


def method_of(settings: TransferSettings) -> MotionMethod | None:
    """The method of the settings; None where nothing is optimised."""
    return _METHODS[settings.method](settings) if settings.method in _METHODS else None
