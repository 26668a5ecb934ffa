"""What of a video is compared with the reference: one motion description and its loss for each method."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.motion_transfer.settings import TransferSettings
from corrdit.motion import (
    coarse_centers,
    flow_loss,
    moft_channels,
    moft_loss,
    smm_loss,
    temporal_attention,
    temporal_attention_loss,
)


class MotionMethod(abc.ABC):
    """A description of motion, read from one attention layer or from a block's output, and a loss on it.

    Args:
        settings: of the transfer.

    Attributes:
        reads: "attention" (queries and keys) or "features" (the block's output for the video tokens).
    """

    reads: ClassVar[Literal["attention", "features"]]

    def __init__(self, settings: TransferSettings) -> None:
        self.settings = settings

    def of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        """The description from queries and keys `[1, H, N, D]`; differentiable."""
        raise TypeError(f"{type(self).__name__} reads {self.reads}")

    def of_features(self, features: Tensor) -> Tensor:
        """The description from features `[F, C, h, w]`; differentiable."""
        return features

    def reference_of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Any:
        """What `loss` compares with, from the reference's queries and keys."""
        return self.of_attention(q, k, grid, key_mask)

    def reference_of_features(self, features: Tensor) -> Any:
        """What `loss` compares with, from the reference's features."""
        return self.of_features(features)

    @abc.abstractmethod
    def loss(self, description: Tensor, reference: Any) -> Tensor:
        """Scalar in float32 or float64."""


class AttentionMotionFlow(MotionMethod):
    """DiTFlow: displacement of every token between all frames, soft for the new video, the best match for the
    reference."""

    reads = "attention"

    def of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        options = self._options(q, k, grid)
        return ops.soft_displacement(q, k, grid, temperature=self.settings.temperature, key_mask=key_mask, **options)

    def reference_of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        if self.settings.flow_reference == "soft":
            return self.of_attention(q, k, grid, key_mask)
        return ops.hard_displacement(q, k, grid, key_mask=key_mask, **self._options(q, k, grid))

    def loss(self, description: Tensor, reference: Tensor) -> Tensor:
        return flow_loss(description, reference, variant=self.settings.loss)

    def _options(self, q: Tensor, k: Tensor, grid: TokenGrid) -> dict[str, Any]:
        settings = self.settings
        shared = {"heads": settings.heads, "frames": settings.span, "backend": settings.backend}
        center = None if settings.tile is None else coarse_centers(q, k, grid, settings.tile, **shared)  # type: ignore[arg-type]
        return {**shared, "window": settings.window, "center": center}


class SpatialMarginalMean(MotionMethod):
    """SMM: how the spatial mean of the features differs between frames."""

    reads = "features"

    def loss(self, description: Tensor, reference: Tensor) -> Tensor:
        return smm_loss(description, reference, variant=self.settings.loss)


class MotionFeatures(MotionMethod):
    """MOFT: the channels of the time-centred features that carry motion."""

    reads = "features"

    def reference_of_features(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return features, moft_channels(features, self.settings.motion_channels)

    def loss(self, description: Tensor, reference: tuple[Tensor, Tensor]) -> Tensor:
        return moft_loss(description, *reference)


class ClonedAttention(MotionMethod):
    """MotionClone, with its temporal attention cut out of the joint one."""

    reads = "attention"

    def of_attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Tensor:
        return temporal_attention(q, k, grid)

    def loss(self, description: Tensor, reference: Tensor) -> Tensor:
        return temporal_attention_loss(description, reference)


_METHODS: dict[str, type[MotionMethod]] = {
    "ditflow": AttentionMotionFlow,
    "smm": SpatialMarginalMean,
    "moft": MotionFeatures,
    "motionclone": ClonedAttention,
}


def method_of(settings: TransferSettings) -> MotionMethod | None:
    """The method of the settings; None where nothing is optimised."""
    return _METHODS[settings.method](settings) if settings.method in _METHODS else None


def reference_flow(
    q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, settings: TransferSettings
) -> Tensor:
    """Hard displacement between all frames, int64 `[F, F, h, w, 2]`, for pictures and tables."""
    with torch.no_grad():
        return ops.hard_displacement(q, k, grid, heads=settings.heads, key_mask=key_mask, backend=settings.backend)[0]
