"""Objectives by name: DiTFlow's and those it is compared with, FlowMotion's, and two that need no reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import CrossGrid, FramePairs, TokenGrid
from corrdit.integrations.diffusers.motion_transfer.objectives import (
    READS,
    AttentionReading,
    FeatureReading,
    MotionObjective,
    PredictionReading,
    TextReading,
    all_finite,
    mean_within,
)
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.motion import (
    attention_flow_loss,
    boxes_on_path,
    coarse_centers,
    diagonal_roughness,
    inside_loss,
    moft_channels,
    moft_loss,
    smm_loss,
    temporal_attention,
    temporal_attention_loss,
    tracking_loss,
    word_attention,
)


class AttentionMotionFlow(MotionObjective):
    """DiTFlow: displacement of every token between all frames, soft for the new video, the best match for the
    reference. FastVMT's windows, weights and tracking loss are settings of it."""

    reads = "attention"

    def of_reference(self, read: AttentionReading) -> Tensor:
        settings, options = read.settings, flow_options(read)
        if settings.flow_reference == "soft":
            return ops.soft_displacement(
                read.q, read.k, read.grid, temperature=settings.temperature, key_mask=read.key_mask, **options
            )
        return ops.hard_displacement(read.q, read.k, read.grid, key_mask=read.key_mask, **options)

    def loss(self, read: AttentionReading, wanted: Tensor) -> Tensor:
        settings, options = read.settings, flow_options(read)
        pairs = read.grid.frame_pairs(options["frames"])
        loss = attention_flow_loss(
            read.q, read.k, read.grid, wanted,
            variant=settings.loss or "released", weights=_flow_weights(read, pairs, wanted),
            temperature=settings.temperature, key_mask=read.key_mask, **options,
        )  # fmt: skip
        if not settings.tracking_weight or settings.tile is None:
            return loss
        # With frames=None pairs are two axes.
        center = options["center"].reshape(1, len(pairs), *wanted.shape[-3:])
        tracked = tracking_loss(
            read.k, read.grid, center, pairs, window=options["window"], tile=settings.tile, region=read.region
        )
        return loss + settings.tracking_weight * tracked


def flow_options(read: AttentionReading) -> dict[str, Any]:
    """Options of the displacements that the settings ask for."""
    settings = read.settings
    frames: int | FramePairs | None = None
    if isinstance(settings.span, tuple):
        least, most = settings.span
        frames = [(i, j) for i, j in read.grid.frame_pairs() if least <= j - i <= most]
    elif settings.span is not None:
        frames = settings.span
    shared: dict[str, Any] = {"heads": settings.heads, "frames": frames, "backend": settings.backend}
    center = None if settings.tile is None else coarse_centers(read.q, read.k, read.grid, settings.tile, **shared)
    return {**shared, "window": settings.window, "center": center}


def _flow_weights(read: AttentionReading, pairs: FramePairs, wanted: Tensor) -> Tensor | None:
    """Weights of the vectors by the distance of their frames and by the region of the query."""
    if read.region is None and read.settings.distance_weights is None:
        return None
    weights = torch.ones(len(pairs), *wanted.shape[-3:-1])
    if read.settings.distance_weights is not None:
        first, last = read.settings.distance_weights
        farthest = max(abs(i - j) for i, j in pairs) or 1
        by_pair = [first + (last - first) * abs(i - j) / farthest for i, j in pairs]
        weights = weights * torch.tensor(by_pair)[:, None, None]
    if read.region is not None:
        weights = weights * read.region.cpu()[[i for i, _ in pairs]]
    return weights.to(wanted.device).reshape(wanted.shape[1:-1])


class SpatialMarginalMean(MotionObjective):
    """SMM: how the spatial mean of the features differs between frames."""

    reads = "features"

    def of_reference(self, read: FeatureReading) -> Tensor:
        return read.features

    def loss(self, read: FeatureReading, wanted: Tensor) -> Tensor:
        return smm_loss(read.features, wanted, variant=read.settings.loss or "paper", region=read.region)


class MotionFeatures(MotionObjective):
    """MOFT: the channels of the time-centred features that carry motion."""

    reads = "features"

    def of_reference(self, read: FeatureReading) -> tuple[Tensor, Tensor]:
        return read.features, moft_channels(read.features, read.settings.motion_channels, region=read.region)

    def loss(self, read: FeatureReading, wanted: tuple[Tensor, Tensor]) -> Tensor:
        if not all_finite(read.features):
            # The run stops at a loss that is not finite, and says at which step.
            return read.features.sum() * math.nan
        return moft_loss(read.features, *wanted, region=read.region)


class ClonedAttention(MotionObjective):
    """MotionClone, with its temporal attention cut out of the joint one."""

    reads = "attention"

    def of_reference(self, read: AttentionReading) -> Tensor:
        if read.grid.frames < 3:
            raise ValueError(
                "motionclone compares how a frame divides its attention among the others; of "
                f"{read.grid.frames} latent frames each has one other. Give a longer video, or another method"
            )
        return temporal_attention(read.q, read.k, read.grid)

    def loss(self, read: AttentionReading, wanted: Tensor) -> Tensor:
        return temporal_attention_loss(temporal_attention(read.q, read.k, read.grid), wanted, region=read.region)


