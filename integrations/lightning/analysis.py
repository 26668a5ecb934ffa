"""Analysing many videos with Lightning: each once over all processes, finished ones left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from corrdit.analysis.protocols import analysis_options
from corrdit.analysis.results import begin, check_settings, has_analysis
from corrdit.analysis.sources import AnalysisItem
from corrdit.integrations.lightning.data_modules import EachOnceSampler
from corrdit.integrations.lightning.model_placement import preset_for_loading


class AnalysisItems(Dataset[AnalysisItem]):
    """`AnalysisItem`s; the video of one is loaded by whoever gets it."""

    def __init__(self, items: Sequence[AnalysisItem]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> AnalysisItem:
        return self.items[index]


class AnalysisDataModule(lightning.LightningDataModule):
    """Videos with truth, one at a time, for `Trainer.predict`.

    Args:
        items: of `corrdit.analysis.sources` (`world_items`, `folder_items`, `difftrack_items`, ...).
        output: results folder of the `AnalysisModule`; videos whose result is there are left out. None predicts all.

    Raises:
        ValueError: no item, or two of one name.
    """

    def __init__(self, items: Sequence[AnalysisItem], *, output: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        # Fewer videos are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.items = list(items)
        self.output = None if output is None else Path(output)
        names = [item.name for item in self.items]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"{len(names)} videos with {len(set(names))} names were given; at least one, all different"
            )
        self.pending: list[str] = names

    def setup(self, stage: str) -> None:
        """The first process looks which videos are left, so that all share out the same list."""
        names = [item.name for item in self.items]
        pending = [name for name in names if self.output is None or not has_analysis(self.output, name)]
        self.pending = pending if self.trainer is None else self.trainer.strategy.broadcast(pending)

    def predict_dataloader(self) -> DataLoader[Any]:
        """One `AnalysisItem` a batch."""
        left = set(self.pending)
        dataset = AnalysisItems([item for item in self.items if item.name in left])
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EachOnceSampler(dataset, processes, rank)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_the_only_one, num_workers=0)


class AnalysisModule(lightning.LightningModule):
    """Analyses each video `Trainer.predict` gives it and writes a result file for each.

    ```python
    data = AnalysisDataModule(world_items(50), output="results")
    Trainer().predict(AnalysisModule("embedded", output="results"), data, return_predictions=False)
    ```

    `output/videos/NAME/analysis.npz` appears as a whole, so a run may be killed at any time; with
    `AnalysisDataModule(..., output=output)` the next run does what is left. A broken video gets
    `output/videos/NAME/failed.json`. `output/settings.json` says how the results were made; a run with other settings
    is refused. `corrdit.integrations.diffusers.analysis.finish_analysis` makes the report.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        protocol: "default" or "published", see `corrdit.analysis.PROTOCOLS`.
        options: of `corrdit.analysis.AnalysisOptions`, by name, in place of the protocol's.
        source: what the videos are, kept in the settings.
        dtype: precision of the model.
        on_broken: "report" writes `failed.json` for a video that cannot be analysed and goes on; "raise" stops.

    Raises:
        ValueError: an option out of range; when prediction starts, an unknown model, a layer or step it does not have,
            or results of other settings in `output`.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Any = None,
        protocol: str = "default",
        options: dict[str, Any] | None = None,
        source: Any = None,
        dtype: torch.dtype | None = None,
        on_broken: str = "report",
    ) -> None:
        super().__init__()
        if on_broken not in ("report", "raise"):
            raise ValueError(f'on_broken must be "report" or "raise", got {on_broken!r}')
        self.model, self.model_dtype, self.on_broken = model, dtype, on_broken
        self.model_preset = preset_for_loading(model, model_preset)
        self.output = Path(output)
        self.options = analysis_options(protocol, dict(options or {}))
        self.settings = {
            "model": model if isinstance(model, str) else getattr(model, "name", type(model).__name__),
            "source": source,
            "protocol": protocol,
            "options": self.options.described(),
            "dtype": str(dtype),
        }
        self.backbone: Any = None

    def setup(self, stage: str) -> None:
        """Load the model on this process's device and check the output folder."""
        if stage != "predict":
            raise ValueError(f"AnalysisModule has no {stage} step; call Trainer.predict")
        from corrdit.integrations.diffusers.analysis.videos import analysis_axes

        self.backbone = self._loaded()
        preset = self.backbone.preset
        self.options = replace(
            self.options, inference_steps=self.options.inference_steps or preset.reading.inference_steps
        )
        self.settings |= {"options": self.options.described(), "preset": preset.described()}
        check_settings(self.output, self.settings)
        analysis_axes(self.backbone, self.options)
        self.trainer.strategy.barrier("settings read")
        if self.trainer.is_global_zero:
            begin(self.output, self.settings)
        self.trainer.strategy.barrier("settings written")

    def predict_step(self, batch: AnalysisItem, batch_idx: int) -> dict[str, Any]:
        """Analyse one video; returns `{"name", "truth"}`, with "error" for a broken one."""
        from corrdit.integrations.diffusers.analysis.running import analyze_item

        return analyze_item(self.backbone, batch, self.output, self.options, on_broken=self.on_broken)

    def _loaded(self) -> Any:
        if not isinstance(self.model, (str, os.PathLike)):
            return self.model
        from corrdit.integrations.diffusers.backbones.loading import load_backbone

        device = self.trainer.strategy.root_device
        return load_backbone(self.model, device=device, dtype=self.model_dtype, preset=self.model_preset)


def _the_only_one(items: list[AnalysisItem]) -> AnalysisItem:
    return items[0]
