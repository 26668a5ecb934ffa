"""Evaluation of trackers on TAP-Vid by `Trainer.predict` or `Trainer.test`: resumable, each video once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import repeat

import torch

from corrdit.arguments import flag, whole_number
from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation import EvaluationResults, TrackerSummary, chosen_trackers, evaluate_video, write_tables
from corrdit.evaluation.results import EvaluationSettings
from corrdit.evaluation.scoring import QUERIES_AT_ONCE, TRAIL, draw_tracks, draw_truth
from corrdit.evaluation.trackers import Track, TrackerChoice
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.fingerprint import MODEL_FACTS, model_facts
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.lightning.data_modules import on_first_process
from corrdit.integrations.lightning.resumable import Model, ResumableModule
from corrdit.integrations.lightning.tapvid_data import TapVidDataModule, TapVidItem, sample_of
from corrdit.tracking import Tracks

_EARLIER_WORDS = {"stop": "raise", "skip": "report"}


class EvaluationModule(ResumableModule[TapVidItem]):
    """Tracks the queries of each video that a `TapVidDataModule` gives, with one or several trackers, and scores them.

    ```python
    module = EvaluationModule("embedded", trackers=["ours", "released", "still"], output="results")
    Trainer().predict(module, TapVidDataModule("tapvid_davis.pkl"), return_predictions=False)
    ```

    `output` gets a file for each video and tracker (`corrdit.evaluation.EvaluationResults`), as each is done, and at
    the end the tables of `corrdit.evaluation.write_tables`. A run that is stopped or killed goes on with what is left,
    what is damaged and videos that are others than before; results of other settings or weights are refused. Processes
    meet at the beginning and at the end only. `Trainer.test` does the same and logs the means as `TRACKER/METRIC`.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already; not loaded where no tracker reads it.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        output: folder for the results, which all processes must see; made if need be.
        trackers: names, or options by label, as `corrdit.evaluation.chosen_trackers` takes them.
        tracker_options: options of all trackers that read the model.
        dtype: precision of the model, as torch's type or by its name.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "raise" ends the run at a video that cannot be evaluated; "report" goes on. Both name it in the
            tables. Until 0.3 these may be called "stop" and "skip".
        queries_at_once: most queries a tracker is given together; None for all.
        save_tracks: whether the tracks of each video are kept beside its figures.
        pictures: the tracks of the first so many videos of the set are drawn.
        trail: past frames whose path is drawn behind a point.

    Raises:
        ValueError: an argument out of range; when the run starts, an unknown model, options it cannot serve or results
            of other settings in `output`; when it ends with "raise", the video that was broken.
    """

    stages = ("predict", "test")

    def __init__(
        self,
        model: Model = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        trackers: str | Sequence[str] | Mapping[str, Mapping[str, object] | None] = ("ours",),
        tracker_options: Mapping[str, object] | None = None,
        dtype: torch.dtype | str | None = None,
        placement: Placement | str = "device",
        on_broken: str = "raise",
        queries_at_once: int | None = QUERIES_AT_ONCE,
        save_tracks: bool = True,
        pictures: int = 0,
        trail: int = TRAIL,
    ) -> None:
        if on_broken in _EARLIER_WORDS:
            now = _EARLIER_WORDS[on_broken]
            said = f"on_broken={on_broken!r} is now {now!r}; the old word goes in corrdit 0.3"
            warnings.warn(said, DeprecationWarning, stacklevel=2)
            on_broken = now
        self.evaluated = EvaluationResults(output)
        self.choices: list[TrackerChoice] = chosen_trackers(trackers, tracker_options)
        self.labels = [choice.label for choice in self.choices]
        self.save_tracks = flag("save_tracks", save_tracks)
        self.queries_at_once = None if queries_at_once is None else whole_number("queries_at_once", queries_at_once, 1)
        self.pictures = whole_number("pictures", pictures, 0)
        self.trail = whole_number("trail", trail, 0)
        self._trackers: dict[str, Track] = {}
        super().__init__(
            model,
            self.evaluated.folder,
            settings={},
            model_preset=model_preset,
            dtype=dtype,
            placement=placement,
            on_broken=on_broken,
        )

    def is_done(self, name: str) -> bool:
        """Whether the results of a video are there for all trackers; `TapVidDataModule` leaves such videos out.

        Warns of results that are damaged or of another video, which are made again. Pictures that are asked for and
        missing are drawn from the tracks.
        """
        reasons = [self.evaluated.unmade(label, name, self._data().inputs(name)) for label in self.labels]
        for label, reason in zip(self.labels, reasons, strict=True):
            if reason:
                warnings.warn(f"{self.output}: {name} is evaluated again by {label} ({reason})", stacklevel=2)
        return all(reason is None for reason in reasons) and not any(map(self._undrawn, self.labels, repeat(name)))

    def setup(self, stage: str) -> None:
        """Check the output folder, load the model on this process's device, and write `settings.json`."""
        self.check_stage(stage)
        on_first_process(self.trainer, lambda: self.evaluated.settings_with(self._described({}), unknown=MODEL_FACTS))
        backbone = self.load() if any(choice.needs_model for choice in self.choices) else None
        facts = {} if backbone is None else model_facts(backbone)
        on_first_process(self.trainer, lambda: self.evaluated.settings_with(self._described(facts)))
        self._trackers = {choice.label: choice.build(backbone) for choice in self.choices}
        on_first_process(self.trainer, lambda: self.evaluated.begin(self._described(facts)))

    def predict_step(self, batch: TapVidItem, batch_idx: int) -> dict[str, object]:
        """Evaluate one video with every tracker that has no result of it.

        Args:
            batch: of a `TapVidDataModule`.
            batch_idx: its number on this process.

        Returns:
            `{"name", TRACKER: figures or error, ...}`.
        """
        name = batch["name"]
        said: dict[str, object] = {"name": name}
        for choice in self.choices:
            if self.on_broken == "raise" and self.evaluated.any_failure(self.labels):
                break
            if self.evaluated.unmade(choice.label, name, self._data().inputs(name)) is not None:
                said[choice.label] = self._evaluated(choice, batch)
            elif self._undrawn(choice.label, name):
                self._draw(choice.label, sample_of(batch), Tracks.load(self.evaluated.tracks_file(choice.label, name)))
        return said

    def test_step(self, batch: TapVidItem, batch_idx: int) -> None:
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
            ValueError: with `on_broken="raise"`, a video that could not be evaluated.
        """
        self.trainer.strategy.barrier("all videos done")
        summaries: list[TrackerSummary] = []
        if self.trainer.is_global_zero:
            summaries = write_tables(self.output)
        if self.on_broken == "raise":
            self._refuse_failures()
        return summaries

    def _evaluated(self, choice: TrackerChoice, batch: TapVidItem) -> object:
        name = batch["name"]
        try:
            sample = sample_of(batch)
            limits = [self.queries_at_once, choice.queries_at_once(*sample.video.shape[1:3])]
            limit = min((limit for limit in limits if limit is not None), default=None)
            outcome = evaluate_video(self._trackers[choice.label], sample, queries_at_once=limit)
            if self._is_shown(name) and outcome.tracks is not None:
                self._draw(choice.label, sample, outcome.tracks)
        except (ValueError, OSError) as error:
            self.evaluated.write_failure(choice.label, name, str(error))
            return str(error)
        self.evaluated.write_record(
            choice.label,
            name,
            outcome.record,
            outcome.tracks if self.save_tracks else None,
            sample.queries,
            inputs=self._data().inputs(name),
        )
        return outcome.record["figures"]

    def _is_shown(self, name: str) -> bool:
        """Whether a video is one of the first, whose tracks are drawn."""
        return self._data().number(name) < self.pictures

    def _undrawn(self, label: str, name: str) -> bool:
        """Whether the picture of tracks that are kept is asked for and missing."""
        kept = self._is_shown(name) and self.evaluated.tracks_file(label, name).is_file()
        return kept and not self.evaluated.picture_file(label, name).is_file()

    def _draw(self, label: str, sample: TapVidSample, tracks: Tracks) -> None:
        """The tracker's tracks and the true ones, over the video."""
        draw_tracks(self.evaluated.pictures_folder(label), sample, tracks, trail=self.trail)
        draw_truth(self.evaluated.pictures_folder("truth"), sample, trail=self.trail)

    def _refuse_failures(self) -> None:
        for label in self.labels:
            for failure in self.evaluated.failures(label):
                raise ValueError(
                    f"video {failure['video']} could not be evaluated by the tracker {label}: {failure['error']}; the "
                    'results so far are kept, and --on-broken report (on_broken="report") goes on without it'
                )

    def _data(self) -> TapVidDataModule:
        data = self.trainer.datamodule
        if not isinstance(data, TapVidDataModule):
            raise ValueError("EvaluationModule takes its videos from a TapVidDataModule; give the Trainer one")
        return data

    def _described(self, facts: Mapping[str, object]) -> EvaluationSettings:
        """What `settings.json` says of this run; `facts` are of the model, empty while it is not loaded."""
        data, shared = self._data(), {**self.settings, **facts}
        trackers = {
            choice.label: {**choice.described(), **(shared if choice.needs_model else {})} for choice in self.choices
        }
        inputs = {name: data.inputs(name) for name in data.names}
        return {"data": data.described(), "trackers": trackers, "videos": data.names, "inputs": inputs}
