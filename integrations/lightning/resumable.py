"""A module that makes one result for each sample, and goes on where an earlier run was stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Generic

import lightning
import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.loading import named_dtype
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.fingerprint import model_facts
from corrdit.integrations.diffusers.placement import (
    Placement,
    placed_backbone,
    placement_of,
    preset_for_loading,
)
from corrdit.integrations.lightning.data_modules import Sample, on_first_process
from corrdit.progress import hidden_bars
from corrdit.runs import ResultFolder, check_on_broken

Model = str | os.PathLike[str] | Backbone


class ResumableModule(lightning.LightningModule, Generic[Sample]):
    """What all modules share that write a result for each sample `Trainer.predict` gives them.

    A subclass says in `settings` (and, once the model is loaded, in `prepare`) how results are made, and makes one in
    `make`. Settings and the model's weights are written down in the folder; a run with others is refused there. A
    sample that cannot be made is written down too, and the others go on.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        results: the folder.
        settings: how results are made, as far as it is known before the model is loaded.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        dtype: precision of the model, as torch's type or by its name; None for its own.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "report" writes down a sample that cannot be made and goes on; "raise" stops.

    Raises:
        ValueError: an argument out of range; when prediction starts, an unknown model or results of other settings in
            the folder.
    """

    stages: tuple[str, ...] = ("predict",)
    sample_kind = "video"

    def __init__(
        self,
        model: Model,
        results: ResultFolder,
        *,
        settings: Mapping[str, object],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        dtype: torch.dtype | str | None = None,
        placement: Placement | str = "device",
        on_broken: str = "report",
    ) -> None:
        super().__init__()
        self.on_broken = check_on_broken(on_broken)
        self.model, self.results, self.placement = model, results, placement_of(placement)
        self.model_dtype = named_dtype(dtype)
        self.model_preset = preset_for_loading(model, model_preset)
        name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name", str(model))
        self.settings: dict[str, object] = {
            "model": name,
            "dtype": self.model_dtype,
            **self.placement.described(),
            **settings,
        }

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return self.results.path

    def check_settings(self) -> None:
        """Raises ValueError where the output folder holds results that were made with other settings."""
        self.results.check_settings(self.settings)

    def prepare(self, backbone: Backbone) -> Mapping[str, object]:
        """Get ready to make results with the model; gives further settings, which depend on it."""
        return {}

    def make(self, sample: Sample) -> Mapping[str, object]:
        """Make the result of a sample, in its place; gives what `predict_step` returns beside its name.

        Raises:
            ValueError, OSError: what is wrong with the sample.
        """
        raise NotImplementedError

    def name_of(self, sample: Sample) -> str:
        """The name of the sample's result."""
        return str(sample["name"]) if isinstance(sample, Mapping) else str(getattr(sample, "name"))  # noqa: B009

    def check_stage(self, stage: str) -> None:
        """Raises ValueError for a stage that the module has no step for."""
        if stage not in self.stages:
            accepted = " or ".join(f"Trainer.{accepted}" for accepted in self.stages)
            raise ValueError(f"{type(self).__name__} has no {stage} step; call {accepted}")

    def setup(self, stage: str) -> None:
        """Load the model on this process's device, and check arguments and the output folder."""
        self.check_stage(stage)
        on_first_process(self.trainer, self.check_settings)
        backbone = self.load()
        self.settings |= {**self.prepare(backbone), **model_facts(backbone)}
        on_first_process(self.trainer, lambda: self.results.begin(self.settings))

    def load(self) -> Backbone:
        """The model with its parts where they run."""
        return placed_backbone(
            self.model,
            device=self.trainer.strategy.root_device,
            dtype=self.model_dtype,
            placement=self.placement,
            preset=self.model_preset,
        )

    def predict_step(self, batch: Sample, batch_idx: int) -> dict[str, object]:
        """Make the result of one sample.

        Args:
            batch: the sample, as the data module gives it.
            batch_idx: its number on this process.

        Returns:
            `{"name", "seconds", ...}`, or `{"name", "error"}` for one that cannot be made.
        """
        began, name = time.perf_counter(), self.name_of(batch)
        try:
            with hidden_bars():
                made = self.make(batch)
        except (ValueError, OSError) as error:
            if self.on_broken == "raise":
                raise ValueError(f"{self.sample_kind} {name}: {error}") from error
            known = dict(batch) if isinstance(batch, Mapping) else {}
            self.results.fail(name, str(error), **{word: known[word] for word in known if word != "name"})
            return {"name": name, "error": str(error)}
        return {"name": name, **made, "seconds": time.perf_counter() - began}
