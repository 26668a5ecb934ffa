"""Tracks of a benchmark's video drawn over it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from corrdit.data.tapvid import TapVidSample
from corrdit.evaluation.results import file_name
from corrdit.tracking import Tracks

FRAMES_A_SECOND = 10.0
TRAIL = 15


def draw_tracks(folder: str | os.PathLike[str], sample: TapVidSample, tracks: Tracks) -> None:
    """Write `VIDEO.mp4` and the contact sheet `VIDEO.png` into a folder, which is made if need be."""
    from corrdit.visualization import TrackStyle, write_track_pictures

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as hidden:
        write_track_pictures(
            sample.video,
            tracks,
            (sample.video.shape[1], sample.video.shape[2]),
            queries=sample.queries,
            fps=FRAMES_A_SECOND,
            video_path=Path(hidden) / "tracks.mp4",
            sheet_path=Path(hidden) / "tracks.png",
            style=TrackStyle(trail=TRAIL),
        )
        for file in Path(hidden).iterdir():
            os.replace(file, folder / f"{file_name(sample.name)}{file.suffix}")


def true_tracks(sample: TapVidSample) -> Tracks:
    """The annotation as tracks; where a point is hidden its place is that of the query, if the set gives none."""
    known = np.isfinite(sample.tracks).all(axis=2, keepdims=True)
    xy = np.where(known, sample.tracks, sample.queries[:, None, 1:]).transpose(1, 0, 2)
    visible = ~sample.occluded.T & known[..., 0].T
    return Tracks(*map(torch.from_numpy, (xy, visible, np.ones(visible.shape, np.float32))))
