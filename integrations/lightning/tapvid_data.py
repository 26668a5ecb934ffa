"""TAP-Vid's data sets for Lightning: each video on exactly one process, read when its turn comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, Dataset

from corrdit.arguments import whole_number
from corrdit.data.tapvid import PUBLISHED_STRIDE, QUERY_MODES
from corrdit.data.tapvid_set import TapVidEntry, TapVidSet
from corrdit.integrations.lightning.data_modules import EachOnceSampler


class TapVidVideos(Dataset[dict[str, Any]]):
    """Items `{"name", "number", "sample": TapVidSample}`, or `{"name", "number", "error"}` for a video that is broken.

    Args:
        videos: the set they are read from.
        entries: which of them, with their numbers in the set.
        mode, stride: of the queries, as `TapVidVideo.sample` takes them.
        max_frames: videos are cut after so many frames; None keeps them whole.
    """

    def __init__(
        self,
        videos: TapVidSet,
        entries: Sequence[tuple[int, TapVidEntry]],
        *,
        mode: str,
        stride: int,
        max_frames: int | None,
    ) -> None:
        self.videos, self.entries = videos, list(entries)
        self.mode, self.stride, self.max_frames = mode, stride, max_frames

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, entry = self.entries[index]
        try:
            video = self.videos.read(entry)
            if self.max_frames is not None:
                video = video.shortened(self.max_frames)
            sample = video.sample(self.mode, stride=self.stride)
        except (ValueError, OSError) as error:
            return {"name": entry.name, "number": number, "error": str(error)}
        return {"name": entry.name, "number": number, "sample": sample}


class NeighboursOnceSampler(EachOnceSampler):
    """Every item on exactly one process, neighbours together, so that few processes need the same shard."""

    def __init__(self, dataset: Dataset[Any], processes: int, rank: int) -> None:
        super().__init__(dataset, processes, rank)
        self.block = range(rank * self.total_size // processes, (rank + 1) * self.total_size // processes)
        self.num_samples = len(self.block)

    def __iter__(self) -> Iterator[int]:
        return iter(self.block)


class TapVidDataModule(lightning.LightningDataModule):
    """The videos of TAP-Vid DAVIS, Kinetics or RGB-Stacking, or of `corrdit world`, one at a time.

    For `Trainer.predict` and `Trainer.test`. Every process holds one file or shard in memory, jpeg frames encoded, and
    decodes one video at a time; the first process alone looks through the shards. A module with a method
    `is_done(name)`, such as `EvaluationModule`, is given the videos it does not call done.

    Args:
        path: as `corrdit.data.TapVidSet` takes it.
        mode: which queries: "first", "strided" or "frame_0" (see `TapVidVideo.sample`).
        stride: frames between queries, for "strided".
        start: number of the first video.
        end: number of the video after the last one; None for all. A shard that cannot be read counts as one video.
        max_frames: videos are cut after so many frames; None keeps them whole.

    Attributes:
        names: of all videos from `start` to `end`, once `setup` has run.

    Raises:
        FileNotFoundError, ValueError: what `TapVidSet` refuses, an unknown mode, numbers out of range; when the data
            are set up, a single file that cannot be read, or no video from `start` to `end`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: str = "first",
        stride: int = PUBLISHED_STRIDE,
        start: int = 0,
        end: int | None = None,
        max_frames: int | None = None,
    ) -> None:
        super().__init__()
        # Fewer videos are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if mode not in QUERY_MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, QUERY_MODES))}, got {mode!r}")
        self.videos = TapVidSet(path)
        self.mode, self.stride = mode, whole_number("stride", stride, 1)
        self.start = whole_number("start", start, 0)
        self.end = None if end is None else whole_number("end", end, 1)
        self.max_frames = None if max_frames is None else whole_number("max_frames", max_frames, 2)
        self.names: list[str] = []
        self.pending: list[tuple[int, TapVidEntry]] = []

    def setup(self, stage: str) -> None:
        """The first process lists the videos and looks which are left, so that all share out the same list."""
        if self.trainer is None:
            self.names, self.pending = self._listed(None)
            return
        strategy = self.trainer.strategy
        done = getattr(self.trainer.lightning_module, "is_done", None)
        found: Any = None
        if self.trainer.is_global_zero:
            try:
                found = self._listed(done)
            except ValueError as error:
                found = str(error)
        found = strategy.broadcast(found)
        if isinstance(found, str):
            raise ValueError(found)
        self.names, self.pending = found

    def predict_dataloader(self) -> DataLoader[Any]:
        """One video a batch, as `TapVidVideos` gives it."""
        return self._dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """One video a batch, as `TapVidVideos` gives it."""
        return self._dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay on the CPU: a tracker moves frames in groups."""
        return batch

    def described(self) -> dict[str, Any]:
        """What tells these data from others, as `settings.json` keeps it; after `setup`."""
        names = hashlib.sha256("\n".join(self.names).encode()).hexdigest()
        return {
            "set": Path(self.videos.path).resolve().name,
            "names_sha256": names,
            "mode": self.mode,
            "stride": self.stride if self.mode == "strided" else None,
            "start": self.start,
            "end": self.end,
            "max_frames": self.max_frames,
        }

    def _listed(self, done: Any) -> tuple[list[str], list[tuple[int, TapVidEntry]]]:
        """Names of all videos from start to end, and the entries among them that are not done."""
        entries = list(enumerate(self.videos.index()))[self.start : self.end]
        if not entries:
            raise ValueError(
                f"{self.videos.path} has no video from number {self.start} to {self.end or 'the end'}; it has "
                f"{len(self.videos.index())}"
            )
        pending = [(number, entry) for number, entry in entries if done is None or not done(entry.name)]
        return [entry.name for _, entry in entries], pending

    def _dataloader(self) -> DataLoader[Any]:
        options: dict[str, Any] = {"mode": self.mode, "stride": self.stride, "max_frames": self.max_frames}
        dataset = TapVidVideos(self.videos, self.pending, **options)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = NeighboursOnceSampler(dataset, processes, rank)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_the_only_one, num_workers=0)


def _the_only_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    return items[0]
