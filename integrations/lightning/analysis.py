"""Analysing many videos with Lightning: each once over all processes, finished ones left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from corrdit.analysis.protocols import analysis_options
from corrdit.analysis.results import analysis_folder
from corrdit.analysis.sources import Item
from corrdit.integrations.diffusers.analysis.running import analyze_item
from corrdit.integrations.diffusers.analysis.videos import analysis_axes
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.lightning.data_modules import EachOnceDataModule
from corrdit.integrations.lightning.resumable import Model, ResumableModule
from corrdit.runs import Inputs, Keywords


class AnalysisDataModule(EachOnceDataModule[Item]):
    """Videos with truth, one at a time, for `Trainer.predict`.

    Args:
        items: of `corrdit.analysis.sources` (`folder_items`, `regenerated_items`, ...) or `world_items`.
        output: results folder of the `AnalysisModule`; videos whose result is there are left out. None predicts all.

    Raises:
        ValueError: no item, or two of one name.
    """

    def __init__(self, items: Sequence[Item], *, output: str | os.PathLike[str] | None = None) -> None:
        self.items = {item.name: item for item in items}
        if not items or len(self.items) < len(items):
            raise ValueError(
                f"{len(items)} videos with {len(self.items)} names were given; at least one, all different"
            )
        super().__init__(list(self.items), None if output is None else analysis_folder(output))

    def sample(self, name: str) -> Item:
        """The item of a name, whose video is loaded by whoever gets it."""
        return self.items[name]

    def inputs(self, name: str) -> Inputs:
        """Digests of what is analysed."""
        return self.items[name].inputs()


class AnalysisModule(ResumableModule[Item]):
    """Analyses each video `Trainer.predict` gives it and writes a result file for each.

    ```python
    data = AnalysisDataModule(world_items(50), output="results")
    Trainer().predict(AnalysisModule("embedded", output="results"), data, return_predictions=False)
    ```

    `output/videos/NAME/analysis.npz` appears as a whole, so a run may be killed at any time; with
    `AnalysisDataModule(..., output=output)` the next run does what is left, what is damaged and videos that are others
    than before. A broken video gets `output/videos/NAME/failed.json`. `output/settings.json` says how the results were
    made; a run with other settings or weights is refused. `corrdit.integrations.diffusers.analysis.finish_analysis`
    makes the report.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        protocol: "default" or "published", see `corrdit.analysis.PROTOCOLS`.
        options: of `corrdit.analysis.AnalysisOptions`, by name, in place of the protocol's.
        source: what the videos are, kept in the settings.
        dtype: precision of the model, as torch's type or by its name.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "report" writes `failed.json` for a video that cannot be analysed and goes on; "raise" stops.

    Raises:
        ValueError: an option out of range; when prediction starts, an unknown model, a layer or step it does not have,
            or results of other settings in `output`.
    """

    def __init__(
        self,
        model: Model = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        protocol: str = "default",
        options: Keywords | None = None,
        source: object = None,
        dtype: torch.dtype | str | None = None,
        placement: Placement | str = "device",
        on_broken: str = "report",
    ) -> None:
        self.options = analysis_options(protocol, dict(options or {}))
        super().__init__(
            model,
            analysis_folder(output),
            settings={"source": source, "protocol": protocol},
            model_preset=model_preset,
            dtype=dtype,
            placement=placement,
            on_broken=on_broken,
        )

    def prepare(self, backbone: Backbone) -> Mapping[str, object]:
        """Check the options against the model; gives all of them, and the model's preset."""
        steps = self.options.inference_steps or backbone.preset.reading.inference_steps
        self.options = replace(self.options, inference_steps=steps)
        analysis_axes(backbone, self.options)
        self.backbone = backbone
        return {"options": self.options.described(), "preset": backbone.preset.described()}

    def make(self, sample: Item) -> Mapping[str, object]:
        """Analyse one video; gives what the truth is, and the error of a broken video."""
        return analyze_item(self.backbone, sample, self.output, self.options, on_broken=self.on_broken)
