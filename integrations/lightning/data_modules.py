"""Samples for `Trainer.predict` and `Trainer.test`: each once over all processes, finished ones left out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Generic, TypeVar, cast

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from corrdit.files import file_digest
from corrdit.runs import Inputs, ResultFolder
from corrdit.tracking.files import find_videos

Sample = TypeVar("Sample")
Found = TypeVar("Found")


class EachOnceSampler(DistributedSampler[int]):
    """Every item on exactly one process, however uneven the counts.

    torch's distributed sampler repeats items until every process has as many as the others. Lightning leaves a sampler
    of this base class as it is.

    Args:
        dataset: of which it gives the numbers.
        processes: how many share it.
        rank: of this one.
        neighbours: whether a process has items that follow one another, so that few need the same file.
    """

    def __init__(self, dataset: Dataset[Sample], processes: int, rank: int, *, neighbours: bool = False) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)
        self.total_size = total = len(cast(Sized, dataset))
        self.chosen = range(rank, total, processes)
        if neighbours:
            self.chosen = range(rank * total // processes, (rank + 1) * total // processes)
        self.num_samples = len(self.chosen)

    def __iter__(self) -> Iterator[int]:
        return iter(self.chosen)


class Samples(Dataset[Sample]):
    """Samples by name, each made by whoever gets it."""

    def __init__(self, names: Sequence[str], sample: Callable[[str], Sample]) -> None:
        self.names, self._sample = list(names), sample

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self.names[index])


class EachOnceDataModule(lightning.LightningDataModule, Generic[Sample]):
    """Samples by name, one at a time, each on exactly one process.

    Args:
        names: of all samples.
        results: the folder in which those that are done are left out, so that a run that was stopped goes on where it
            was. None takes all.
        neighbours: whether a process is given samples that follow one another.

    Attributes:
        names: of all samples.
        pending: names of those that are left, once `setup` has run.
    """

    def __init__(self, names: Sequence[str], results: ResultFolder | None, *, neighbours: bool = False) -> None:
        super().__init__()
        # Fewer samples are left than there are processes near the end of a resumed run.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.names, self.results, self.neighbours = list(names), results, neighbours
        self.pending = self.names

    def sample(self, name: str) -> Sample:
        """What the module is given for a name."""
        raise NotImplementedError

    def inputs(self, name: str) -> Inputs:
        """Digests of what the result of a name is made from."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """Names of the samples that have no result, or none that still holds."""
        if self.results is None:
            return self.names
        return self.results.left({name: functools.partial(self.inputs, name) for name in self.names})

    def setup(self, stage: str) -> None:
        """The first process looks which samples are left, so that all share out the same list."""
        self.pending = on_first_process(self.trainer, self.left)

    def predict_dataloader(self) -> DataLoader[Sample]:
        """One sample a batch."""
        dataset = Samples(self.pending, self.sample)
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        sampler = EachOnceSampler(dataset, processes, rank, neighbours=self.neighbours)
        return DataLoader(dataset, batch_size=1, sampler=sampler, collate_fn=_the_only_one, num_workers=0)

    def test_dataloader(self) -> DataLoader[Sample]:
        """One sample a batch."""
        return self.predict_dataloader()

    def transfer_batch_to_device(self, batch: Sample, device: torch.device, dataloader_idx: int) -> Sample:
        """Samples stay on the CPU: a model moves what it takes of them."""
        return batch


class VideoDataModule(EachOnceDataModule[dict[str, str]]):
    """The videos of a folder, one at a time, for `Trainer.predict`: `{"name": relative name, "path": file}` each.

    Args:
        folder: looked through with its subfolders for video files and folders of frames.
        output: results folder of the module that predicts; videos whose result is there are left out, so that a run
            that was stopped goes on where it was; videos that are others than before are not. None predicts all.
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
        available = find_videos(folder, without=output)
        if missing := sorted(set(names or ()) - set(available)):
            raise ValueError(f"{folder} holds no video {missing[0]!r}; it holds {', '.join(available[:10])}")
        chosen = available if names is None else [name for name in available if name in set(names)]
        super().__init__(chosen, None if output is None else tracking_results(output))
        self.folder = Path(folder)

    def sample(self, name: str) -> dict[str, str]:
        """Name and file of a video, which is read by whoever gets it, frame by frame."""
        return {"name": name, "path": str(self.folder / name)}

    def inputs(self, name: str) -> Inputs:
        """The digest of the video."""
        return {"video": file_digest(self.folder / name)}


def tracking_results(output: str | os.PathLike[str]) -> ResultFolder:
    """The folder that a `TrackingModule` writes."""
    return ResultFolder(output, what="tracking")


def on_first_process(trainer: lightning.Trainer | None, work: Callable[[], Found]) -> Found:
    """What `work` gives on the first process, on all of them; its ValueError or OSError is raised on all."""
    if trainer is None:
        return work()
    found: Found | ValueError | OSError | None = None
    if trainer.is_global_zero:
        try:
            found = work()
        except (ValueError, OSError) as error:
            found = error
    found = cast("Found | ValueError | OSError", trainer.strategy.broadcast(found))
    if isinstance(found, (ValueError, OSError)):
        raise found
    return found


def _the_only_one(items: list[Sample]) -> Sample:
    return items[0]
