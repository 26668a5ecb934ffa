"""Track points through a generated clip with the embedded model and compare with the clip's exact truth.

reads   nothing; the clip is made from --seed
writes  a table of errors to standard output: the tracker beside points that stand still and beside the nearest patch
        of pixels, over points that are visible and have moved by more than 8 pixels, and over all visible points;
        into the folder --output, all of them or none:
        clip.mp4    the clip (try `corrdit track` on it)
        truth.npz   its exact tracks: xy, visible, queries, as in tracks.npz
        tracks.npz, tracks.mp4, tracks.png  as `corrdit track` writes them

It takes less than a minute on two CPU cores.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.model_options import add_model_options, loaded_backbone
from corrdit.cli.terminal import print_table, progress_bar
from corrdit.files import OutputFolder

if TYPE_CHECKING:
    import numpy as np
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.embedded.world import Truth
    from corrdit.tracking import Tracks

HELP = "track points through a generated clip and compare with its exact truth"
USAGE = "--output DIR [--seed N] [--model embedded] [options]"
EXAMPLES = ("corrdit demo --output demo", "corrdit demo --output demo --seed 3 --points 24")
MAIN = ("help", "help_all", "output", "seed", "points", "model", "device")
_FPS = 10.0
_MOVED_PIXELS = 8.0
_THRESHOLDS = (2.0, 4.0, 8.0)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    parser.add_argument("--seed", type=int, default=9, help="of the clip")
    parser.add_argument("--points", type=int, default=16, metavar="N", help="N x N points on the first frame")
    add_model_options(parser, preset=False)


def run(arguments: Namespace) -> int:
    import numpy as np

    from corrdit.integrations.embedded.world import demo_clip
    from corrdit.tracking import PointTracker
    from corrdit.tracking.baselines import nearest_patches, standing_still
    from corrdit.tracking.queries import grid_points

    if arguments.points < 1:
        raise ValueError(f"--points {arguments.points} was given; accepted is a number of points a side of 1 or more")
    video, clip = demo_clip(arguments.seed)
    frames, height, width = video.shape[:3]
    queries = grid_points(arguments.points, height, width)
    truth = clip.tracks(queries)
    with OutputFolder(arguments.output) as folder:
        backbone = loaded_backbone(arguments)
        began = time.perf_counter()
        with progress_bar("tracking") as report:
            tracks = PointTracker(backbone).track(video, queries, progress=report)
        seconds = time.perf_counter() - began
        patches = nearest_patches(video, queries)
        _write(folder, video, queries, tracks, truth)
    moved = np.linalg.norm(truth.xy - queries[None, :, 1:], axis=-1) > _MOVED_PIXELS
    other_frames = np.arange(frames)[:, None] != queries[:, 0]
    guesses = {f"corrdit, {backbone.name}": tracks, "nearest patch of 7 x 7": patches}
    guesses["standing still"] = standing_still(queries, frames)
    print(f"{len(queries)} points through {frames} frames of {height} x {width}: tracked in {seconds:.1f} s")
    columns = ("", "median error", "mean error", *(f"found within {limit:g} px" for limit in _THRESHOLDS))
    for chosen, title in (
        (moved & truth.visible, f"Visible points that moved by more than {_MOVED_PIXELS:g} px"),
        (truth.visible & other_frames, "All visible points"),
    ):
        rows = [(name, *error_cells(guess, truth, chosen)) for name, guess in guesses.items()]
        print_table(columns, rows, title=f"{title} ({int(chosen.sum())} positions)")
    for name in ("tracks.mp4", "tracks.png", "tracks.npz", "clip.mp4", "truth.npz"):
        print(f"  {Path(arguments.output) / name}")
    return 0


def error_cells(tracks: Tracks, truth: Truth, chosen: np.ndarray) -> tuple[str, ...]:
    """Median and mean error in pixels and the share of positions within each threshold, as text."""
    import numpy as np

    if not chosen.any():
        return ("none",) * (2 + len(_THRESHOLDS))
    errors = np.linalg.norm(np.asarray(tracks.xy) - truth.xy, axis=-1)[chosen]
    within = [f"{100 * (errors <= limit).mean():.0f} %" for limit in _THRESHOLDS]
    return (f"{np.median(errors):.1f} px", f"{errors.mean():.1f} px", *within)


def _write(folder: Path, video: np.ndarray, queries: np.ndarray, tracks: Tracks, truth: Truth) -> None:
    import numpy as np
    import torch

    from corrdit.tracking import Tracks
    from corrdit.video import write_video
    from corrdit.visualization import write_track_pictures

    write_video(folder / "clip.mp4", video, _FPS)
    tracks.save(folder / "tracks.npz", queries=queries)
    exact = (truth.xy, truth.visible, np.ones(truth.visible.shape, dtype=np.float32))
    Tracks(*map(torch.as_tensor, exact)).save(folder / "truth.npz", queries=queries)
    write_track_pictures(
        video,
        tracks,
        video.shape[1:3],
        queries=queries,
        fps=_FPS,
        video_path=folder / "tracks.mp4",
        sheet_path=folder / "tracks.png",
    )
