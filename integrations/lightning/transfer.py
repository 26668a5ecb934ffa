"""Motion transfer for a table of (video, prompt) pairs by `Trainer.predict`: each pair once over all processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from corrdit.files import refuse_other_settings, written_beside
from corrdit.integrations.lightning.data_modules import EachOnceSampler

SETTINGS_FILE = "settings.json"
PAIR_FILE = "pair.json"
FAILURE_FILE = "failed.json"
PAGE_FILE = "index.html"
COLUMNS = ("video", "prompt")
ON_BROKEN = ("report", "raise")


class PairItems(Dataset[dict[str, Any]]):
    """Pairs as `TransferDataModule` lists them."""

    def __init__(self, pairs: Sequence[dict[str, Any]]) -> None:
        self.pairs = list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pairs[index]


def read_pairs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Pairs of reference videos and prompts from a CSV file.

    Args:
        path: of a file with the columns `video` (relative to the file's folder, or absolute) and `prompt`, and perhaps
            `seed` and `name`. DiTFlow's table of DAVIS names and prompts is such a file once it has this first line.

    Returns:
        `{"name", "video", "prompt", "seed"}` each; names are the row numbers unless given.

    Raises:
        ValueError: no such file, columns that are missing, an empty field, a seed that is no number, or a name that is
            there twice or no name of a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a CSV file with the columns {', '.join(COLUMNS)}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (table.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; its first line must name the columns "
                f"{', '.join(COLUMNS)} (and perhaps seed and name), it has {', '.join(table.fieldnames or ['nothing'])}"
            )
        pairs = [_pair(row, number, path) for number, row in enumerate(table)]
    if not pairs:
        raise ValueError(f"{path} lists no pairs")
    names = [pair["name"] for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has the name {twice[0]!r} more than once; each pair needs a name of its own")
    return pairs


class TransferDataModule(lightning.LightningDataModule):
    """Pairs of a reference video and a prompt, one at a time, for `Trainer.predict`.

    Args:
        pairs: a CSV file as `read_pairs` takes it, or what it returns.
        output: results folder of the module that predicts; what is there already is left out, so that a run that was
            stopped goes on where it was. None predicts all.

    Raises:
        ValueError: what `read_pairs` refuses; when prediction starts, a result of another pair under the same name.
    """

    def __init__(
        self,
        pairs: str | os.PathLike[str] | Sequence[dict[str, Any]],
        *,
        output: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        # Fewer pairs are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.pairs = read_pairs(pairs) if isinstance(pairs, (str, os.PathLike)) else list(pairs)
        self.output = None if output is None else Path(output)
        self.pending = self.pairs

    def setup(self, stage: str) -> None:
        """The first process looks which pairs are left, so that all share out the same list."""
        pending = [pair for pair in self.pairs if not self._is_done(pair)]
        self.pending = pending if self.trainer is None else self.trainer.strategy.broadcast(pending)

    def predict_dataloader(self) -> DataLoader[Any]:
        """One pair a batch."""
        dataset = PairItems(self.pending)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EachOnceSampler(dataset, processes, rank)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_only, num_workers=0)

    def _is_done(self, pair: dict[str, Any]) -> bool:
        path = None if self.output is None else self.output / pair["name"] / PAIR_FILE
        if path is None or not path.is_file():
            return False
        earlier = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in ("prompt", "seed", "video") if earlier.get(key) != pair[key]]
        if changed:
            raise ValueError(
                f"{path.parent} holds the result of another pair ({changed[0]} {earlier.get(changed[0])!r}, not "
                f"{pair[changed[0]]!r}); give another output folder"
            )
        return True


class TransferModule(lightning.LightningModule):
    """Transfers motion for each pair `Trainer.predict` gives it and writes a folder of results for each.

    ```python
    module = TransferModule("embedded", output="results", settings={"steps": 50})
    Trainer().predict(module, TransferDataModule("pairs.csv", output="results"), return_predictions=False)
    ```

    `output/NAME/` gets what `corrdit transfer` writes, and `pair.json` last; it appears by one rename. A run that is
    stopped goes on after the last finished denoising step of each pair under way. `output/index.html` shows all
    results beside their references; `output/settings.json` says how they were made, and a run with other settings is
    refused. A pair that cannot be transferred gets `output/NAME/failed.json`.

    Args:
        model: for `corrdit.load_backbone`, or a backbone that is loaded already.
        output: folder for the results, made if need be.
        settings: changes of `TransferSettings`, by name.
        call: further arguments of `MotionTransfer`'s call (num_frames, height, width).
        fps: rate the references are resampled to, and of the files; None for each reference's own.
        dtype: precision of the model.
        measure: track both videos and measure motion fidelity.
        clip: folder or hub id of a CLIP model that measures the prompt's cosine as well; None for none.
        on_broken: "report" writes `failed.json` for a pair that cannot be transferred and goes on; "raise" stops.

    Raises:
        ValueError: an argument out of range; when prediction starts, an unknown model, settings it does not take, or
            results of other settings in `output`.
    """

    def __init__(
        self,
        model: Any = "embedded",
        *,
        output: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        call: Mapping[str, Any] | None = None,
        fps: float | None = None,
        dtype: torch.dtype | None = None,
        measure: bool = True,
        clip: str | os.PathLike[str] | None = None,
        on_broken: str = "report",
    ) -> None:
        super().__init__()
        if on_broken not in ON_BROKEN:
            raise ValueError(f"on_broken must be one of {', '.join(map(repr, ON_BROKEN))}, got {on_broken!r}")
        self.model, self.model_dtype = model, dtype
        self.output = Path(output)
        self.changes, self.call = dict(settings or {}), dict(call or {})
        self.fps, self.measure, self.on_broken = fps, measure, on_broken
        self.clip = clip
        self._transfer: Any = None
        self._similarity: Any = None

    def setup(self, stage: str) -> None:
        """Load the model on this process's device and check settings and output folder."""
        if stage != "predict":
            raise ValueError(f"TransferModule has no {stage} step; call Trainer.predict")
        from corrdit.integrations.diffusers.backbones.loading import load_backbone
        from corrdit.integrations.diffusers.motion_transfer import MotionTransfer

        backbone = self.model
        if isinstance(backbone, (str, os.PathLike)):
            backbone = load_backbone(backbone, device=self.trainer.strategy.root_device, dtype=self.model_dtype)
        self._transfer = MotionTransfer(backbone, **self.changes)
        if self.clip is not None:
            from corrdit.motion import PromptSimilarity

            self._similarity = PromptSimilarity(self.clip, backbone.device)
        self._check_settings()
        self.trainer.strategy.barrier("settings read")
        if self.trainer.is_global_zero:
            self.output.mkdir(parents=True, exist_ok=True)
            with written_beside(self.output / SETTINGS_FILE, "w") as file:
                json.dump(self._facts(), file, indent=2)
        self.trainer.strategy.barrier("settings written")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Transfer one pair.

        Args:
            batch: `{"name", "video", "prompt", "seed"}`.
            batch_idx: its number on this process.

        Returns:
            `{"name", "seconds"}` with the measures, or `{"name", "error"}` for a pair that cannot be transferred.
        """
        began = time.perf_counter()
        try:
            measured = self._transferred(batch)
        except (ValueError, OSError) as error:
            if self.on_broken == "raise":
                raise ValueError(f"pair {batch['name']}: {error}") from error
            folder = self.output / batch["name"]
            folder.mkdir(parents=True, exist_ok=True)
            with written_beside(folder / FAILURE_FILE, "w") as file:
                json.dump({**batch, "error": str(error)}, file, indent=2)
            return {"name": batch["name"], "error": str(error)}
        return {"name": batch["name"], "seconds": time.perf_counter() - began, **measured}

    def on_predict_end(self) -> None:
        """The first process writes the page of all results, once every process is done."""
        self.trainer.strategy.barrier("all pairs done")
        if self.trainer.is_global_zero:
            self._write_page()

    def _transferred(self, pair: dict[str, Any]) -> dict[str, float]:
        from corrdit.integrations.diffusers.motion_transfer.reference import at_rate
        from corrdit.integrations.diffusers.motion_transfer.results_on_disk import fidelity_of, write_transfer
        from corrdit.video import read_video

        video = read_video(pair["video"], min_frames=1)
        frames, fps = at_rate(video.frames, video.fps, self.fps)
        state = self.output / f".{pair['name']}.transfer-state.safetensors"
        result = self._transfer(
            frames, pair["prompt"], seed=pair["seed"], state_file=state, keep_state=True, **self.call
        )  # fmt: skip
        backbone = self._transfer.backbone
        measured: dict[str, float] = {}
        if self.measure:
            from corrdit.tracking import PointTracker

            measured = fidelity_of(result, PointTracker(backbone).track)
        if self._similarity is not None:
            measured["image_quality"] = self._similarity(result.video, pair["prompt"])
        hidden = Path(tempfile.mkdtemp(dir=self.output, prefix=f".part-{pair['name']}-"))
        try:
            write_transfer(
                hidden,
                result,
                backbone,
                self._transfer.settings,
                prompt=pair["prompt"],
                fps=fps,
                measured=measured,
            )
            with written_beside(hidden / PAIR_FILE, "w") as file:
                json.dump(pair, file, indent=2)
            target = self.output / pair["name"]
            shutil.rmtree(target, ignore_errors=True)
            os.replace(hidden, target)
            state.unlink(missing_ok=True)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
        return measured

    def _write_page(self) -> None:
        from corrdit.visualization import write_comparison_page

        rows = []
        for path in sorted(self.output.glob(f"*/{PAIR_FILE}")):
            pair = json.loads(path.read_text(encoding="utf-8"))
            files = {"reference": path.parent / "reference.mp4", "result": path.parent / "result.mp4"}
            rows.append((f"{pair['name']}: {pair['prompt']}", {k: f for k, f in files.items() if f.is_file()}))
        if rows:
            write_comparison_page(self.output / PAGE_FILE, rows)

    def _facts(self) -> dict[str, Any]:
        """How results are made, as `settings.json` keeps it."""
        facts = {
            "model": self.model if isinstance(self.model, str) else self._transfer.backbone.name,
            "settings": self._transfer.settings.described(),
            "call": self.call,
            "dtype": str(self.model_dtype),
            "fps": self.fps,
        }
        return json.loads(json.dumps(facts, default=str))

    def _check_settings(self) -> None:
        file = self.output / SETTINGS_FILE
        if not file.is_file():
            return
        refuse_other_settings(self.output, json.loads(file.read_text(encoding="utf-8")), self._facts())


def _pair(row: dict[str, str], number: int, path: Path) -> dict[str, Any]:
    empty = [column for column in COLUMNS if not (row.get(column) or "").strip()]
    if empty:
        raise ValueError(f"{path}, row {number + 1}: the column {empty[0]} is empty")
    seed = (row.get("seed") or "0").strip()
    if not seed.isdecimal():
        raise ValueError(f"{path}, row {number + 1}: seed must be a whole number, got {seed!r}")
    name = (row.get("name") or f"{number:04d}").strip()
    if name.startswith(".") or Path(name).name != name:
        raise ValueError(f"{path}, row {number + 1}: {name!r} is no name of a folder")
    video = Path(row["video"].strip())
    # Absolute, so that a run that goes on from another folder finds its pairs again.
    place = os.path.abspath(path.parent / video)
    return {"name": name, "video": place, "prompt": row["prompt"].strip(), "seed": int(seed)}


def _only(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]