class PredictedMotion(MotionObjective):
    """FlowMotion: the clean latents predicted at the step, and how they differ between frames.

    Source: "FlowMotion: Training-Free Flow Guidance for Video Motion Transfer" (arXiv 2603.06289), weights and
    regularisation as released. Models that predict noise or v are brought to the velocity of flow matching.
    """

    reads = "prediction"
    moves = ("latent",)
    velocity_kept = 0.1
    weights = (20.0, 5.0)
    """Of the latents and of their differences."""

    def of_reference(self, read: PredictionReading) -> Tensor:
        return read.clean

    def loss(self, read: PredictionReading, wanted: Tensor) -> Tensor:
        frames = range(len(wanted))
        region = torch.ones_like(read.clean[:, :1]) if read.latent_region is None else read.latent_region
        changes, counts = [], []
        # As released: neighbouring frames once more beside all pairs.
        others = [(list(frames[1:]), list(frames[:-1]))]
        others += [([i] * (len(frames) - 1), [j for j in frames if j != i]) for i in frames]
        for first, second in others:
            change = (read.clean[first] - read.clean[second]).abs() - (wanted[first] - wanted[second]).abs()
            changes.append((change.square() * region[first]).sum())
            counts.append(region[first].sum() * change.shape[1])
        changed = torch.stack(changes).sum() / torch.stack(counts).sum()
        latents, differences = self.weights
        return latents * mean_within((read.clean - wanted).square(), region) + differences * changed


class SteadyAttention(MotionObjective):
    """Steadier motion without a reference: the temporal diagonals of self-attention are smoothed (TeDiO's idea)."""

    reads = "attention"
    needs_reference = False

    def loss(self, read: AttentionReading, wanted: None) -> Tensor:
        return diagonal_roughness(temporal_attention(read.q, read.k, read.grid), region=read.region)


class FollowedPath(MotionObjective):
    """An object follows the settings' `path`: the attention of its word stays inside the moving box."""

    reads = "text attention"
    needs_reference = False

    def check(self, settings: TransferSettings) -> None:
        if not settings.word or not settings.path:
            raise ValueError(
                'method "path" needs word, a word of the prompt, and path, where its object is: '
                "((time, left, top, right, bottom), ...) in shares of the video"
            )

    def loss(self, read: TextReading, wanted: None) -> Tensor:
        settings, grid = read.settings, read.grid
        if read.region is not None:
            raise ValueError('method "path" has places of its own, the boxes of path; leave region out')
        assert settings.word is not None
        assert read.words is not None
        places = read.words.places(settings.word)
        attention = word_attention(read.q, read.k, grid, places, key_mask=read.key_mask)
        return inside_loss(attention, path_tokens(settings.path, grid).to(attention.device))


def path_tokens(path: tuple[tuple[float, ...], ...], grid: TokenGrid | CrossGrid) -> Tensor:
    """A path as the tokens of each latent frame, bool `[F, h, w]`."""
    times = [frame / max(grid.frames - 1, 1) for frame in range(grid.frames)]
    return boxes_on_path(path, times, grid.height, grid.width)


class Injection(MotionObjective):
    """Keys and values of the reference in the settings' `injection_blocks`; nothing is optimised."""

    def check(self, settings: TransferSettings) -> None:
        if not settings.injection_blocks:
            raise ValueError(
                f'method "{settings.method}" needs injection_blocks; DiTFlow takes block 0: injection_blocks=(0,), or '
                "--injection-blocks [0] of the command"
            )


class QueryInjection(Injection):
    """Queries of the reference in the settings' `injection_blocks`: the new video looks where the reference looks."""

    injects = ("query",)


class PlainGeneration(MotionObjective):
    """The same generation without any guidance."""

    needs_reference = False
    injects = ()


_METHODS: dict[str, type[MotionObjective]] = {
    "ditflow": AttentionMotionFlow,
    "smm": SpatialMarginalMean,
    "moft": MotionFeatures,
    "motionclone": ClonedAttention,
    "flowmotion": PredictedMotion,
    "steady": SteadyAttention,
    "path": FollowedPath,
    "injection": Injection,
    "query-injection": QueryInjection,
    "backbone": PlainGeneration,
}


def objective_of(settings: TransferSettings) -> MotionObjective:
    """The objective that the settings name, or the one that they hold.

    Raises:
        TypeError: not a `MotionObjective`, or one that does not say right what it reads.
        ValueError: settings that do not go with it.
    """
    method = settings.method
    found = _METHODS[method] if isinstance(method, str) else method
    objective = found() if isinstance(found, type) else found
    name = type(objective).__name__
    if not isinstance(objective, MotionObjective):
        raise TypeError(f"method must be a MotionObjective, got {name}; make it a subclass")
    if objective.reads is not None and objective.reads not in READS:
        raise TypeError(f"{name}.reads must be one of {', '.join(READS)}, or None, got {objective.reads!r}")
    if set(objective.injects) - {"query", "key", "value"}:
        raise TypeError(f"{name}.injects may be query, key and value, got {objective.injects!r}")
    movable = ("latent",) if objective.reads == "prediction" else objective.moves
    if objective.reads is not None and settings.optimise not in movable:
        raise ValueError(
            f"optimise is {settings.optimise!r}, but the gradient of {name} reaches {' and '.join(movable)} only; give "
            f'optimise="{movable[0]}"'
        )
    objective.check(settings)
    return objective
