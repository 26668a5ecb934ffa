"""A callback that reads correspondence out of anyone's LightningModule while it validates, tests or predicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from corrdit.arguments import whole_number
from corrdit.integrations.diffusers.indices import whole_indices
from corrdit.integrations.lightning.discovery import find_video_model
from corrdit.integrations.lightning.measurement import MatchMeasurement
from corrdit.integrations.lightning.reading import BatchReading, layer_list
from corrdit.integrations.lightning.reports import (
    FOLDER,
    check_names_differ,
    draw_heatmap,
    draw_matches,
    log_figures,
    log_picture,
    log_table,
    report_name,
)

STAGES = ("validate", "test", "predict")
KEYS = ("batch", "sample", "step", "timestep", "layer")


class CorrespondenceCallback(Callback):
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
        operation: Any = None,
        stages: Iterable[str] = STAGES,
        attribute: str | None = None,
        batches: int | None = None,
        pictures: int = 2,
        picture: str = "consistency",
        name: str = FOLDER,
    ) -> None:
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
        self.name = report_name(name)
        self._reading: BatchReading | None = None
        self._rows: list[dict[str, Any]] = []
        self._drawn: dict[tuple[int, int], dict[int, tuple[int, np.ndarray]]] = {}
        self._batch = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module, "validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, pl_module, "predict")

    def on_validation_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._open()

    def on_test_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._open()

    def on_predict_batch_start(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._open()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._close()

    def on_test_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._close()

    def on_predict_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self._close()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "validate")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "test")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, "predict")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model whatever happened in the batch."""
        if self._reading is not None:
            self._reading.close(exception)

    def _prepare(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self._reading, self._rows, self._drawn, self._batch = None, [], {}, 0
        if stage not in self.stages or trainer.sanity_checking:
            return
        check_names_differ(self, trainer)
        model = find_video_model(module, self.attribute)
        last_of_pipeline = None if isinstance(model, torch.nn.Module) else [-1]
        self._reading = BatchReading(
            model,
            layers=self.layers,
            steps=last_of_pipeline if self.steps is None else self.steps,
            operation=self.operation,
            deliver=self._receive,
        )

    def _open(self) -> None:
        if self._reading is not None and (self.batches is None or self._batch < self.batches):
            self._reading.open()

    def _close(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._batch += 1

    def _receive(self, step: int, layer: int, timesteps: torch.Tensor, result: Any) -> None:
        samples = _samples_of(result, len(timesteps))
        columns = {name: value.float().tolist() for name, value in result.items() if value.ndim == 1}
        # Pipelines that put both branches of guidance into one batch have the conditional one last.
        times = timesteps[-samples:].tolist()
        for sample in range(samples):
            key = (self._batch, sample, step, times[sample], layer)
            self._rows.append(
                dict(zip(KEYS, key, strict=True)) | {name: values[sample] for name, values in columns.items()}
            )
            place = (self._batch, sample)
            if "match_xy" in result and (place in self._drawn or len(self._drawn) < self.pictures):
                match_xy = result["match_xy"][sample].float().cpu().numpy()
                self._drawn.setdefault(place, {})[layer] = (step, match_xy)

    def _report(self, trainer: Trainer, stage: str) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        together = stage != "predict" and trainer.world_size > 1
        rows = _gathered(self._rows) if together else self._rows
        apart = stage == "predict" and trainer.world_size > 1
        if not rows or not (trainer.is_global_zero or apart):
            return
        name = f"{self.name}/{stage}" + (f"_rank_{trainer.global_rank}" if apart else "")
        log_table(trainer, name, rows, trainer.global_step)
        means = _means(rows)
        figures = {f"{self.name}/{stage}/{place}/{column}": value for place, column, value in means}
        log_figures(trainer, figures, trainer.global_step)
        for (batch, sample), matches in self._drawn.items():
            title = f"{stage}, batch {batch}, sample {sample}: where tokens of the source frame go"
            shown = {f"step {step}\nlayer {layer}": xy for layer, (step, xy) in sorted(matches.items())}
            picture = draw_matches(shown, title)
            log_picture(trainer, f"{name}/matches_{batch}_{sample}", picture, trainer.global_step)
        if self.picture in rows[0]:
            log_picture(trainer, f"{name}/{self.picture}", _over_layers(rows, self.picture), trainer.global_step)


def _samples_of(result: Any, most: int) -> int:
    """Samples in a result of the operation.

    Raises:
        ValueError: not a dict of tensors with the same batch first, or one with a column of the table's own name.
    """
    tensors = isinstance(result, dict) and all(isinstance(value, torch.Tensor) for value in result.values())
    sizes = {value.shape[0] if value.ndim else 0 for value in result.values()} if tensors else set()
    shown = {name: tuple(value.shape) for name, value in result.items()} if tensors else type(result).__name__
    if len(sizes) != 1 or not 0 < min(sizes) <= most:
        raise ValueError(f"the operation must return a dict of tensors with the batch first, got {shown}")
    if taken := set(KEYS) & set(result):
        raise ValueError(f"the operation's result has {', '.join(sorted(taken))}, a column of the table; rename it")
    if "match_xy" in result and (result["match_xy"].ndim != 5 or result["match_xy"].shape[-1] != 2):
        raise ValueError(f"match_xy must be [B, F - 1, h, w, 2] to be drawn, got {shown}")
    return sizes.pop()


def _gathered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes; `batch` counts over all of them."""
    processes = torch.distributed.get_world_size()
    parts: list[Any] = [None] * processes
    torch.distributed.all_gather_object(parts, rows)
    numbered = (row | {"batch": row["batch"] * processes + rank} for rank, part in enumerate(parts) for row in part)
    return sorted(numbered, key=lambda row: tuple(row[key] for key in KEYS))


def _means(rows: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """(step and layer, column, mean over samples)."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["step"], row["layer"]), []).append(row)
    columns = [column for column in rows[0] if column not in KEYS]
    return [
        (f"step_{step}/layer_{layer}", column, float(np.mean([row[column] for row in group])))
        for (step, layer), group in sorted(groups.items())
        for column in columns
    ]


def _over_layers(rows: list[dict[str, Any]], column: str) -> np.ndarray:
    """Picture of a column's mean over layers and steps."""
    layers, steps = (sorted({row[key] for row in rows}) for key in ("layer", "step"))
    table = np.full((len(layers), len(steps)), np.nan)
    for i, layer in enumerate(layers):
        for j, step in enumerate(steps):
            values = [row[column] for row in rows if (row["layer"], row["step"]) == (layer, step)]
            table[i, j] = np.mean(values) if values else np.nan
    return draw_heatmap(table, [f"layer {layer}" for layer in layers], [f"step {step}" for step in steps], column)
