"""Analysing a given video: encoded, noised or inverted to each step, and read in one forward a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.counts import MatchCounts, TrueTracks, attention_sums, match_counts
from corrdit.analysis.point_readings import AttentionReading, read_attention, read_features
from corrdit.analysis.protocols import AnalysisOptions, resolved
from corrdit.analysis.table import AnalysisTable
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import FeatureOperation, reading_forward
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.tracking.options import POSTERIOR_SEED
from corrdit.tracking.queries import check_video
from corrdit.tracking.readings import image_given
from corrdit.tracking.tracker import TOKENS_PER_FRAME, working_size

Progress = Callable[[int, int], None]
LayerReading: TypeAlias = "AttentionReading | Tensor"
"""What a layer says: of its queries and keys, or positions by its features."""
OnReading = Callable[[int, int, str, LayerReading], None]


@dataclass(frozen=True, eq=False)
class EncodedVideo:
    """A video ready to be read, with its truth at the size it is encoded.

    Args:
        latents: `[F, C, h, w]`.
        truth: of the points that are visible in the first frame, or of all where hidden ones count.
        frames: the chosen frames, uint8 `[T, H, W, 3]`, at their own size.
        scale: (x, y) factor from pixels of the video to pixels of the encoded frames.
    """

    latents: Tensor
    truth: TrueTracks
    frames: np.ndarray
    scale: tuple[float, float]


def analysis_axes(backbone: Backbone, options: AnalysisOptions) -> AnalysisTable:
    """An empty table of the layers, steps and timesteps that the options ask of a backbone.

    Raises:
        ValueError: a layer or step the backbone does not have.
    """
    inference_steps = options.inference_steps or backbone.preset.reading.inference_steps
    steps = resolved("step", options.steps, inference_steps, f"the schedule of {inference_steps} steps")
    layers = resolved("layer", options.layers, backbone.layers, backbone.name)
    return empty_table(backbone, options, layers, {step: backbone.timestep(step, inference_steps) for step in steps})


def empty_table(
    backbone: Backbone, options: AnalysisOptions, layers: tuple[int, ...], timesteps: Mapping[int, float]
) -> AnalysisTable:
    """A table of layers and of steps with their timesteps."""
    return AnalysisTable(
        steps=tuple(timesteps),
        layers=layers,
        timesteps=tuple(timesteps.values()),
        heads=backbone.heads if options.per_head else 0,
        features=options.features,
        thresholds=options.thresholds_for(backbone.token_stride),
        stride=backbone.token_stride,
        low_pass=options.low_pass,
    )


def encoded_video(
    backbone: Backbone,
    video: np.ndarray,
    xy: np.ndarray,
    visible: np.ndarray,
    options: AnalysisOptions,
    *,
    starts: np.ndarray | None = None,
) -> EncodedVideo:
    """Choose frames, encode them, and carry the tracks over.

    Args:
        backbone: of `load_backbone`.
        video: uint8 `[T, H, W, 3]`.
        xy: `[T, P, 2]`, true (x, y) in pixels of the video.
        visible: bool `[T, P]`; points not visible in the first frame are left out, unless they count.
        options: see `AnalysisOptions`.
        starts: `[P, 2]`, the queries in place of the positions in the first frame.

    Raises:
        ValueError: a video or tracks of another layout or length, no point that can be scored, or latents that are NaN.
    """
    check_video(video)
    xy, visible = np.asarray(xy, dtype=np.float32), np.asarray(visible)
    if xy.ndim != 3 or xy.shape[2] != 2 or visible.shape != xy.shape[:2] or visible.dtype != bool:
        raise ValueError(
            f"tracks must be xy [frames, points, 2] and visible boolean [frames, points], got {list(xy.shape)} and "
            f"{visible.dtype} {list(visible.shape)}"
        )
    if len(xy) != len(video):
        raise ValueError(f"the video has {len(video)} frames, its tracks have {len(xy)}; they must agree")
    chosen = _chosen_frames(backbone, len(video), options)
    frames, points = video[chosen], np.ones_like(visible[0]) if options.count_hidden_starts else visible[0]
    height, width = encoded_size(backbone, video.shape[1], video.shape[2], options)
    latents = _latents(backbone, frames, chosen, (height, width), options)
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("the codec gives latents that are NaN or infinite; check its precision and the video")
    groups = [[frame] for frame in range(len(frames))]
    if options.latents == "video":
        groups = backbone.latent_frame_map(len(frames))
    scale = (width / video.shape[2], height / video.shape[1])
    truth = TrueTracks(
        xy=torch.from_numpy(xy[chosen][:, points]) * torch.tensor(scale),
        visible=torch.from_numpy(visible[chosen][:, points]),
        frame_map=tuple(map(tuple, groups)),
        starts=None if starts is None else torch.from_numpy(starts[points]) * torch.tensor(scale),
    )
    return EncodedVideo(latents, truth, frames, scale)


def _latents(
    backbone: Backbone, frames: np.ndarray, numbers: np.ndarray, size: tuple[int, int], options: AnalysisOptions
) -> Tensor:
    """Clean latents `[F, C, h, w]` of frames by their numbers in the video."""
    resizing: dict[str, Any] = {"height": size[0], "width": size[1], "antialias": options.antialias}
    resizing["first"] = options.resize_first
    seed = POSTERIOR_SEED + 1_000_003 * options.seed if options.posterior == "sample" else None
    if options.latents == "video":
        return backbone.encode_video(frames, posterior_seed=seed, **resizing)
    seeds = None if seed is None else [seed + int(number) for number in numbers]
    return backbone.encode_frames(frames, posterior_seeds=seeds, **resizing)


def analyze_video(
    backbone: Backbone,
    video: np.ndarray,
    xy: np.ndarray,
    visible: np.ndarray,
    options: AnalysisOptions | None = None,
    *,
    starts: np.ndarray | None = None,
    progress: Progress | None = None,
    on_reading: OnReading | None = None,
) -> AnalysisTable:
    """Matching, confidence and attention of every layer, step and head asked for, on a given video.

    One forward a step reads all layers; every reading is turned into counts as it comes, so memory does not grow with
    layers and steps.

    Args:
        backbone, video, xy, visible, options, starts: as for `encoded_video`.
        progress: called with (steps done, steps in all).
        on_reading: `on_reading(step, layer, name, reading)`, called as each comes; name is "attention" or one of
            `corrdit.analysis.FEATURE_READINGS`.

    Raises:
        ValueError: as `encoded_video`, a layer or step the backbone does not have, or queries, keys or features that
            are NaN, with the layer and step.
    """
    options = options or AnalysisOptions()
    table = analysis_axes(backbone, options)
    encoded = encoded_video(backbone, video, xy, visible, options, starts=starts)
    score_standing_still(table, encoded.truth, len(encoded.latents), options)
    timesteps = dict(zip(table.steps, table.timesteps, strict=True))
    given = given_latents(backbone, encoded.latents, timesteps, options)
    for done, (step, latents) in enumerate(given, start=1):

        def receive(layer: int, name: str, reading: LayerReading, step: int = step) -> None:
            score_reading(table, step, layer, name, reading, encoded.truth, options)
            if on_reading is not None:
                on_reading(step, layer, name, reading)

        operation, feature_operation = reading_operations(backbone, encoded.truth.queries, options)
        try:
            reading_forward(
                backbone,
                latents,
                timesteps[step],
                layers=table.layers,
                operation=operation,
                feature_operation=feature_operation,
                deliver=receive,
                image=image_given(backbone, encoded.latents).get("image"),
            )
        except ValueError as error:
            raise ValueError(f"step {step}: {error}") from error
        if progress is not None:
            progress(done, len(table.steps))
    return table


def reading_operations(
    backbone: Backbone, points: Tensor, options: AnalysisOptions
) -> tuple[Callable[[Tensor, Tensor, TokenGrid, Tensor | None], AttentionReading], FeatureOperation | None]:
    """The operations on queries and keys and on features (or None) for points `[P, 2]` in encoded pixels."""
    stride = backbone.token_stride

    def attention(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> AttentionReading:
        return read_attention(q, k, grid, key_mask, points=points, stride=stride, options=options)

    def features(values: Tensor, grid: TokenGrid) -> Tensor:
        return read_features(values, grid, heads=backbone.heads, points=points, stride=stride, options=options)

    return attention, features if options.features else None


def score_reading(
    table: AnalysisTable,
    step: int,
    layer: int,
    name: str,
    reading: LayerReading,
    truth: TrueTracks,
    options: AnalysisOptions,
) -> None:
    """Enter a reading ("attention", or a feature's name) into the table as counts and sums."""
    positions, first = (reading, table.readings.index(name)) if isinstance(reading, Tensor) else (reading.positions, 0)
    table.put_matches(step, layer, first, _counted(table, positions, truth, options))
    if not isinstance(reading, Tensor):
        table.put_attention(step, layer, attention_sums(reading, truth, options.average))


def score_standing_still(table: AnalysisTable, truth: TrueTracks, frames: int, options: AnalysisOptions) -> None:
    """Enter points that never move, in `frames` latent frames."""
    still = truth.queries.expand(1, frames - 1, -1, -1)
    table.put_still(_counted(table, still, truth, options))


def _counted(table: AnalysisTable, positions: Tensor, truth: TrueTracks, options: AnalysisOptions) -> MatchCounts:
    return match_counts(positions, truth, stride=table.stride, thresholds=table.thresholds, options=options)


def given_latents(
    backbone: Backbone, latents: Tensor, timesteps: Mapping[int, float], options: AnalysisOptions
) -> Iterator[tuple[int, Tensor]]:
    """The latents as the model is given them at each step, one after another; inverted ones from the cleanest on.

    Args:
        backbone: of `load_backbone`.
        latents: clean, `[F, C, h, w]`.
        timesteps: by the steps asked for.
        options: whether they are noised, inverted or left clean.
    """
    if options.noise == "inverted":
        inference_steps = options.inference_steps or backbone.preset.reading.inference_steps
        image = image_given(backbone, latents).get("image")
        yield from backbone.inverted(latents, list(timesteps), inference_steps, image=image)
        return
    for step, timestep in timesteps.items():
        yield step, noised(backbone, latents, step, timestep, options)


def noised(backbone: Backbone, latents: Tensor, step: int, timestep: float, options: AnalysisOptions) -> Tensor:
    """The latents as the model is given them at a step; the noise follows from the seed and the step alone."""
    if options.noise == "clean":
        return latents
    generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return backbone.add_noise(latents, noise, timestep)


def encoded_size(backbone: Backbone, height: int, width: int, options: AnalysisOptions) -> tuple[int, int]:
    """(height, width) in pixels at which frames are encoded: the preset's, or near the video's in whole tokens."""
    preset = backbone.preset.reading
    if options.encoded_size is not None:
        return options.encoded_size
    if options.tokens_per_frame is None and preset.height is not None and preset.width is not None:
        return preset.height, preset.width
    tokens = options.tokens_per_frame or preset.tokens_per_frame or TOKENS_PER_FRAME
    return working_size(height, width, backbone.token_stride, tokens)


def _chosen_frames(backbone: Backbone, frames: int, options: AnalysisOptions) -> np.ndarray:
    if options.latents == "frames":
        most = options.max_frames or backbone.preset.reading.frames_per_chunk
    elif options.max_frames is None:
        most = frames
    else:
        latents = options.max_frames * backbone.frames_per_token
        most = (latents - 1) * backbone.temporal_compression + 1
    return np.unique(np.linspace(0, frames - 1, min(frames, most)).round().astype(int))
