"""LightningModules for prediction: tracking points through many videos."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike

from corrdit.arguments import flag
from corrdit.evaluation import evaluate_video
from corrdit.files import file_digest
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.lightning.data_modules import tracking_results
from corrdit.integrations.lightning.resumable import Model, ResumableModule
from corrdit.integrations.lightning.tapvid_data import TapVidDataModule, TapVidItem, sample_of
from corrdit.metrics import TapVidMetric
from corrdit.progress import hidden_bars
from corrdit.runs import Keywords
from corrdit.tracking import PointTracker
from corrdit.tracking.files import PARTS, RESULT_FILE, track_at_size, write_track_results
from corrdit.tracking.queries import check_queries, grid_points, grid_side
from corrdit.visualization import TrackStyle

Queries = int | str | np.ndarray | Callable[[int, int, int], np.ndarray]


class TrackingModule(ResumableModule[Mapping[str, str]]):
    """Tracks points through each video `Trainer.predict` gives it and writes a folder of results for each.

    `Trainer.test` with a `TapVidDataModule` tracks that set's queries instead, writes nothing, and logs the means of
    TAP-Vid's metric over the videos of all processes (`average_jaccard`, ..., `videos`, and how many were broken or
    had no visible points). `EvaluationModule` keeps results, resumes, and compares several trackers.

    ```python
    data = VideoDataModule("videos", output="results")
    Trainer().predict(TrackingModule("embedded", output="results"), data, return_predictions=False)
    ```

    `output/NAME/` gets `tracks.npz` (xy `[T, P, 2]`, visible, score `[T, P]`, queries `[P, 3]`) and, with `pictures`,
    `tracks.mp4` and `tracks.png`. Files are written beside and renamed, `tracks.npz` last, so a run may be killed at
    any time; with `VideoDataModule(..., output=output)` the next run does what is left, what is damaged and videos that
    are others than before; within a video longer than `frames_per_block` it goes on block by block. A broken video gets
    `output/NAME/failed.json`. `output/settings.json` says how the results were made; a run with other settings or
    weights is refused.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        queries: the points of each video: n or "grid:n" for n x n on the first frame, `[P, 3]` (frame, x, y) in pixels
            for all videos alike, or a function (frames, height, width) -> such an array.
        queries_description: what `settings.json` says about them; needed with a function.
        preset: "default" or "published", as `corrdit.PointTracker` takes it.
        options: of `corrdit.PointTracker`, by name.
        dtype: precision of the model, as torch's type or by its name.
        start: frames to skip at the beginning of each video.
        max_frames: most frames to read of each.
        max_side: frames are shrunk to at most this many pixels on the longer side while they are read.
        pictures: whether to draw `tracks.mp4` and `tracks.png`.
        trail: frames of path drawn behind a point, where no `style` is given.
        style: how the tracks are drawn.
        columns: further facts of the points, such as labels, `[P]` each, by name; stored along.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "report" writes `failed.json` for a video that cannot be read or tracked and goes on; "raise" stops.

    Raises:
        ValueError: an argument out of range; when prediction starts, an unknown model or results of other settings in
            `output`.
    """

    stages = ("predict", "test")

    def __init__(
        self,
        model: Model = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        queries: Queries = 16,
        queries_description: str | None = None,
        preset: str = "default",
        options: Keywords | None = None,
        dtype: torch.dtype | str | None = None,
        start: int = 0,
        max_frames: int | None = None,
        max_side: int | None = 720,
        pictures: bool = True,
        trail: int = 16,
        style: TrackStyle | None = None,
        columns: Mapping[str, ArrayLike] | None = None,
        placement: Placement | str = "device",
        on_broken: str = "report",
    ) -> None:
        self.queries, self.preset, self.options = queries, preset, dict(options or {})
        self.start, self.max_frames, self.max_side = start, max_frames, max_side
        self.pictures, self.style = flag("pictures", pictures), style or TrackStyle(trail=trail)
        self.columns = columns
        settings = {
            "queries": queries_description or _description(queries),
            "preset": preset,
            "options": self.options,
            "start": start,
            "max_frames": max_frames,
            "max_side": max_side,
        }
        super().__init__(
            model,
            tracking_results(output),
            settings=settings,
            model_preset=model_preset,
            dtype=dtype,
            placement=placement,
            on_broken=on_broken,
        )
        self._metric = TapVidMetric()
        self._left_out = torch.zeros(2)

    def setup(self, stage: str) -> None:
        """Load the model on this process's device and, to predict, check the output folder."""
        if stage != "test":
            super().setup(stage)
            return
        data = self.trainer.datamodule
        if not isinstance(data, TapVidDataModule):
            raise ValueError("TrackingModule is tested on a TapVidDataModule; give the Trainer one")
        self.prepare(self.load())
        self._metric = TapVidMetric("strided" if data.mode == "strided" else "first")
        self._left_out = torch.zeros(2)

    def prepare(self, backbone: Backbone) -> Mapping[str, object]:
        """Make the tracker."""
        self._tracker = PointTracker(backbone, preset=self.preset, **self.options)
        return {}

    def make(self, sample: Mapping[str, str]) -> Mapping[str, object]:
        """Track one video; gives its numbers of frames and points."""
        from corrdit.video import StreamedVideo

        name, path = sample["name"], sample["path"]
        video = StreamedVideo(path, start=self.start, max_frames=self.max_frames, max_side=self.max_side)
        inputs = {"video": file_digest(path)}
        size = (video.info.height, video.info.width)
        queries = self._queries(len(video), *size)
        parts = self.results.path / PARTS / name
        tracks = track_at_size(self._tracker, video, queries, size, resume=parts)
        with self.results.result(name, inputs, last=RESULT_FILE) as result:
            write_track_results(
                result.folder,
                video,
                tracks,
                queries,
                pictures=self.pictures,
                columns=self.columns,
                style=self.style,
            )
            result.facts.update(frames=tracks.frames, points=tracks.points)
        shutil.rmtree(parts, ignore_errors=True)
        return result.facts

    def test_step(self, batch: TapVidItem, batch_idx: int) -> None:
        """Track the queries of one video and score them.

        Args:
            batch: of a `TapVidDataModule`.
            batch_idx: its number on this process.
        """
        try:
            sample = sample_of(batch)
            with hidden_bars():
                outcome = evaluate_video(self._tracker.track, sample)
        except (ValueError, OSError) as error:
            if self.on_broken == "raise":
                raise ValueError(f"video {batch['name']}: {error}") from error
            warnings.warn(f"video {batch['name']} is not in the means: {error}", UserWarning, stacklevel=2)
            self._left_out += torch.tensor([1.0, 0.0])
            return
        if outcome.tracks is None:
            self._left_out += torch.tensor([0.0, 1.0])
            return
        arguments = sample.metric_arguments(outcome.tracks)
        del arguments["query_mode"]
        self._metric.update(**arguments, videos=[batch["name"]])

    def on_test_epoch_end(self) -> None:
        """Log the means over the videos of all processes."""
        figures = self._metric.compute()
        strategy = self.trainer.strategy
        counted = strategy.reduce(self._left_out.to(strategy.root_device), reduce_op="sum")
        figures["broken_videos"], without = counted.cpu().unbind()
        figures["videos_without_visible_points"] += without
        for name, value in figures.items():
            self.log(name, float(value), rank_zero_only=True)

    def _queries(self, frames: int, height: int, width: int) -> np.ndarray:
        if isinstance(self.queries, int):
            return grid_points(self.queries, height, width)
        given = self.queries(frames, height, width) if callable(self.queries) else self.queries
        return check_queries(given, frames, height, width).numpy()


