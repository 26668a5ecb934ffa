"""Write generated videos with exact tracks: moving textured sprites over a moving textured background.

reads   nothing; the videos follow from --seed
writes  into the folder --output, all of them or none, for each video NNNN:
        NNNN.mp4     the frames (compressed; the exact frames are in the npz)
        NNNN.npz     video uint8 [T, H, W, 3], xy float32 [T, P, 2] in pixels, visible bool [T, P], queries [P, 3]
                     (frame, x, y), flow float32 [T-1, H, W, 2] and flow_visible bool [T-1, H, W]
        prompts.csv  one row a video: name, seed, caption, subject, scene
        world.pkl    with --tapvid: all videos in the layout of TAP-Vid's DAVIS file
"""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import named
from corrdit.cli.frame_options import add_num_frames_option, add_size_option
from corrdit.cli.terminal import progress_bar
from corrdit.files import OutputFolder, write_csv

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.embedded.world import Clip

HELP = "write generated videos with exact tracks, flow and prompts"
USAGE = "--output DIR [--videos N] [--seed S] [options]"
EXAMPLES = (
    "corrdit world --output world --videos 12 --seed 7",
    "corrdit world --output world --videos 2 --num-frames 8 --size 64x96 --tapvid",
)
_FPS = 8.0
_SEEDS = 100_000
"""From the first seed of a set to that of the next."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the videos, made if need be")
    parser.add_argument("--videos", type=int, default=10, metavar="N", help="how many")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="video i follows from seed 100000 * S + i")
    add_num_frames_option(parser, "frames of each video", default=24)
    add_size_option(parser, "of the frames in pixels", default="160x240")
    parser.add_argument("--points", type=int, default=256, metavar="P", help="tracked points of each video")
    parser.add_argument("--tapvid", action="store_true", help="also write world.pkl in the layout of TAP-Vid")


def run(arguments: Namespace) -> int:
    from corrdit.data.tapvid_writing import write_tapvid
    from corrdit.integrations.embedded.world import PROMPT_KINDS, WorldConfig, describe, generate
    from corrdit.integrations.embedded.world.clips import as_tapvid, sample_queries

    for name in ("videos", "points"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} was given; accepted is 1 or more")
    if arguments.seed < 0:
        raise ValueError(f"--seed {arguments.seed} was given; accepted is 0 or more")
    config = WorldConfig(arguments.num_frames, arguments.height, arguments.width)
    _refuse_other_videos(Path(arguments.output), arguments)
    table: list[dict[str, object]] = []
    annotated = []
    with OutputFolder(arguments.output) as folder, progress_bar("videos") as report:
        for index in range(arguments.videos):
            (clip,) = generate([_SEEDS * arguments.seed + index], config)
            name = f"{index:04d}"
            queries = sample_queries(clip, arguments.points)
            _write(folder, name, clip, queries)
            prompts = {kind: describe(clip.scene, kind) for kind in PROMPT_KINDS}
            table.append({"name": name, "seed": clip.scene.seed, **prompts})
            if arguments.tapvid:
                annotated.append(as_tapvid(clip, queries, name))
            report(index + 1, arguments.videos)
        write_csv(folder / "prompts.csv", table)
        if arguments.tapvid:
            write_tapvid(folder / "world.pkl", annotated)
        # Another call may have finished its set in the meantime.
        _refuse_other_videos(Path(arguments.output), arguments)
    size = f"{config.frames} frames of {config.height} x {config.width}"
    print(f"{arguments.videos} videos of {size}: {arguments.output}")
    return 0


def _refuse_other_videos(output: Path, arguments: Namespace) -> None:
    """Raises ValueError where videos of an earlier call would be replaced by others, or stay beside the new ones and be
    read as one set."""
    from corrdit.runs import refuse_other_settings

    written = {f"{index:04d}.{ending}" for index in range(arguments.videos) for ending in ("npz", "mp4")}
    written |= {"world.pkl"} if arguments.tapvid else set()
    found = {path.name for pattern in ("*.npz", "[0-9]*.mp4", "world.pkl") for path in output.glob(pattern)}
    if other := sorted(found - written):
        raise ValueError(
            f"the output folder {output} holds {other[0]}, which this call would leave beside its own videos; give an "
            "empty folder or remove the old videos"
        )
    if found and (earlier := _earlier(output)):
        now = {"frames": arguments.num_frames, **named(arguments, "seed", "height", "width", "points")}
        refuse_other_settings(output, earlier, {name: value for name, value in now.items() if name in earlier})


def _earlier(output: Path) -> dict[str, object]:
    """What a finished set was made with, as far as its files say; damaged ones say nothing and are made again."""
    from corrdit.array_files import read_arrays

    found: dict[str, object] = {}
    with contextlib.suppress(FileNotFoundError), (output / "prompts.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if str(row.get("name")).isdecimal() and str(row.get("seed")).isdecimal():
                found["seed"] = (int(row["seed"]) - int(row["name"])) // _SEEDS
    with contextlib.suppress(FileNotFoundError, ValueError):
        arrays = read_arrays(output / "0000.npz", ("video", "queries"), what="a video of `corrdit world`")
        found |= dict(zip(("frames", "height", "width"), arrays["video"].shape, strict=False))
        found["points"] = len(arrays["queries"])
    return found


def _write(folder: Path, name: str, clip: Clip, queries: np.ndarray) -> None:
    from corrdit.array_files import write_arrays
    from corrdit.video import write_video

    truth = clip.tracks(queries)
    arrays: dict[str, np.ndarray] = {"video": clip.video, "xy": truth.xy, "visible": truth.visible, "queries": queries}
    if clip.config.frames > 1:
        flow = clip.flow()
        arrays |= {"flow": flow.displacement, "flow_visible": flow.visible}
    write_arrays(folder / f"{name}.npz", arrays)
    write_video(folder / f"{name}.mp4", clip.video, _FPS)
