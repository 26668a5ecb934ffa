"""A callback that watches correspondence emerge while a video transformer trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from corrdit.arguments import whole_number
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.host.layers import layer_list
from corrdit.integrations.lightning.discovery import VideoModel, find_held_model, find_video_model
from corrdit.integrations.lightning.measurement import MatchMeasurement, WorldProbe, first_frame_hits, summed_hits
from corrdit.integrations.lightning.reading import layer_indices, timed_capture
from corrdit.integrations.lightning.reports import (
    FOLDER,
    Report,
    ReportingCallback,
    draw_by_layer,
    log_figures,
)
from corrdit.metrics.matching import MatchingHits

Place = tuple[int, str]
"""A layer and a noise level, such as "noise_0-250"."""

TRAINING_TIMESTEPS = 1000


@dataclass(frozen=True)
class BatchTruth:
    """Where points of a training batch really are.

    Args:
        tracks: `[B, T, P, 2]`, (x, y) in pixels of the video.
        visible: bool `[B, T, P]`.
        height: of the video, in pixels.
        width: of the video, in pixels.
    """

    tracks: torch.Tensor
    visible: torch.Tensor
    height: int
    width: int


def batch_truth(batch: object) -> BatchTruth:
    """The truth of a batch with the entries `tracks`, `visible` and `video`, whose last two axes are rows and columns.

    Raises:
        ValueError: a batch without them, with what it holds.
    """
    names = ("tracks", "visible", "video")
    if not isinstance(batch, Mapping) or not all(name in batch for name in names):
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "matching accuracy needs the truth: a batch with tracks [B, T, P, 2], visible [B, T, P] and video "
            "[..., height, width], a function truth=(batch) -> BatchTruth, or probe=WorldProbe(); the batch holds "
            f"{held}"
        )
    return BatchTruth(batch["tracks"], batch["visible"], *batch["video"].shape[-2:])


class BatchSkipped(Exception):
    """What a measurement is closed with where the training step passed its batch over."""


class CorrespondenceMonitor(ReportingCallback):
    """Logs matching accuracy by layer and noise level while a module trains, with nothing to change in it.

    Without `probe` the forward of the training step itself is read, every `every` steps, and its matches are compared
    with the truth of the batch; timesteps fall into `noise_levels` equal bins. With a `WorldProbe` generated videos go
    through the model at the probe's own noise levels instead, which any module with a pipeline can do. Either way the
    step's loss, gradients and random numbers are as without the monitor.

    Logged to the module's loggers: `correspondence/train/layer_L/noise_N/accuracy` (and, from batches, `.../score` and
    `.../consistency`, which need no truth), and at the end of training a table and a picture over layers and noise
    levels, of the latest `history` measurements of each; another `fit` that ends at the same step leaves the files of
    the first and is `-v1`. With several processes the first one's own batches are read, in which a distributed sampler
    repeats nothing.

    Args:
        layers: indices over all attention blocks, or "all".
        every: training steps between measurements.
        probe: generated videos to measure on.
        pipeline: function (module) -> diffusers pipeline, for `probe` on a module that holds none.
        truth: function (batch) -> BatchTruth; None reads a dict with tracks, visible and video. `False` logs only what
            needs no truth.
        noise_levels: bins of the timesteps of training batches.
        training_timesteps: timesteps the bins share out.
        threshold: largest distance of a right match, in tokens.
        least_motion: points that moved by more than this many tokens count.
        attribute: dotted name of the pipeline or transformer; None looks for it.
        history: measurements kept for the table and picture.
        name: in place of `correspondence`, for each of several monitors in one Trainer.

    A training step that returns None without running the transformer, as Lightning has it for a batch to be skipped, is
    passed over; the next one is measured.

    Raises:
        ValueError: numbers out of range; when training starts, no transformer found (with what was found); at a
            measurement, a batch without truth, or a training step that never ran the transformer.
    """

    def __init__(
        self,
        layers: int | Iterable[int] | str = "all",
        *,
        every: int = 100,
        probe: WorldProbe | None = None,
        pipeline: Callable[[Any], VideoModel] | None = None,
        truth: Callable[[Any], BatchTruth] | bool | None = None,
        noise_levels: int = 4,
        training_timesteps: int = TRAINING_TIMESTEPS,
        threshold: float = 1.0,
        least_motion: float = 1.5,
        attribute: str | None = None,
        history: int = 10,
        name: str = FOLDER,
    ) -> None:
        super().__init__(name)
        self.layers = layer_list(layers)
        self.every = whole_number("every", every, 1)
        self.probe, self.pipeline = probe, pipeline
        if truth is None or truth is True:
            truth = batch_truth
        if truth is not False and not callable(truth):
            raise ValueError(f"truth must be a function (batch) -> BatchTruth, True, False or None, got {truth!r}")
        self.truth = truth or None
        self.noise_levels = whole_number("noise_levels", noise_levels, 1)
        self.training_timesteps = whole_number("training_timesteps", training_timesteps, 1)
        self.threshold, self.least_motion = threshold, least_motion
        self.attribute = attribute
        self.history = whole_number("history", history, 1)
        self._transformer: torch.nn.Module | None = None
        self._backbone: Backbone | None = None
        self._indices: list[int] = []
        self._results: list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]] = []
        self._kept: dict[Place, deque[MatchingHits]] = {}
        self._measured_at = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, so that a module without one is refused before it trains."""
        self.refuse_shared_name(trainer)
        self._kept, self._measured_at = {}, -1
        if self.probe is not None:
            self._backbone = self._probed(pl_module)
            self._indices = layer_indices(self._backbone.transformer, self.layers)
        else:
            self._transformer = transformers_of(find_video_model(pl_module, self.attribute))[0]
            self._indices = layer_indices(self._transformer, self.layers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if self._transformer is None or not trainer.is_global_zero or not self._due(trainer.global_step):
            return
        self._results = []
        self._measured_at = trainer.global_step
        measurement = MatchMeasurement()
        reading = timed_capture(
            self._transformer, layers=self._indices, steps=None, operation=measurement, deliver=self._receive
        )
        self.open(reading)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The forward is over: restore the model before checkpointed blocks run again."""
        self.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.probe is not None and self._backbone is not None:
            if self._due(step):
                self._measured_at = step
                found = self.probe.measure(self._backbone, self._indices)
                self._log(trainer, {(layer, f"noise_{time:g}"): hits for (layer, time), hits in found.items()}, {})
        elif self.is_open and not self._results and not outputs:
            self._measured_at = -1
            self.close(BatchSkipped())
        elif self.is_open or self._results:
            self.close()
            accuracy = {} if self.truth is None else summed_hits(self._hits(self.truth(batch)))
            self._log(trainer, accuracy, self._without_truth())
            self._results = []

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table and the picture over layers and noise levels."""
        if not self._kept or not trainer.is_global_zero:
            return
        latest = summed_hits((place, hits) for place, kept in self._kept.items() for hits in kept)
        places = sorted(latest, key=lambda place: float(place[1][len("noise_") :].split("-")[0]))
        rows = [
            {"layer": place[0], "noise": place[1], "accuracy": latest[place].accuracy[0], "points": latest[place].cases}
            for place in sorted(places, key=lambda place: place[0])
        ]
        report = Report(trainer, f"{self.name}/train")
        report.table(rows)
        accuracy = {(layer, level.removeprefix("noise_")): latest[layer, level].accuracy[0] for layer, level in places}
        picture = draw_by_layer(accuracy, "matching accuracy", "noise")
        report.picture("accuracy", picture)

    def _due(self, step: int) -> bool:
        return step % self.every == 0 and step != self._measured_at

    def _probed(self, module: LightningModule) -> Backbone:
        held = self.pipeline(module) if self.pipeline is not None else find_held_model(module, self.attribute)
        if isinstance(held, torch.nn.Module):
            raise ValueError(
                f"{type(module).__name__} holds a transformer but no pipeline, which a probe needs to encode its "
                "videos; give pipeline=(function of the module that makes one)"
            )
        return held if isinstance(held, Backbone) else backbone_of(held, name=type(module).__name__)

    def _receive(self, step: int, layer: int, timesteps: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
        self._results.append((layer, timesteps, result))

    def _level(self, timestep: torch.Tensor) -> str:
        width = self.training_timesteps / self.noise_levels
        index = min(int(float(timestep) / width), self.noise_levels - 1)
        return f"noise_{index * width:g}-{(index + 1) * width:g}"

    def _hits(self, truth: BatchTruth) -> Iterator[tuple[Place, MatchingHits]]:
        """Right matches of each sample in each layer."""
        samples = len(self._results[0][2]["match_xy"])
        if not isinstance(truth, BatchTruth) or len(truth.tracks) != samples or len(truth.visible) != samples:
            given = f"tracks {tuple(truth.tracks.shape)}" if isinstance(truth, BatchTruth) else type(truth).__name__
            raise ValueError(f"truth must give a BatchTruth of the {samples} samples the transformer ran, got {given}")
        for layer, timesteps, result in self._results:
            frames = latent_frames(truth.tracks.shape[1], result["match_xy"].shape[1] + 1)
            tracks, visible = truth.tracks[:, frames].float().cpu(), truth.visible[:, frames].cpu()
            size, limits = (truth.height, truth.width), (self.threshold, self.least_motion)
            for sample, match_xy in enumerate(result["match_xy"]):
                hits = first_frame_hits(match_xy, tracks[sample], visible[sample], size, *limits)
                yield (layer, self._level(timesteps[sample])), hits

    def _without_truth(self) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for layer, timesteps, result in self._results:
            for name in ("score", "consistency"):
                for timestep, value in zip(timesteps, result[name], strict=True):
                    groups.setdefault(f"layer_{layer}/{self._level(timestep)}/{name}", []).append(float(value))
        return {name: float(np.mean(values)) for name, values in groups.items()}

    def _log(self, trainer: Trainer, accuracy: Mapping[Place, MatchingHits], others: Mapping[str, float]) -> None:
        figures = dict(others)
        for (layer, level), hits in accuracy.items():
            self._kept.setdefault((layer, level), deque(maxlen=self.history)).append(hits)
            figures[f"layer_{layer}/{level}/accuracy"] = hits.accuracy[0]
        if trainer.is_global_zero:
            log_figures(trainer, {f"{self.name}/train/{name}": value for name, value in figures.items()})


def latent_frames(video_frames: int, frames: int) -> list[int]:
    """The video frames that stand for the latent frames of a causal codec: every n-th, beginning with the first.

    Raises:
        ValueError: numbers of frames that do not fit.
    """
    if frames == 1 or (video_frames - 1) % (frames - 1):
        raise ValueError(
            f"tracks of {video_frames} frames do not fit {frames} latent frames: {video_frames} - 1 must be a multiple "
            f"of {frames} - 1; give truth= a function that returns tracks at the latent frames"
        )
    stride = (video_frames - 1) // (frames - 1)
    return [frame * stride for frame in range(frames)]
