"""A callback that reads correspondence out of anyone's LightningModule while it validates, tests or predicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer

from corrdit.arguments import whole_indices, whole_number
from corrdit.integrations.diffusers.processors import Operation
from corrdit.integrations.lightning.discovery import VideoModel, find_video_model
from corrdit.integrations.lightning.measurement import MatchMeasurement
from corrdit.integrations.lightning.reading import layer_indices, layer_list, timed_capture
from corrdit.integrations.lightning.reports import (
    FOLDER,
    ReportingCallback,
    draw_by_layer,
    draw_matches,
    log_figures,
    log_picture,
    log_table,
)

STAGES = ("validate", "test", "predict")
KEYS = ("batch", "sample", "step", "timestep", "layer")
Row = dict[str, float]


class CorrespondenceCallback(ReportingCallback):
    """Captures the attention of the video transformer a module holds, and logs what it says about correspondence.

    ```python
    Trainer(callbacks=[CorrespondenceCallback(layers=[17])]).validate(module, data)
    ```

    The module is not changed and nothing is trained: while one of its batches runs, `corrdit.capture` reads the chosen
    layers and steps. At the end of an epoch the module's own loggers get the mean of each figure
    (`correspondence/STAGE/step_S/layer_L/NAME`), a table with one row for each sample, step and layer, and pictures:
    the figure `picture` over layers and steps, and where the tokens of the source frame go. Loggers that take no tables
    or pictures get CSV and PNG files in the folder `correspondence` beside their logs. With several processes,
    validation and test put the rows of all together; prediction, where processes may do different numbers of batches,
    logs each process's own table (`_rank_N`).

    Args:
        layers: indices over all attention blocks, negative ones from the last, or "all".
        steps: denoising steps of a pipeline, negative ones from the last; None for the last one. Of a bare transformer
            every call is read.
        operation: an operation for `corrdit.capture` whose result is a dict of tensors: those of shape `[B]` become
            columns of the table, `match_xy [B, F - 1, h, w, 2]` is drawn. None for `MatchMeasurement()`: score,
            consistency, motion, and attention to the text, the own frame and the other frames.
        stages: of "validate", "test" and "predict".
        attribute: dotted name of the pipeline or transformer; None looks for it.
        batches: read only so many batches of an epoch; None for all.
        pictures: draw the tokens of so many samples of an epoch, each layer at the last step read.
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
        self._model: VideoModel | None = None
        self._indices: list[int] = []
        self._rows: list[Row] = []
        self._drawn: dict[tuple[int, int], dict[int, tuple[int, np.ndarray]]] = {}
        self._batch = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the model, so that a module without one is refused before its first batch."""
        self._model, self._rows, self._drawn, self._batch = None, [], {}, 0
        if _stage(trainer) in self.stages:
            self.refuse_shared_name(trainer)
            model = find_video_model(pl_module, self.attribute)
            self._indices = layer_indices(model, self.layers)
            self._model = model

    def on_validation_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        if self._model is not None and (self.batches is None or self._batch < self.batches):
            last_of_pipeline = None if isinstance(self._model, torch.nn.Module) else [-1]
            reading = timed_capture(
                self._model,
                layers=self._indices,
                steps=last_of_pipeline if self.steps is None else self.steps,
                operation=self.operation,
                deliver=self._receive,
            )
            self.open(reading)

    def on_validation_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        self.close()
        self._batch += 1

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
            key = dict(zip(KEYS, (self._batch, sample, step, times[sample], layer), strict=True))
            self._rows.append(key | {name: values[sample] for name, values in columns.items()})
            place = (self._batch, sample)
            if "match_xy" in result and (place in self._drawn or len(self._drawn) < self.pictures):
                match_xy = result["match_xy"][sample].float().cpu().numpy()
                self._drawn.setdefault(place, {})[layer] = (step, match_xy)

    def _report(self, trainer: Trainer, stage: str) -> None:
        # Prediction may give processes different numbers of batches, so they cannot wait for each other.
        several, apart = trainer.world_size > 1, trainer.world_size > 1 and stage == "predict"
        rows = _gathered(self._rows) if several and not apart else self._rows
        if not rows or not (trainer.is_global_zero or apart):
            return
        name = f"{self.name}/{stage}" + (f"_rank_{trainer.global_rank}" if apart else "")
        log_table(trainer, name, rows)
        figures = {
            f"{self.name}/{stage}/step_{step}/layer_{layer}/{column}": mean
            for column in rows[0]
            if column not in KEYS
            for (step, layer), mean in _means(rows, column).items()
        }
        log_figures(trainer, figures)
        for (batch, sample), matches in self._drawn.items():
            title = f"{stage}, batch {batch}, sample {sample}: where tokens of the source frame go"
            shown = {f"step {step}\nlayer {layer}": xy for layer, (step, xy) in sorted(matches.items())}
            log_picture(trainer, f"{name}/matches_{batch}_{sample}", draw_matches(shown, title))
        if self.picture in rows[0]:
            by_layer = {(layer, step): mean for (step, layer), mean in _means(rows, self.picture).items()}
            log_picture(trainer, f"{name}/{self.picture}", draw_by_layer(by_layer, self.picture, "step"))


def _stage(trainer: Trainer) -> str:
    """What the Trainer does, in the words of `STAGES` or others ("sanity_check")."""
    return "" if trainer.state.stage is None else trainer.state.stage.value


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
    return sorted(numbered, key=lambda row: tuple(row[key] for key in KEYS))


def _means(rows: Sequence[Row], column: str) -> dict[tuple[int, int], float]:
    """A column's mean over samples by (step, layer), in order."""
    groups: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        groups.setdefault((int(row["step"]), int(row["layer"])), []).append(row[column])
    return {key: float(np.mean(values)) for key, values in sorted(groups.items())}
