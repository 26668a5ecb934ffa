"""Evaluation of trackers on TAP-Vid by `Trainer.predict` or `Trainer.test`: resumable, each video once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from corrdit.arguments import whole_number
from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation import EvaluationResults, TrackerSummary, chosen_trackers, evaluate_video, write_tables
from corrdit.evaluation.scoring import QUERIES_AT_ONCE, draw_tracks, true_tracks
from corrdit.evaluation.trackers import Track, TrackerChoice
from corrdit.integrations.diffusers.fingerprint import MODEL_FACTS, model_facts
from corrdit.integrations.lightning.model_placement import PLACEMENTS, placed_backbone, preset_for_loading

ON_BROKEN = ("stop", "skip")


class EvaluationModule(lightning.LightningModule):
    """Tracks the queries of each video that a `TapVidDataModule` gives, with one or several trackers, and scores them.

    ```python
    module = EvaluationModule("embedded", trackers=["ours", "released", "still"], output="results")
    Trainer().predict(module, TapVidDataModule("tapvid_davis.pkl"), return_predictions=False)
    ```

    `output` gets a file for each video and tracker (`corrdit.evaluation.EvaluationResults`), as each is done, and at
    the end the tables of `corrdit.evaluation.write_tables`. A run that is stopped or killed goes on with what is left;
    results of other settings are refused. Processes meet at the beginning and at the end only. `Trainer.test` does the
    same and logs the means as `TRACKER/METRIC`.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already; not loaded where no tracker reads it.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        output: folder for the results, which all processes must see; made if need be.
        trackers: names, or options by label, as `corrdit.evaluation.chosen_trackers` takes them.
        tracker_options: options of all trackers that read the model.
        dtype: precision of the model by name, such as "bfloat16".
        placement: where a model too large for one GPU goes, see `corrdit.integrations.lightning.model_placement`.
        on_broken: "stop" ends the run at a video that cannot be evaluated; "skip" goes on. Both name it in the tables.
        queries_at_once: most queries a tracker is given together; None for all.
        save_tracks: whether the tracks of each video are kept beside its figures.
        pictures: the tracks of the first so many videos of the set are drawn.

    Raises:
        ValueError: an argument out of range; when the run starts, an unknown model, options it cannot serve or results
            of other settings in `output`; when it ends with "stop", the video that was broken.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Any = None,
        trackers: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] = ("ours",),
        tracker_options: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        placement: str = "device",
        on_broken: str = "stop",
        queries_at_once: int | None = QUERIES_AT_ONCE,
        save_tracks: bool = True,
        pictures: int = 0,
    ) -> None:
        super().__init__()
        for name, value, accepted in (("on_broken", on_broken, ON_BROKEN), ("placement", placement, PLACEMENTS)):
            if value not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must be the name of a type of torch such as 'bfloat16', got {dtype!r}")
        self.model, self.model_dtype, self.placement = model, dtype, placement
        self.model_preset = preset_for_loading(model, model_preset)
        self.results = EvaluationResults(output)
        self.choices: list[TrackerChoice] = chosen_trackers(trackers, tracker_options)
        self.labels = [choice.label for choice in self.choices]
        self.on_broken, self.save_tracks = on_broken, save_tracks
        self.queries_at_once = None if queries_at_once is None else whole_number("queries_at_once", queries_at_once, 1)
        self.pictures = whole_number("pictures", pictures, 0)
        self._trackers: dict[str, Track] = {}

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return self.results.path

    def is_done(self, name: str) -> bool:
        """Whether the results of a video are there for all trackers; `TapVidDataModule` leaves such videos out."""
        return self.results.is_done(self.labels, name)

    def setup(self, stage: str) -> None:
        """Check the output folder, load the model on this process's device, and write `settings.json`."""
        if stage not in ("predict", "test"):
            raise ValueError(f"EvaluationModule has no {stage} step; call Trainer.predict or Trainer.test")
        settings = self._checked_settings({})
        backbone = None
        if any(choice.needs_model for choice in self.choices):
            facts: dict[str, Any] = {}
            backbone = placed_backbone(
                self.model,
                device=self.trainer.strategy.root_device,
                dtype=self.model_dtype,
                placement=self.placement,
                preset=self.model_preset,
                on_loaded=lambda loaded: facts.update(model_facts(loaded)),
            )
            settings = self._checked_settings(facts)
        self._trackers = {choice.label: choice.build(backbone) for choice in self.choices}
        if self.trainer.is_global_zero:
            self.results.write_settings(settings)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Evaluate one video with every tracker that has no result of it.

        Args:
            batch: of a `TapVidDataModule`.
            batch_idx: its number on this process.

        Returns:
            `{"name", TRACKER: figures or error, ...}`.
        """
        said: dict[str, Any] = {"name": batch["name"]}
        for choice in self.choices:
            if self.on_broken == "stop" and self.results.any_failure(self.labels):
                break
            if not self.results.is_done([choice.label], batch["name"]):
                said[choice.label] = self._evaluated(choice, batch)
        return said

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As `predict_step`; the means are logged when all videos are done."""
        self.predict_step(batch, batch_idx)

    def on_predict_end(self) -> None:
        """Write the tables once every process is done."""
        self.finish()

    def on_test_epoch_end(self) -> None:
        """Write the tables once every process is done, and log the means."""
        for summary in self.finish():
            for name, value in summary.figures.items():
                if value is not None:
                    self.log(f"{summary.tracker}/{name}", value, rank_zero_only=True)

    def finish(self) -> list[TrackerSummary]:
        """Wait for all processes and write the tables; call it where no video was left to evaluate.

        Returns:
            The summaries, on the first process; nothing on the others.

        Raises:
            ValueError: with `on_broken="stop"`, a video that could not be evaluated.
        """
        self.trainer.strategy.barrier("all videos done")
        summaries: list[TrackerSummary] = []
        if self.trainer.is_global_zero:
            summaries = write_tables(self.output)
        if self.on_broken == "stop":
            self._refuse_failures()
        return summaries

    def _evaluated(self, choice: TrackerChoice, batch: dict[str, Any]) -> Any:
        name = batch["name"]
        try:
            if "error" in batch:
                raise ValueError(batch["error"])
            sample: TapVidSample = batch["sample"]
            limits = [self.queries_at_once, choice.queries_at_once(*sample.video.shape[1:3])]
            limit = min((limit for limit in limits if limit is not None), default=None)
            outcome = evaluate_video(self._trackers[choice.label], sample, queries_at_once=limit)
            if batch["number"] < self.pictures and outcome.tracks is not None:
                self._draw(choice.label, sample, outcome.tracks)
        except (ValueError, OSError) as error:
            self.results.write_failure(choice.label, name, str(error))
            return str(error)
        kept = outcome.tracks if self.save_tracks else None
        self.results.write_record(choice.label, name, outcome.record, kept, sample.queries)
        return outcome.record["figures"]

    def _draw(self, label: str, sample: TapVidSample, tracks: Any) -> None:
        """The tracker's tracks and the true ones, over the video."""
        for name, drawn in ((label, tracks), ("truth", true_tracks(sample))):
            draw_tracks(self.results.pictures_folder(name), sample, drawn)

    def _checked_settings(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What `settings.json` will say; the first process looks at what it says and clears up, and all hear of it.

        Args:
            facts: of the model; empty while it is not loaded.
        """
        found: Any = None
        if self.trainer.is_global_zero:
            try:
                found = self.results.settings_with(self._settings(facts), unknown=() if facts else MODEL_FACTS)
                self.results.remove_leftovers()
                self.results.forget_failures(self.labels)
            except ValueError as error:
                found = str(error)
        found = self.trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _refuse_failures(self) -> None:
        for label in self.labels:
            for failure in self.results.failures(label):
                raise ValueError(
                    f"video {failure['video']} could not be evaluated by the tracker {label}: {failure['error']}; the "
                    f"results so far are kept, and skipping broken videos goes on without it"
                )

    def _settings(self, facts: dict[str, Any]) -> dict[str, Any]:
        data = self.trainer.datamodule
        if not hasattr(data, "described"):
            raise ValueError("EvaluationModule takes its videos from a TapVidDataModule; give the Trainer one")
        model = self.model if isinstance(self.model, str) else getattr(self.model, "name", str(self.model))
        shared = {"model": model, "dtype": self.model_dtype, **facts}
        trackers = {
            choice.label: {**choice.described(), **(shared if choice.needs_model else {})} for choice in self.choices
        }
        return {"data": data.described(), "trackers": trackers, "videos": data.names}
