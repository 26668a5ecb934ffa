"""A folder of videos for `Trainer.predict`: each video once over all processes, finished ones left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from corrdit.tracking.files import RESULT_FILE, find_videos


class VideoFiles(Dataset[dict[str, str]]):
    """Items `{"name": ..., "path": ...}`; the video itself is read by whoever gets one, frame by frame."""

    def __init__(self, root: str | os.PathLike[str], names: Sequence[str]) -> None:
        self.root = Path(root)
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"name": self.names[index], "path": str(self.root / self.names[index])}


class EachOnceSampler(DistributedSampler[Any]):
    """Every item on exactly one process, however uneven the counts.

    torch's distributed sampler repeats items until every process has as many as the others. Lightning leaves a sampler
    of this base class as it is.
    """

    def __init__(self, dataset: Dataset[Any], processes: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)
        self.total_size = len(dataset)  # type: ignore[arg-type]
        self.num_samples = len(range(rank, self.total_size, processes))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


class VideoDataModule(lightning.LightningDataModule):
    """The videos of a folder, one at a time, for `Trainer.predict`.

    Args:
        folder: looked through with its subfolders for video files and folders of frames.
        output: results folder of the module that predicts; videos whose result is there are left out, so that a run
            that was stopped goes on where it was. None predicts all.
        names: only these videos, relative to `folder`; None takes all.

    Raises:
        ValueError: the folder is none or holds no videos, or a name is not in it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        output: str | os.PathLike[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        # Fewer videos are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.folder = Path(folder)
        self.output = None if output is None else Path(output)
        available = find_videos(folder, without=output)
        missing = sorted(set(names or ()) - set(available))
        if missing:
            raise ValueError(f"{folder} holds no video {missing[0]!r}; it holds {', '.join(available[:10])}")
        self.names = available if names is None else [name for name in available if name in set(names)]
        self.pending: list[str] = self.names

    def setup(self, stage: str) -> None:
        """The first process looks which videos are left, so that all share out the same list."""
        pending = [name for name in self.names if self.output is None or not has_result(self.output, name)]
        self.pending = pending if self.trainer is None else self.trainer.strategy.broadcast(pending)

    def predict_dataloader(self) -> DataLoader[Any]:
        """One video a batch: `{"name": relative name, "path": file}`."""
        dataset = VideoFiles(self.folder, self.pending)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EachOnceSampler(dataset, processes, rank)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_the_only_one, num_workers=0)


def has_result(output: str | os.PathLike[str], name: str) -> bool:
    """Whether the results of a video are there; `tracks.npz` is put in place last."""
    return (Path(output) / name / RESULT_FILE).is_file()


def _the_only_one(items: list[dict[str, str]]) -> dict[str, str]:
    return items[0]
