"""Follow points through a video by the attention of a video diffusion transformer.

reads   VIDEO: a video or gif file or a folder of png or jpg frames; or a folder of such videos, with its subfolders
        --points: grid:16 for 16 x 16 points on the first frame, or a CSV file with the columns frame,x,y (frame counts
        from 0 at the first frame read; x, y in pixels from the frame's top left corner) and any others, such as label
writes  into the folder --output, all of them or none:
        tracks.npz  xy [frames, points, 2] in pixels, visible and score [frames, points], queries [points, 3], and
                    further columns of the points file by their names [points]
        tracks.mp4  the video with dots and trails coloured by start position; points that are hidden are hollow
        tracks.png  a contact sheet of it; with --rerun also tracks.rrd
        tracks.json how they were made; the same command makes them anew, another takes another folder
        for a folder of videos these in DIR/VIDEO of each, or failed.json, which says why not (status 2)

With --dense in their place, for one video:
        dense.npz  displacement [frames, rows, columns, 2] in pixels from start [rows, columns, 2], visible and score
                   [frames, rows, columns], and frame, the first one read
        dense.mp4  displacements as colours: hue is the direction, white is none, dark is hidden
        dense.png  a contact sheet of it
        dense.json as tracks.json

The first line of a points file may name the columns; without it there are three, frame, x and y. A run that was stopped
goes on when the same command is given again: with a folder of videos at the first one that is not done, with a video
longer than --frames-per-block at the block it had come to.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import add_run_options, named, trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import (
    add_model_options,
    checked_preset,
    chosen_placement,
    loaded_backbone,
    note_on_real_videos,
)
from corrdit.cli.points import check_points_spec, point_columns, read_points
from corrdit.cli.terminal import progress_bar
from corrdit.cli.tracker_options import add_tracker_options, given_tracker_options
from corrdit.files import OutputFolder, file_digest, write_json

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.integrations.diffusers.backbones.presets import Preset
    from corrdit.video import StreamedVideo
    from corrdit.visualization import TrackStyle

DEFAULT_POINTS = "grid:16"
TRACKS_RECORD, DENSE_RECORD = "tracks.json", "dense.json"
HELP = "follow points through a video"
USAGE = "VIDEO --output DIR [--points grid:16 | FILE.csv] [--model embedded] [options]"
EXAMPLES = (
    "corrdit track my_video.mp4 --output tracks",
    "corrdit track my_video.mp4 --output tracks --points points.csv --max-frames 24",
    "corrdit track my_videos/ --output tracks --model cogvideox-2b --device cuda --preset published",
)
MAIN = (
    *("help", "help_all", "video", "output", "points", "model", "device", "dtype", "preset", "start", "max_frames"),
    *("dense", "trail", "fade", "radius", "hide_hidden", "rerun", "processes"),
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="video file, folder of frames, or folder of videos")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    parser.add_argument("--points", default=DEFAULT_POINTS, metavar="grid:N|FILE.csv", help="the points to follow")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N frames")
    parser.add_argument("--max-frames", type=int | None, default=None, metavar="N", help="read at most N frames")
    parser.add_argument(
        "--max-side",
        type=int,
        default=720,
        metavar="PIXELS",
        help="shrink frames to at most this many pixels on the longer side while reading; results stay in the file's"
        " own pixels",
    )
    parser.add_argument(
        "--dense",
        type=int | None,
        default=None,
        metavar="N",
        help="follow every N-th pixel of the first frame, in x and y, in place of --points; without crops, unless"
        " --crops asks for them",
    )
    parser.add_argument("--trail", type=int, default=6, metavar="N", help="frames of path drawn behind a point")
    parser.add_argument("--fade", type=float, default=0.45, help="grey the video is drawn in, 0 (as is) to 1")
    parser.add_argument("--radius", type=float | None, default=None, help="of a dot, in pixels of the drawn picture")
    parser.add_argument("--hide-hidden", action="store_true", help="draw no rings where points are hidden")
    parser.add_argument("--rerun", action="store_true", help="also write tracks.rrd for the rerun viewer")
    add_run_options(parser)
    add_tracker_options(parser)


def run(arguments: Namespace) -> int:
    from corrdit.tracking import PointTracker
    from corrdit.tracking.files import PARTS, track_at_size, write_track_results
    from corrdit.tracking.rerun_file import RERUN_FILE, require_rerun, write_rerun
    from corrdit.video import StreamedVideo

    began = time.perf_counter()
    if arguments.rerun:
        require_rerun()
    if Path(arguments.video).resolve() == Path(arguments.output).resolve():
        raise ValueError(f"--output {arguments.output} is VIDEO itself; give the results another folder")
    if is_folder_of_videos(Path(arguments.video), arguments.output):
        if arguments.dense is not None:
            raise ValueError(f"--dense {arguments.dense} is for one video; {arguments.video} is a folder of videos")
        if arguments.rerun:
            raise ValueError(f"--rerun is for one video; {arguments.video} is a folder of videos")
        return track_folder(arguments, checked_preset(arguments.preset))
    if arguments.rerun and arguments.dense is not None:
        raise ValueError("--rerun shows points and --dense follows every pixel; leave one of them out")
    if arguments.dense is not None and arguments.points != DEFAULT_POINTS:
        raise ValueError(
            f"--dense {arguments.dense} follows pixels in place of --points {arguments.points}; leave one of them out"
        )
    if arguments.processes != 1:
        raise ValueError(
            f"--processes {arguments.processes} shares out the videos of a folder; {arguments.video} is one"
        )
    check_points_spec(arguments.points)
    drawn_style(arguments)  # refused before the model is loaded
    preset = checked_preset(arguments.preset)
    video = StreamedVideo(arguments.video, **named(arguments, "start", "max_frames", "max_side"))
    if arguments.dense is not None:
        return track_densely(arguments, preset, video)
    height, width = video.info.height, video.info.width
    queries = read_points(arguments.points, frames=len(video), height=height, width=width)
    parts = Path(arguments.output) / PARTS
    with OutputFolder(arguments.output, last=TRACKS_RECORD) as folder:
        backbone = loaded_backbone(arguments, preset)
        _write_record(arguments, backbone, folder / TRACKS_RECORD, points=_points_in_words(arguments.points))
        tracker = PointTracker(backbone, **given_tracker_options(arguments))
        with progress_bar("tracking") as report:
            tracks = track_at_size(tracker, video, queries, (height, width), progress=report, resume=parts)
        with progress_bar("drawing") as report:
            columns = point_columns(arguments.points)
            write_track_results(
                folder, video, tracks, queries, columns=columns, style=drawn_style(arguments), progress=report
            )
        if arguments.rerun:
            with progress_bar("recording") as report:
                shown = video.at_size(height, width)
                labels = columns.get("label")
                write_rerun(folder / RERUN_FILE, shown, tracks, queries=queries, labels=labels, progress=report)
    shutil.rmtree(parts, ignore_errors=True)
    visible = 100 * float(tracks.visible.float().mean())
    print(
        f"{len(queries)} points through {len(video)} frames of {height} x {width} in"
        f" {time.perf_counter() - began:.1f} s; visible {visible:.0f} %"
    )
    for name in ("tracks.npz", "tracks.mp4", "tracks.png", *([RERUN_FILE] if arguments.rerun else [])):
        print(f"  {Path(arguments.output) / name}")
    note_on_real_videos(arguments.model, "track")
    return 0


def _points_in_words(spec: str) -> str:
    """Which points are followed, for a record of the run."""
    return spec if spec.startswith("grid:") else f"points of sha256 {file_digest(spec)}"


def _write_record(arguments: Namespace, backbone: Backbone, file: Path, **further: object) -> None:
    """Write down how the results of one video are made, beside them.

    Raises:
        ValueError: the output folder has results that were made otherwise.
    """
    from corrdit.runs import refuse_other_record

    made = {
        **named(arguments, "model", "dtype", "preset", "start", "max_frames", "max_side", "trail", "fade", "radius"),
        **named(arguments, "hide_hidden"),
        **chosen_placement(arguments).described(),
        "weights": backbone.fingerprint(),
        "video": file_digest(arguments.video),
        "options": given_tracker_options(arguments),
        **further,
    }
    refuse_other_record(Path(arguments.output) / file.name, made)
    write_json(file, json.loads(json.dumps(made, default=str)))


def track_densely(arguments: Namespace, preset: Preset | str | None, video: StreamedVideo) -> int:
    """Follow every N-th pixel of the first frame and write what `dense.npz`, `.mp4` and `.png` hold."""
    from corrdit.arguments import whole_number
    from corrdit.tracking import PointTracker
    from corrdit.tracking.dense import DENSE_FILES, write_dense_results

    began, every = time.perf_counter(), whole_number("--dense", arguments.dense, 1)
    options = {"crops": (), **given_tracker_options(arguments)}
    with OutputFolder(arguments.output, last=DENSE_RECORD) as folder:
        backbone = loaded_backbone(arguments, preset)
        _write_record(arguments, backbone, folder / DENSE_RECORD, every=every)
        tracker = PointTracker(backbone, **options)
        with progress_bar("reading") as report:
            reading = tracker.read(video, progress=report)
        with progress_bar("tracking") as report:
            dense = reading.dense(every=every, progress=report)
        dense = dense.resized((video.info.width / video.shape[2], video.info.height / video.shape[1]))
        with progress_bar("drawing") as report:
            write_dense_results(folder, video, dense, progress=report)
    rows, columns = dense.start.shape[:2]
    visible = 100 * float(dense.visible.float().mean())
    print(
        f"{rows} x {columns} points through {len(video)} frames of {video.info.height} x {video.info.width} in"
        f" {time.perf_counter() - began:.1f} s; visible {visible:.0f} %"
    )
    for name in DENSE_FILES:
        print(f"  {Path(arguments.output) / name}")
    note_on_real_videos(arguments.model, "track")
    return 0


def drawn_style(arguments: Namespace) -> TrackStyle:
    """What --trail, --fade, --radius and --hide-hidden say.

    Raises:
        ValueError: one of them is out of range.
    """
    from corrdit.visualization import TrackStyle

    return TrackStyle(hidden=not arguments.hide_hidden, **named(arguments, "trail", "fade", "radius"))


def is_folder_of_videos(path: Path, output: str | None = None) -> bool:
    """A folder with videos in it (those in `output` aside) which is not itself a video, as pictures of its frames."""
    from corrdit.tracking.files import videos_below
    from corrdit.video.info import FRAME_SUFFIXES

    if not path.is_dir() or any(entry.suffix.lower() in FRAME_SUFFIXES for entry in path.iterdir()):
        return False
    return bool(videos_below(path, without=output))


def track_folder(arguments: Namespace, preset: Preset | str | None) -> int:
    """Track the points in every video of the folder: Lightning shares them out, and a stopped run goes on.

    Args:
        arguments: those of `corrdit track`.
        preset: of `checked_preset`.

    Returns:
        0, or 2 where a video could not be tracked; those are named on the error stream and the others are done.
    """
    began, spec = time.perf_counter(), arguments.points
    check_points_spec(spec)
    devices = trainer_devices(arguments)
    with quiet_lightning():
        from corrdit.integrations.lightning import TrackingModule, VideoDataModule, tracking_report

        data = VideoDataModule(arguments.video, output=arguments.output)
        module = TrackingModule(
            arguments.model,
            queries=lambda frames, height, width: read_points(spec, frames=frames, height=height, width=width),
            queries_description=_points_in_words(spec),
            model_preset=preset,
            options=given_tracker_options(arguments),
            placement=chosen_placement(arguments),
            columns=point_columns(spec),
            style=drawn_style(arguments),
            **named(arguments, "output", "dtype", "on_broken", "start", "max_frames", "max_side"),
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
    note_on_real_videos(arguments.model, "track")
    return 2 if report["failed"] or report["left"] else 0
