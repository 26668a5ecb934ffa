"""Motion transfer for a table of (video, prompt) pairs by `Trainer.predict`: each pair once over all processes."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch

from corrdit.arguments import flag
from corrdit.array_files import content_digest
from corrdit.data.motion_pairs import WHOLE_VIDEO, Pair, chosen_frames, read_pairs
from corrdit.files import file_digest, short_name
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.motion_transfer.reference import at_rate
from corrdit.integrations.diffusers.motion_transfer.region import Region, region_of_file
from corrdit.integrations.diffusers.motion_transfer.results_on_disk import (
    chosen_tracker,
    fidelity_of,
    fidelity_tracker,
    write_transfer,
)
from corrdit.integrations.diffusers.motion_transfer.transfer import MotionTransfer
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.lightning.data_modules import EachOnceDataModule
from corrdit.integrations.lightning.resumable import Model, ResumableModule
from corrdit.runs import Inputs, Keywords, ResultFolder

PAIR_FILE = "pair.json"
PAGE_FILE = "index.html"


class TransferDataModule(EachOnceDataModule[Pair]):
    """Pairs of a reference video and a prompt, one at a time, for `Trainer.predict`.

    Args:
        pairs: a table as `corrdit.data.motion_pairs.read_pairs` takes it, or what it returns.
        output: results folder of the module that predicts; what is there already is left out, so that a run that was
            stopped goes on where it was; pairs whose video is another than before are not. None predicts all.

    Raises:
        ValueError: what `read_pairs` refuses; when prediction starts, a result of another pair under the same name.
    """

    def __init__(
        self, pairs: str | os.PathLike[str] | Sequence[Pair], *, output: str | os.PathLike[str] | None = None
    ) -> None:
        given = read_pairs(pairs) if isinstance(pairs, (str, os.PathLike)) else pairs
        self.pairs = [cast(Pair, {**WHOLE_VIDEO, **pair}) for pair in given]
        self._by_name = {pair["name"]: pair for pair in self.pairs}
        super().__init__(list(self._by_name), None if output is None else transfer_results(output))

    def sample(self, name: str) -> Pair:
        """The pair of a name."""
        return self._by_name[name]

    def inputs(self, name: str) -> Inputs:
        """The digest of the reference video."""
        return pair_inputs(self._by_name[name])

    def left(self) -> list[str]:
        """Names of the pairs that have no result of their video as it is."""
        if self.results is not None:
            for pair in self.pairs:
                if self.results.unmade(pair["name"]) is None:
                    _refuse_other(pair, self.results)
        return super().left()


def transfer_results(output: str | os.PathLike[str]) -> ResultFolder:
    """The folder that a `TransferModule` writes."""
    return ResultFolder(output, what="a transfer", record=f"{{name}}/{PAIR_FILE}")


def pair_inputs(pair: Pair) -> dict[str, str]:
    """Digests of what the result of a pair is made from beside what the table says."""
    found = {"video": file_digest(pair["video"])}
    return {**found, "region": file_digest(pair["region"])} if _is_file(pair["region"]) else found


def _is_file(region: str) -> bool:
    """Whether a region is the path of a mask, and no box."""
    return bool(region) and not region.startswith("[")


class TransferModule(ResumableModule[Pair]):
    """Transfers motion for each pair `Trainer.predict` gives it and writes a folder of results for each.

    ```python
    module = TransferModule("embedded", output="results", settings={"steps": 50})
    Trainer().predict(module, TransferDataModule("pairs.csv", output="results"), return_predictions=False)
    ```

    `output/NAME/` gets what `corrdit transfer` writes, by one rename, and `pair.json` last. A run that is
    stopped goes on after the last finished denoising step of each pair under way. `output/index.html` shows all
    results beside their references; `output/settings.json` says how they were made, and a run with other settings or
    weights is refused. A pair that cannot be transferred gets `output/NAME/failed.json`.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        model_preset: for `corrdit.load_backbone`: a `Preset` or a preset.json in place of the model's own.
        settings: changes of `TransferSettings`, by name.
        call: further arguments of `MotionTransfer`'s call (num_frames, height, width).
        fps: rate the references are resampled to, and of the files; None for each reference's own.
        dtype: precision of the model, as torch's type or by its name.
        measure: track both videos and measure motion fidelity.
        tracker: of that: "cotracker" (CoTracker 3 from torch's hub), "ours" (the model itself), or "auto" for CoTracker
            where it is on this machine.
        clip: folder or hub id of a CLIP model that measures the prompt's cosine as well; None for none.
        placement: where the parts of the model lie and in what form, or the word for where; see
            `corrdit.integrations.diffusers.placement.Placement`.
        on_broken: "report" writes `failed.json` for a pair that cannot be transferred and goes on; "raise" stops.

    Attributes:
        layers: attention layers of the model, once it is loaded.

    Raises:
        ValueError: an argument out of range; when prediction starts, an unknown model, settings it does not take, or
            results of other settings in `output`.
    """

    sample_kind = "pair"

    def __init__(
        self,
        model: Model = "embedded",
        *,
        output: str | os.PathLike[str],
        model_preset: Preset | str | os.PathLike[str] | None = None,
        settings: Keywords | None = None,
        call: Keywords | None = None,
        fps: float | None = None,
        dtype: torch.dtype | str | None = None,
        measure: bool = True,
        tracker: str = "auto",
        clip: str | os.PathLike[str] | None = None,
        placement: Placement | str = "device",
        on_broken: str = "report",
    ) -> None:
        self.changes, self.call = dict(settings or {}), dict(call or {})
        self.fps, self.measure, self.clip = fps, flag("measure", measure), clip
        self.tracker = chosen_tracker(tracker)
        super().__init__(
            model,
            transfer_results(output),
            settings={"call": self.call, "fps": fps},
            model_preset=model_preset,
            dtype=dtype,
            placement=placement,
            on_broken=on_broken,
        )
        self._similarity: Callable[[np.ndarray, str], float] | None = None
        self.layers = 0

    def prepare(self, backbone: Backbone) -> Mapping[str, object]:
        """Check the settings against the model; gives all of them."""
        self._transfer = MotionTransfer(backbone, **self.changes)
        self.layers = backbone.layers
        if self.clip is not None:
            from corrdit.motion import PromptSimilarity

            self._similarity = PromptSimilarity(self.clip, backbone.device)
        return {"settings": self._transfer.settings.described()}

    def make(self, sample: Pair) -> Mapping[str, object]:
        """Transfer one pair; gives the measures."""
        from corrdit.video import read_video

        name, prompt = sample["name"], sample["prompt"]
        video = read_video(sample["video"], min_frames=1)
        inputs = pair_inputs(sample)
        frames, fps = at_rate(chosen_frames(video.frames, sample), video.fps / sample["step"], self.fps)
        # Of these inputs, so that a run begins anew where they are others.
        state = self.output / f".{short_name(name)}.{content_digest(sample, inputs)[:8]}.transfer-state.safetensors"
        result = self._transfer(
            frames,
            prompt,
            region=self._region(sample),
            seed=sample["seed"],
            state_file=state,
            keep_state=True,
            **self.call,
        )
        backbone = self._transfer.backbone
        measured: dict[str, float] = {}
        if self.measure:
            measured = fidelity_of(result, *fidelity_tracker(self.tracker, backbone))
        if self._similarity is not None:
            measured["image_quality"] = self._similarity(result.video, prompt)
        with self.results.result(name, inputs) as made:
            known: dict[str, object] = {} if video.info.hdr is None else {"hdr": video.info.hdr}
            known |= {"tracker": self.tracker} if self.measure else {}
            settings = self._transfer.settings
            write_transfer(
                made.folder, result, backbone, settings, prompt=prompt, fps=fps, measured=measured, known=known
            )
            made.facts.update(sample)
        for left in self.output.glob(f".{glob.escape(short_name(name))}.*.transfer-state.safetensors"):
            left.unlink(missing_ok=True)
        return measured

    def _region(self, sample: Pair) -> Region | None:
        """Where the motion of a pair is wanted."""
        region = sample["region"]
        if not _is_file(region):
            return json.loads(region) if region else None
        start, end, step = sample["start"], sample["end"], sample["step"]
        count = None if end is None else end - start
        return region_of_file(region, start=start, max_frames=count, stride=step, fps=self.fps)

    def on_predict_end(self) -> None:
        """The first process writes the page of all results, once every process is done."""
        self.trainer.strategy.barrier("all pairs done")
        if self.trainer.is_global_zero:
            self._write_page()

    def _write_page(self) -> None:
        from corrdit.visualization import write_comparison_page

        rows = []
        for folder in sorted(path.parent for path in self.output.glob(f"*/{PAIR_FILE}")):
            if self.results.unmade(folder.name) is None:
                pair = self.results.record(folder.name) or {}
                files = {word: folder / f"{word}.mp4" for word in ("reference", "result")}
                shown = {word: file for word, file in files.items() if file.is_file()}
                rows.append((f"{pair['name']}: {pair['prompt']}", shown))
        if rows:
            write_comparison_page(self.output / PAGE_FILE, rows)


def _refuse_other(pair: Pair, results: ResultFolder) -> None:
    earlier, now = {**WHOLE_VIDEO, **(results.record(pair["name"]) or {})}, dict(pair)
    changed = [
        key for key in ("prompt", "seed", "video", "start", "end", "step", "region") if earlier.get(key) != now[key]
    ]
    if changed:
        raise ValueError(
            f"{results.files_of(pair['name'])} holds the result of another pair ({changed[0]} "
            f"{earlier.get(changed[0])!r}, not {now[changed[0]]!r}); give another output folder"
        )
