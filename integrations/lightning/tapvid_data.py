"""TAP-Vid's data sets for Lightning: each video on exactly one process, read when its turn comes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from corrdit.arguments import whole_number
from corrdit.data.corruptions import Corruption
from corrdit.data.tapvid import PUBLISHED_STRIDE, QUERY_MODES, TapVidSample
from corrdit.data.tapvid_set import TapVidEntry, TapVidSet
from corrdit.integrations.lightning.data_modules import EachOnceDataModule, on_first_process
from corrdit.runs import Inputs


class TapVidItem(TypedDict, total=False):
    """A video with its queries ("sample"), or why it is broken ("error")."""

    name: str
    sample: TapVidSample
    error: str


def sample_of(item: TapVidItem) -> TapVidSample:
    """The video of an item; ValueError for a broken one."""
    if "error" in item:
        raise ValueError(item["error"])
    return item["sample"]


class TapVidDataModule(EachOnceDataModule[TapVidItem]):
    """The videos of TAP-Vid DAVIS, Kinetics or RGB-Stacking, or of `corrdit world`, one at a time.

    For `Trainer.predict` and `Trainer.test`. Every process holds one file or shard in memory, jpeg frames encoded, and
    decodes one video at a time; the first process alone looks through the shards. A module with a method
    `is_done(name)`, such as `EvaluationModule`, is given the videos it does not call done. Batches are `TapVidItem`s.

    Args:
        path: as `corrdit.data.TapVidSet` takes it.
        mode: which queries: "first", "strided" or "frame_0" (see `TapVidVideo.sample`).
        stride: frames between queries, for "strided".
        start: number of the first video.
        end: number of the video after the last one; None for all. A shard that cannot be read counts as one video.
        max_frames: videos are cut after so many frames; None keeps them whole.
        corruption: by which the frames are made worse, such as "blur:3"; see `corrdit.data.Corruption`.
        incomplete: whether shards may be missing.

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
        incomplete: bool = False,
        corruption: Corruption | str | None = None,
    ) -> None:
        if mode not in QUERY_MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, QUERY_MODES))}, got {mode!r}")
        self.videos = TapVidSet(path, incomplete=incomplete)
        self.mode, self.stride = mode, whole_number("stride", stride, 1)
        self.corruption = Corruption.from_text(corruption) if isinstance(corruption, str) else corruption
        self.start = whole_number("start", start, 0)
        self.end = None if end is None else whole_number("end", end, 1)
        self.max_frames = None if max_frames is None else whole_number("max_frames", max_frames, 2)
        self._entries: dict[str, tuple[int, TapVidEntry]] = {}
        super().__init__([], None, neighbours=True)

    def setup(self, stage: str) -> None:
        """The first process lists the videos and looks which are left, so that all share out the same list."""
        self._entries = on_first_process(self.trainer, self._listed)
        self.names = list(self._entries)
        super().setup(stage)

    def left(self) -> list[str]:
        """Names of the videos that the module does not call done."""
        module = None if self.trainer is None else self.trainer.lightning_module
        done = getattr(module, "is_done", None)
        return [name for name in self.names if done is None or not done(name)]

    def sample(self, name: str) -> TapVidItem:
        """The video of a name, read and cut as asked for."""
        _, entry = self._entries[name]
        try:
            video = self.videos.read(entry)
            if self.max_frames is not None:
                video = video.shortened(self.max_frames)
            sample = video.sample(self.mode, stride=self.stride)
            if self.corruption is not None:
                sample = replace(sample, video=self.corruption.applied(sample.video))
        except (ValueError, OSError) as error:
            return {"name": name, "error": str(error)}
        return {"name": name, "sample": sample}

    def number(self, name: str) -> int:
        """The place of a video in the set; after `setup`."""
        return self._entries[name][0]

    def inputs(self, name: str) -> Inputs:
        """The digest of a video and its annotation; after `setup`."""
        return {"video": self._entries[name][1].digest}

    def described(self) -> dict[str, object]:
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
            "corruption": None if self.corruption is None else str(self.corruption),
        }

    def _listed(self) -> dict[str, tuple[int, TapVidEntry]]:
        """Number and entry of all videos from start to end by name."""
        entries = list(enumerate(self.videos.index()))
        chosen = {entry.name: (number, entry) for number, entry in entries[self.start : self.end]}
        if not chosen:
            raise ValueError(
                f"{self.videos.path} has no video from number {self.start} to {self.end or 'the end'}; it has "
                f"{len(entries)}"
            )
        return chosen
