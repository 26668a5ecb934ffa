"""`corrdit track` on a folder of videos: Lightning shares them out over processes, and a stopped run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.points import check_points_spec, read_points
from corrdit.cli.tracker_options import given_tracker_options
from corrdit.files import file_digest

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import Namespace

    from corrdit.integrations.diffusers.backbones.presets import Preset


def is_folder_of_videos(path: Path, output: str | None = None) -> bool:
    """A folder with videos in it (those in `output` aside) which is not itself a video, as pictures of its frames."""
    from corrdit.tracking.files import videos_below
    from corrdit.video.info import FRAME_SUFFIXES

    if not path.is_dir() or any(entry.suffix.lower() in FRAME_SUFFIXES for entry in path.iterdir()):
        return False
    return bool(videos_below(path, without=output))


def track_folder(arguments: Namespace, preset: Preset | str | None) -> int:
    """Track the points in every video of the folder.

    Args:
        arguments: those of `corrdit track`.
        preset: of `checked_preset`.

    Returns:
        0, or 2 where a video could not be tracked; those are named on the error stream and the others are done.
    """
    began = time.perf_counter()
    check_points_spec(arguments.points)
    devices = trainer_devices(arguments)
    with quiet_lightning():
        from corrdit.integrations.lightning import TrackingModule, VideoDataModule, tracking_report

        data = VideoDataModule(arguments.video, output=arguments.output)
        module = TrackingModule(
            arguments.model,
            output=arguments.output,
            queries=_points_of(arguments.points),
            queries_description=_points_description(arguments.points),
            model_preset=preset,
            options=given_tracker_options(arguments),
            dtype=arguments.dtype,
            start=arguments.start,
            max_frames=arguments.max_frames,
            max_side=arguments.max_side,
            trail=arguments.trail,
            placement=arguments.placement,
            on_broken=arguments.on_broken,
        )
        module.check_settings()  # before Lightning starts processes that would each say it
        trainer = command_trainer(several=arguments.processes > 1, **devices)
        predict(trainer, module, data)
        trainer.strategy.barrier("every process has done its videos")
    if not trainer.is_global_zero:
        return 0
    report = tracking_report(arguments.output, data.names)
    for name, error in report["failed"].items():
        print(f"corrdit track: {name}: {error}", file=sys.stderr)
    new = len(set(report["done"]) & set(data.pending))
    print(
        f"{len(report['done'])} of {len(data.names)} videos tracked, {new} of them now, in"
        f" {time.perf_counter() - began:.1f} s; {len(report['failed'])} could not be tracked"
    )
    print(f"  {Path(arguments.output)}/VIDEO/tracks.npz, tracks.mp4, tracks.png")
    return 2 if report["failed"] or report["left"] else 0


def _points_of(spec: str) -> Callable[[int, int, int], np.ndarray]:
    def points(frames: int, height: int, width: int) -> np.ndarray:
        return read_points(spec, frames=frames, height=height, width=width)

    return points


def _points_description(spec: str) -> str:
    """What tells these points from others when a run goes on."""
    if spec.startswith("grid:"):
        return spec
    return f"points of sha256 {file_digest(spec)}"
