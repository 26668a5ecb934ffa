"""`corrdit track` on a folder of videos: Lightning shares them out over processes, and a stopped run goes on."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corrdit.cli.devices import checked_device, checked_dtype
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.points import check_points_spec, read_points
from corrdit.cli.tracker_options import given_tracker_options

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from corrdit.integrations.diffusers import Preset


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
    devices = _device_options(arguments)
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
            dtype=checked_dtype(arguments.dtype),
            start=arguments.start,
            max_frames=arguments.max_frames,
            max_side=arguments.max_side,
            trail=arguments.trail,
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
    return f"points of sha256 {hashlib.sha256(Path(spec).read_bytes()).hexdigest()}"


def _device_options(arguments: Namespace) -> dict[str, Any]:
    """The Trainer's accelerator and devices."""
    device, processes = checked_device(arguments.device), arguments.processes
    if processes < 1:
        raise ValueError(f"--processes {processes} was given; accepted is a number of 1 or more")
    kind = "cpu" if device is None else device.type
    options: dict[str, Any] = {"accelerator": "gpu" if kind == "cuda" else kind, "devices": processes}
    if device is not None and device.index is not None and kind == "cuda":
        if processes > 1:
            raise ValueError(f"--device {device} is one device; for {processes} processes give --device {kind}")
        options["devices"] = [device.index]
    return options
