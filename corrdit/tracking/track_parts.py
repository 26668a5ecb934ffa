"""Tracks of a long video, block by block in a folder, so that a run that was stopped goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from corrdit.array_files import read_arrays, write_arrays
from corrdit.runs import Inputs, ResultFolder
from corrdit.tracking.following import BlockTracks

FILE = "block.npz"


class TrackParts:
    """Finished blocks of one tracking run, as items of a `corrdit.runs.ResultFolder`.

    Args:
        path: the folder; made with the first block.
        made_from: settings, and digests of the video and the queries; a folder of others is refused.

    Raises:
        ValueError: the folder holds blocks that were made otherwise.
    """

    def __init__(self, path: str | os.PathLike[str], made_from: tuple[Mapping[str, Any], Inputs]) -> None:
        settings, self._inputs = made_from
        self._settings = {**settings, **self._inputs}
        self._results = ResultFolder(path, what="tracking a video")
        self._results.check_settings(self._settings)
        self._begun = False

    def stored(self, anchor: int, number: int) -> BlockTracks | None:
        """A block that is done; None where it has to be made."""
        name = _name(anchor, number)
        if not self._results.left({name: self._inputs}):
            names = ("frames", "xy", "visible", "score", "last", "tokens")
            arrays = read_arrays(self._results.files_of(name) / FILE, names, what="a block of tracks")
            frames, last = tuple(arrays["frames"].tolist()), int(arrays["last"])
            xy, visible, score, tokens = (torch.from_numpy(arrays[key]) for key in ("xy", "visible", "score", "tokens"))
            return BlockTracks(frames, xy, visible, score, last, tokens)
        return None

    def store(self, anchor: int, number: int, found: BlockTracks) -> None:
        """Write a block, whole or not at all."""
        if not self._begun:
            self._results.begin(self._settings)
            self._begun = True
        with self._results.result(_name(anchor, number), self._inputs) as result:
            write_arrays(result.folder / FILE, {name: value for name, value in found._asdict().items()})


def _name(anchor: int, number: int) -> str:
    return f"{anchor:06}-{number:06}"
