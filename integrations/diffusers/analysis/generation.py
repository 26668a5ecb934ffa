"""Analysing a pipeline while it generates: all layers and steps in one run, scored once the video is there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.counts import TrueTracks
from corrdit.analysis.point_readings import AttentionReading
from corrdit.analysis.protocols import AnalysisOptions, resolved
from corrdit.analysis.table import AnalysisTable
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import ReadingCapture
from corrdit.integrations.diffusers.analysis.videos import (
    LayerReading,
    OnReading,
    empty_table,
    reading_operations,
    score_reading,
    score_standing_still,
)
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.guidance.comparison import check_call
from corrdit.tracking.pseudo_truth import Tracker, starting_points
from corrdit.tracking.tracks import Tracks


@dataclass(frozen=True, eq=False)
class GenerationAnalysis:
    """A generated video and what its denoising showed.

    Args:
        table: the numbers.
        video: uint8 `[T, H, W, 3]`.
        tracks: the pseudo-truth, in pixels.
        prompt, seed: it was made with.
    """

    table: AnalysisTable
    video: np.ndarray
    tracks: Tracks
    prompt: str
    seed: int


def analyze_generation(
    backbone: Backbone,
    prompt: str,
    *,
    tracker: Tracker,
    options: AnalysisOptions | None = None,
    mode: str = "scene",
    seed: int = 0,
    call: Mapping[str, Any] | None = None,
    on_reading: OnReading | None = None,
) -> GenerationAnalysis:
    """Generate a video and analyse its denoising, in the conditional branch.

    Where points go is only known afterwards, so readings wait in a temporary file; memory holds one of them at a time.

    Args:
        backbone: of `load_backbone`; text to video, or image to video with `image` in `call`.
        prompt: for the pipeline; "" where `call` holds prompt embeddings.
        tracker: gives the pseudo-truth from the video, see `corrdit.tracking.pseudo_truth`.
        options: `layers`, `steps` and the ways of measuring are used.
        mode: starting grid, "object" or "scene".
        seed: of the noise, drawn on the CPU.
        call: further arguments of the pipeline's call.
        on_reading: as for `analyze_video`.

    Raises:
        ValueError: an argument the pipeline does not take, layers or steps it does not have, queries, keys or features
            that are NaN, a video whose frames are not those of the latents, or no point that can be scored.
    """
    options = options or AnalysisOptions()
    backbone.check_use("analysis")
    arguments = _arguments(backbone, prompt, options, call or {})
    inference_steps = arguments["num_inference_steps"]
    steps = resolved("step", options.steps, inference_steps, f"the run of {inference_steps} steps")
    layers = resolved("layer", options.layers, backbone.layers, backbone.name)
    reader = _GridReader(backbone, options, mode)
    with tempfile.TemporaryFile() as file:
        spool = _Spool(file, on_reading)
        capturing = ReadingCapture(
            backbone.pipe,
            layers=layers,
            steps=steps,
            operation=reader.attention,
            feature_operation=reader.features if options.features else None,
            deliver=spool.add,
        )
        with capturing:
            made = backbone.pipe(**arguments, generator=torch.Generator().manual_seed(seed))
        video = np.round(np.asarray(made.frames[0]) * 255).clip(0, 255).astype(np.uint8)
        tracks = tracker(video, np.column_stack([np.zeros(len(reader.points)), reader.points.numpy()]))
        # The timesteps of the run that has just ended.
        schedule = backbone.pipe.scheduler.timesteps
        table = empty_table(backbone, options, layers, {step: float(schedule[step]) for step in steps})
        truth = reader.truth(video, tracks)
        score_standing_still(table, truth, reader.frames, options)
        for step, layer, name, reading in spool:
            score_reading(table, step, layer, name, reading, truth, options)
    return GenerationAnalysis(table, video, tracks, prompt, seed)


def _arguments(backbone: Backbone, prompt: str, options: AnalysisOptions, call: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with, the generator aside."""
    check_call(backbone.pipe, call)
    steps = int(call.get("num_inference_steps") or options.inference_steps or backbone.preset.reading.inference_steps)
    words = {"prompt": prompt} if prompt else {}
    return {**backbone.call_options, **call, **words, "num_inference_steps": steps, "output_type": "np"}


class _GridReader:
    """Reads the starting grid's points, which follow from the token grid of the first forward."""

    def __init__(self, backbone: Backbone, options: AnalysisOptions, mode: str) -> None:
        self.backbone, self.options, self.mode = backbone, options, mode
        self.points, self.size, self.frames = torch.zeros(0, 2), (0, 0), 0

    def attention(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> AttentionReading:
        """The operation on queries and keys."""
        if not self.frames:
            stride = self.backbone.token_stride
            self.frames, self.size = grid.frames, (grid.height * stride[0], grid.width * stride[1])
            self.points = torch.from_numpy(starting_points(self.mode, *self.size)[:, 1:])
            self.operations = reading_operations(self.backbone, self.points, self.options)
        return self.operations[0](q, k, grid, key_mask)

    def features(self, values: Tensor, grid: TokenGrid) -> object:
        """The operation on features, which come after queries and keys."""
        assert self.operations[1] is not None
        return self.operations[1](values, grid)

    def truth(self, video: np.ndarray, tracks: Tracks) -> TrueTracks:
        """Pseudo-truth at the size of the token grid.

        Raises:
            ValueError: a video of another size or length than the latents stand for.
        """
        if video.shape[1:3] != self.size:
            raise ValueError(f"the video has {video.shape[1:3]} pixels, but its tokens span {self.size}")
        groups = self.backbone.latent_frame_map(len(video))
        if len(groups) != self.frames:
            raise ValueError(
                f"the video has {len(video)} frames, which is {len(groups)} frames of tokens, but {self.frames} were "
                "denoised; give num_frames of which the pipeline drops none"
            )
        return TrueTracks(tracks.xy, tracks.visible, tuple(map(tuple, groups)))


class _Spool:
    """Readings in a file, in the order they came; `on_reading` sees them pass."""

    def __init__(self, file: IO[bytes], on_reading: OnReading | None) -> None:
        self._file, self._on_reading = file, on_reading
        self._entries: list[tuple[int, int, str, int]] = []

    def add(self, step: int, layer: int, name: str, reading: LayerReading) -> None:
        """Append one."""
        parts = [reading] if isinstance(reading, Tensor) else list(reading)
        for part in parts:
            np.save(self._file, part.numpy(), allow_pickle=False)
        self._entries.append((step, layer, name, len(parts)))
        if self._on_reading is not None:
            self._on_reading(step, layer, name, reading)

    def __iter__(self) -> Iterator[tuple[int, int, str, LayerReading]]:
        self._file.seek(0)
        for step, layer, name, count in self._entries:
            parts = [torch.from_numpy(np.load(self._file, allow_pickle=False)) for _ in range(count)]
            yield step, layer, name, parts[0] if count == 1 else AttentionReading(*parts)