def tracking_report(output: str | os.PathLike[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What became of videos, read from their results.

    Args:
        output: the folder a `TrackingModule` wrote.
        names: of the videos, as `VideoDataModule.names` has them.

    Returns:
        `{"done": {name: result file}, "failed": {name: error}, "left": {name: ""}}`.
    """
    results = tracking_results(output)
    report: dict[str, dict[str, str]] = {"done": {}, "failed": {}, "left": {}}
    for name in names:
        if results.unmade(name) is None:
            report["done"][name] = str(results.files_of(name) / RESULT_FILE)
        elif (failure := results.failure(name)) is not None:
            report["failed"][name] = failure
        else:
            report["left"][name] = ""
    return report


def _description(queries: Queries) -> int | str:
    if isinstance(queries, str):
        if (side := grid_side(queries)) is None:
            raise ValueError(f"queries must be a number, grid:N, [points, 3] or a function, got {queries!r}")
        return side
    if isinstance(queries, int) and not isinstance(queries, bool):
        if queries < 1:
            raise ValueError(f"queries={queries} points a side make no grid; give at least 1")
        return queries
    if callable(queries):
        raise ValueError("queries is a function; say what it chooses in queries_description, for settings.json")
    table = np.asarray(queries)
    if table.ndim != 2 or table.shape[1] != 3 or len(table) == 0 or table.dtype.kind not in "fiu":
        raise ValueError(f"queries must be a number, [points, 3] or a function, got an array of shape {table.shape}")
    return hashlib.sha256(table.astype(np.float64).tobytes()).hexdigest()
