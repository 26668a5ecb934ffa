"""A callback that reads correspondence out of anyone's LightningModule while it validates, tests or predicts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from corrdit.arguments import whole_indices, whole_number
from corrdit.integrations.diffusers.host.layers import layer_list
from corrdit.integrations.diffusers.processors import Operation
from corrdit.integrations.lightning.discovery import VideoModel, find_video_model
from corrdit.integrations.lightning.measurement import MatchMeasurement
from corrdit.integrations.lightning.reading import layer_indices, repeated_items, timed_capture
from corrdit.integrations.lightning.reports import (
    FOLDER,
    Report,
    ReportingCallback,
    draw_by_layer,
    draw_matches,
    log_figures,
)

STAGES = ("validate", "test", "predict")
KEYS = ("dataloader_idx", "batch", "sample", "step", "timestep", "layer")
Row = dict[str, float]
Matches = dict[int, tuple[int, np.ndarray]]
"""Step and matches `[F - 1, h, w, 2]` by layer."""


class CorrespondenceCallback(ReportingCallback):
    """Captures the attention of the video transformer a module holds, and logs what it says about correspondence.

    ```python
    Trainer(callbacks=[CorrespondenceCallback(layers=[17])]).validate(module, data)
    ```

    The module is not changed and nothing is trained: while one of its batches runs, `corrdit.capture` reads the chosen
    layers and steps. At the end of an epoch the module's own loggers get the mean of each figure
    (`correspondence/STAGE/step_S/layer_L/NAME`), a table with one row for each sample, step and layer, and pictures:
    the figure `picture` over layers and steps, and where the tokens of the source frame go. CSV and PNG files of them
    are in the folder `correspondence` beside the logs (`STAGE_STEP.csv`).

    Several dataloaders have a column `dataloader_idx` in the table, and figures and pictures each, whose names end in
    `/dataloader_idx_N` as Lightning's own do. A second run of a stage at the same step of training, of this Trainer or
    another into the same folder, leaves the files of the first and is `STAGE_STEP-v1.csv`. With several processes,
    validation and test put the rows of all together; prediction, where processes may do different numbers of batches,
    logs each process's own table (`_rank_N`). Samples that a distributed sampler repeats to even out the processes are
    counted once; a warning says where they cannot be told from others.

    Args:
        layers: indices over all attention blocks, negative ones from the last, or "all".
        steps: denoising steps of a pipeline, negative ones from the last; None for the last one. Of a bare transformer
            every call is read.
        operation: an operation for `corrdit.capture` whose result is a dict of tensors: those of shape `[B]` become
            columns of the table, `match_xy [B, F - 1, h, w, 2]` is drawn. None for `MatchMeasurement()`: score,
            consistency, motion, and attention to the text, the own frame and the other frames.
        stages: of "validate", "test" and "predict".
        attribute: dotted name of the pipeline or transformer; None looks for it.
        batches: read only so many batches of an epoch, of each dataloader on each process; None for all.
        pictures: draw the tokens of so many samples of an epoch and dataloader, each layer at the last step read.
        picture: the column drawn over layers and steps.
        name: in place of `correspondence`, for each of several callbacks in one Trainer.

    Raises:
        ValueError: an unknown stage, layers or steps that are no whole numbers, another number out of range; when a
            stage starts, no pipeline or transformer found (with what was found), a layer out of range, what
            `corrdit.capture` refuses, or another callback of the same name; after a batch that never ran the
            transformer.
    """

    def __init__(
        self,
        layers: int | Iterable[int] | str = "all",
        steps: int | Iterable[int] | None = None,
        *,
        operation: Operation | None = None,
        stages: Iterable[str] = STAGES,
        attribute: str | None = None,
        batches: int | None = None,
        pictures: int = 2,
        picture: str = "consistency",
        name: str = FOLDER,
    ) -> None:
        super().__init__(name)
        self.layers = layer_list(layers)
        self.steps = None if steps is None else whole_indices("steps", steps)
        self.operation = operation if operation is not None else MatchMeasurement()
        self.stages = (stages,) if isinstance(stages, str) else tuple(stages)
        unknown = [stage for stage in self.stages if stage not in STAGES]
        if unknown or not self.stages:
            raise ValueError(f"stages must be some of {', '.join(map(repr, STAGES))}, got {stages!r}")
        self.attribute = attribute
        self.batches = None if batches is None else whole_number("batches", batches, 1)
        self.pictures, self.picture = whole_number("pictures", pictures, 0), picture
        self._indices: list[int] = []
        self._clear()

    def _clear(self) -> None:
        """Nothing read yet; what is `found` is of the batch that runs."""
        self._model: VideoModel | None = None
        self._found: list[Row] = []
        self._found_drawn: dict[int, Matches] = {}
        self._rows: list[Row] = []
        self._drawn: dict[int | None, dict[tuple[int, int], Matches]] = {}
        self._batches: Counter[int | None] = Counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, so that a module without one is refused before its first batch."""
        self._clear()
        if _stage(trainer) in self.stages:
            self.refuse_shared_name(trainer)
            model = find_video_model(pl_module, self.attribute)
            self._indices = layer_indices(model, self.layers)
            self._model = model

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: object,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        if self._model is not None and (self.batches is None or self._batches[dataloader_idx] < self.batches):
            last_of_pipeline = None if isinstance(self._model, torch.nn.Module) else [-1]
            reading = timed_capture(
                self._model,
                layers=self._indices,
                steps=last_of_pipeline if self.steps is None else self.steps,
                operation=self.operation,
                deliver=self._receive,
            )
            self.open(reading)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int | None = None,
    ) -> None:
        self.close()
        number = self._batches[dataloader_idx]
        self._batches[dataloader_idx] += 1
        found, drawn, self._found, self._found_drawn = self._found, self._found_drawn, [], {}
        if not found:
            return
        rows = _counted_once(found, _repeated(trainer, number, dataloader_idx))
        place = {} if dataloader_idx is None else {"dataloader_idx": dataloader_idx}
        self._rows += [{**place, "batch": number, **row} for row in rows]
        of_loader = self._drawn.setdefault(dataloader_idx, {})
        for sample in {int(row["sample"]): None for row in rows if row["sample"] in drawn}:
            if len(of_loader) < self.pictures:
                of_loader[number, sample] = drawn[sample]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._model is not None:
            self._model = None
            self._report(trainer, _stage(trainer))

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _receive(self, step: int, layer: int, timesteps: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
        samples = _samples_of(result, len(timesteps))
        columns = {name: value.float().tolist() for name, value in result.items() if value.ndim == 1}
        # Pipelines that put both branches of guidance into one batch have the conditional one last.
        times = timesteps[-samples:].tolist()
        for sample in range(samples):
            key = {"sample": sample, "step": step, "timestep": times[sample], "layer": layer}
            self._found.append(key | {name: values[sample] for name, values in columns.items()})
            if "match_xy" in result and (sample in self._found_drawn or len(self._found_drawn) < self.pictures):
                match_xy = result["match_xy"][sample].float().cpu().numpy()
                self._found_drawn.setdefault(sample, {})[layer] = (step, match_xy)

    def _report(self, trainer: Trainer, stage: str) -> None:
        # Prediction may give processes different numbers of batches, so they cannot wait for each other.
        several, apart = trainer.world_size > 1, trainer.world_size > 1 and stage == "predict"
        rows = _gathered(self._rows) if several and not apart else self._rows
        if not rows or not (trainer.is_global_zero or apart):
            return
        report = Report(trainer, f"{self.name}/{stage}" + (f"_rank_{trainer.global_rank}" if apart else ""))
        report.table(rows)
        figures: dict[str, float] = {}
        for loader in dict.fromkeys(row.get("dataloader_idx") for row in rows):
            ending = "" if loader is None else f"/dataloader_idx_{loader}"
            of_loader = [row for row in rows if row.get("dataloader_idx") == loader]
            for column in (column for column in rows[0] if column not in KEYS):
                for (step, layer), mean in _means(of_loader, column).items():
                    figures[f"{self.name}/{stage}/step_{step}/layer_{layer}/{column}{ending}"] = mean
            if self.picture in rows[0]:
                by_layer = {(layer, step): mean for (step, layer), mean in _means(of_loader, self.picture).items()}
                report.picture(self.picture + ending, draw_by_layer(by_layer, self.picture, "step"))
        log_figures(trainer, figures)
        for loader, drawn in self._drawn.items():
            ending, said = ("", "") if loader is None else (f"/dataloader_idx_{loader}", f", dataloader {loader}")
            for (batch, sample), matches in drawn.items():
                batch = batch if apart else batch * trainer.world_size  # as in the table
                title = f"{stage}{said}, batch {batch}, sample {sample}: where tokens of the source frame go"
                shown = {f"step {step}\nlayer {layer}": xy for layer, (step, xy) in sorted(matches.items())}
                report.picture(f"matches_{batch}_{sample}{ending}", draw_matches(shown, title))


def _stage(trainer: Trainer) -> str:
    """What the Trainer does, in the words of `STAGES` or others ("sanity_check")."""
    return "" if trainer.state.stage is None else trainer.state.stage.value


def _repeated(trainer: Trainer, batch: int, dataloader_idx: int | None) -> list[bool] | None:
    """`repeated_items` of a batch of the dataloader that runs."""
    loaders = trainer._active_loop._combined_loader.flattened
    if dataloader_idx is not None or len(loaders) == 1:
        return repeated_items(loaders[dataloader_idx or 0], batch)
    # A batch that several dataloaders gave together.
    return [] if all(repeated_items(loader, batch) == [] for loader in loaders) else None


def _counted_once(rows: list[Row], repeated: list[bool] | None) -> list[Row]:
    """Rows of the items of a batch without those of repeated items.

    Warns where the rows of a layer and step cannot be shared out to the items.
    """
    if repeated is not None and (not any(repeated) or all(repeated)):
        return [] if any(repeated) else rows
    groups: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["layer"]), []).append(row)
    if repeated is None or any(len(group) % len(repeated) for group in groups.values()):
        warnings.warn(
            "a distributed sampler repeats items to even out the processes, and which samples they are cannot be told, "
            "so the table and figures of CorrespondenceCallback count them twice",
            UserWarning,
            stacklevel=3,
        )
        return rows
    again = {
        id(row)
        for group in groups.values()
        for index, row in enumerate(group)
        if repeated[index * len(repeated) // len(group)]
    }
    return [row for row in rows if id(row) not in again]


def _samples_of(result: object, most: int) -> int:
    """Samples in a result of the operation.

    Raises:
        ValueError: not a dict of tensors with the same batch first, or one with a column of the table's own name.
    """
    if not isinstance(result, dict) or not all(isinstance(value, torch.Tensor) for value in result.values()):
        raise ValueError(
            f"the operation must return a dict of tensors with the batch first, got {type(result).__name__}"
        )
    shown = {name: tuple(value.shape) for name, value in result.items()}
    sizes = {shape[0] if shape else 0 for shape in shown.values()}
    if len(sizes) != 1 or not 0 < min(sizes) <= most:
        raise ValueError(f"the operation must return a dict of tensors with the batch first, got {shown}")
    if taken := set(KEYS) & set(result):
        raise ValueError(f"the operation's result has {', '.join(sorted(taken))}, a column of the table; rename it")
    if "match_xy" in result and (result["match_xy"].ndim != 5 or result["match_xy"].shape[-1] != 2):
        raise ValueError(f"match_xy must be [B, F - 1, h, w, 2] to be drawn, got {shown}")
    return sizes.pop()


def _gathered(rows: list[Row]) -> list[Row]:
    """The rows of all processes; `batch` counts over all of them."""
    processes = torch.distributed.get_world_size()
    parts: list[list[Row]] = [[] for _ in range(processes)]
    torch.distributed.all_gather_object(parts, rows)
    numbered = (row | {"batch": row["batch"] * processes + rank} for rank, part in enumerate(parts) for row in part)
    return sorted(numbered, key=lambda row: tuple(row[key] for key in KEYS if key in row))


def _means(rows: Sequence[Row], column: str) -> dict[tuple[int, int], float]:
    """A column's mean over samples by (step, layer), in order."""
    groups: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        groups.setdefault((int(row["step"]), int(row["layer"])), []).append(row[column])
    return {key: float(np.mean(values)) for key, values in sorted(groups.items())}
