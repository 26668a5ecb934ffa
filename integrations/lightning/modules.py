"""LightningModules for prediction: tracking points through many videos."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch

from corrdit.evaluation import evaluate_video
from corrdit.files import refuse_other_settings, written_beside
from corrdit.integrations.diffusers.fingerprint import model_facts
from corrdit.integrations.lightning.data_modules import has_result
from corrdit.integrations.lightning.model_placement import preset_for_loading
from corrdit.tracking.files import RESULT_FILE, track_at_size, write_track_results
from corrdit.tracking.queries import grid_points

if TYPE_CHECKING:
    from corrdit.data.tapvid import TapVidSample
    from corrdit.metrics import TapVidMetric

SETTINGS_FILE = "settings.json"
FAILURE_FILE = "failed.json"
ON_BROKEN = ("report", "raise")
Queries = int | np.ndarray | Callable[[int, int, int], np.ndarray]


class TrackingModule(lightning.LightningModule):
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
    any time; with `VideoDataModule(..., output=output)` the next run does what is left. A broken video gets
    `output/NAME/failed.json`. `output/settings.json` says how the results were made; a run with other settings is
    refused.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        queries: the points of each video: n for a grid of n x n on the first frame, `[P, 3]` (frame, x, y) in pixels
            for all videos alike, or a function (frames, height, width) -> such an array.
        queries_description: what `settings.json` says about them; needed with a function.
        preset: "default" or "published", as `corrdit.PointTracker` takes it.
        options: of `corrdit.PointTracker`, by name.
        dtype: precision of the model.
        start: frames to skip at the beginning of each video.
        max_frames: most frames to read of each.
        max_side: frames are shrunk to at most this many pixels on the longer side while they are read.
        pictures: whether to draw `tracks.mp4` and `tracks.png`.
        trail: frames of path drawn behind a point.
        on_broken: "report" writes `failed.json` for a video that cannot be read or tracked and goes on; "raise" stops.

    Raises:
        ValueError: an argument out of range; when prediction starts, an unknown model or results of other settings in
            `output`.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Any = None,
        queries: Queries = 16,
        queries_description: str | None = None,
        preset: str = "default",
        options: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        start: int = 0,
        max_frames: int | None = None,
        max_side: int | None = 720,
        pictures: bool = True,
        trail: int = 16,
        on_broken: str = "report",
    ) -> None:
        super().__init__()
        if on_broken not in ON_BROKEN:
            raise ValueError(f"on_broken must be one of {', '.join(map(repr, ON_BROKEN))}, got {on_broken!r}")
        self.model = model
        self.model_preset = preset_for_loading(model, model_preset)
        self.output = Path(output)
        self.queries = queries
        self.preset, self.options, self.model_dtype = preset, dict(options or {}), dtype
        self.part = {"start": start, "max_frames": max_frames, "max_side": max_side}
        self.pictures, self.trail, self.on_broken = pictures, trail, on_broken
        self.settings = {
            "model": model if isinstance(model, str) else getattr(model, "name", type(model).__name__),
            "queries": queries_description or _description(queries),
            "preset": preset,
            "options": json.loads(json.dumps(self.options)),
            "dtype": str(dtype),
            **self.part,
        }
        self._tracker: Any = None
        self._metric: TapVidMetric | None = None
        self._left_out = torch.zeros(2)

    def setup(self, stage: str) -> None:
        """Load the model on this process's device and check the output folder."""
        if stage not in ("predict", "test"):
            raise ValueError(f"TrackingModule has no {stage} step; call Trainer.predict or Trainer.test")
        if stage == "test":
            self._begin_test()
            return
        self.check_settings()
        self._load_tracker()
        self.check_settings()
        self.trainer.strategy.barrier("settings read")
        if self.trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            with written_beside(self.output / SETTINGS_FILE, "w") as file:
                json.dump(self.settings, file, indent=2)

    def predict_step(self, batch: dict[str, str], batch_idx: int) -> dict[str, Any]:
        """Track one video.

        Args:
            batch: `{"name": ..., "path": ...}` as `VideoDataModule` gives it.
            batch_idx: its number on this process.

        Returns:
            `{"name", "frames", "points", "seconds"}`, or `{"name", "error"}` for a broken video.
        """
        name, path = batch["name"], batch["path"]
        folder = self.output / name
        began = time.perf_counter()
        try:
            from corrdit.video import StreamedVideo

            video = StreamedVideo(path, **self.part)  # type: ignore[arg-type]
            queries = self._queries(len(video), video.info.height, video.info.width)
            tracks = track_at_size(self._tracker, video, queries, (video.info.height, video.info.width))
        except (ValueError, OSError) as error:
            if self.on_broken == "raise":
                raise ValueError(f"video {name}: {error}") from error
            return self._report_failure(folder, name, error)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".part-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as hidden:
            start = int(self.part["start"] or 0)
            write_track_results(hidden, video, tracks, queries, start=start, pictures=self.pictures, trail=self.trail)
            for file in sorted(Path(hidden).iterdir(), key=lambda file: file.name == RESULT_FILE):
                os.replace(file, folder / file.name)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        seconds = time.perf_counter() - began
        return {"name": name, "frames": tracks.frames, "points": tracks.points, "seconds": seconds}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Track the queries of one video and score them.

        Args:
            batch: of a `TapVidDataModule`.
            batch_idx: its number on this process.
        """
        assert self._metric is not None
        try:
            if "error" in batch:
                raise ValueError(batch["error"])
            sample: TapVidSample = batch["sample"]
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
        assert self._metric is not None
        figures = self._metric.compute()
        strategy = self.trainer.strategy
        counted = strategy.reduce(self._left_out.to(strategy.root_device), reduce_op="sum")
        figures["broken_videos"], without = counted.cpu().unbind()
        figures["videos_without_visible_points"] += without
        for name, value in figures.items():
            self.log(name, float(value), rank_zero_only=True)

    def _begin_test(self) -> None:
        from corrdit.metrics import TapVidMetric

        data = self.trainer.datamodule
        if not hasattr(data, "described"):
            raise ValueError("TrackingModule is tested on a TapVidDataModule; give the Trainer one")
        self._load_tracker()
        self._metric = TapVidMetric("strided" if data.mode == "strided" else "first")
        self._left_out = torch.zeros(2)

    def _load_tracker(self) -> None:
        from corrdit.integrations.diffusers.backbones.loading import load_backbone
        from corrdit.tracking import PointTracker

        backbone = self.model
        if isinstance(backbone, (str, os.PathLike)):
            device = self.trainer.strategy.root_device
            backbone = load_backbone(backbone, device=device, dtype=self.model_dtype, preset=self.model_preset)
        self.settings |= model_facts(backbone)
        self._tracker = PointTracker(backbone, preset=self.preset, **self.options)

    def check_settings(self) -> None:
        """Raises ValueError where the output folder holds results that were made with other settings."""
        file = self.output / SETTINGS_FILE
        if not file.is_file():
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not a settings file ({error}); give another output folder") from error
        refuse_other_settings(self.output, earlier, self.settings)

    def _queries(self, frames: int, height: int, width: int) -> np.ndarray:
        if isinstance(self.queries, int):
            return grid_points(self.queries, height, width)
        return np.asarray(self.queries(frames, height, width) if callable(self.queries) else self.queries)

    def _report_failure(self, folder: Path, name: str, error: Exception) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(folder / FAILURE_FILE, "w") as file:
            json.dump({"name": name, "error": str(error)}, file, indent=2)
        return {"name": name, "error": str(error)}


def tracking_report(output: str | os.PathLike[str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """What became of videos, read from their results.

    Args:
        output: the folder a `TrackingModule` wrote.
        names: of the videos, as `VideoDataModule.names` has them.

    Returns:
        `{"done": {name: result file}, "failed": {name: error}, "left": {name: ""}}`.
    """
    output = Path(output)
    report: dict[str, dict[str, str]] = {"done": {}, "failed": {}, "left": {}}
    for name in names:
        failure = output / name / FAILURE_FILE
        if has_result(output, name):
            report["done"][name] = str(output / name / RESULT_FILE)
        elif failure.is_file():
            report["failed"][name] = json.loads(failure.read_text(encoding="utf-8"))["error"]
        else:
            report["left"][name] = ""
    return report


def _description(queries: Queries) -> Any:
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
