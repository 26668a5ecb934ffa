"""Tracks that stand in for the truth where there is none: another tracker's, as DiffTrack takes CoTracker's.

A tracker is any callable `(video uint8 [T, H, W, 3], queries float [P, 3] (frame, x, y) in pixels) -> Tracks`.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from corrdit.arguments import choice
from corrdit.tracking.baselines import nearest_patches
from corrdit.tracking.queries import check_queries, check_video
from corrdit.tracking.tracks import Tracks

Tracker = Callable[[np.ndarray, np.ndarray], Tracks]
COTRACKER_REPOSITORY = "facebookresearch/co-tracker"
COTRACKER_MODEL = "cotracker3_offline"
COTRACKER_WEIGHTS = "scaled_offline.pth"
LARGEST_RETURN = 1.0
"""Pixels by which following a point there and back may miss its start for the point to count as seen."""


def starting_points(mode: str, height: int, width: int) -> np.ndarray:
    """DiffTrack's starting grid on the first frame.

    Args:
        mode: "object" (20 x 20) or "scene" (10 x 10), with a margin of width / 64.
        height, width: of the frame in pixels.

    Returns:
        float32 `[P, 3]`, (0, x, y), row by row.

    Raises:
        ValueError: an unknown mode.
    """
    choice("mode", mode, STARTING_GRIDS)
    side, margin = STARTING_GRIDS[mode], width / 64
    y, x = np.meshgrid(
        np.linspace(margin, height - margin, side), np.linspace(margin, width - margin, side), indexing="ij"
    )
    return np.stack((np.zeros_like(x), x, y), axis=-1).reshape(-1, 3).astype(np.float32)


def starting_grid_of(xy: np.ndarray, visible: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """The starting grid that tracks were begun from, as the tracks of DiffTrack's sets were.

    Their first positions are the tracker's and lie up to a pixel or two beside the grid, from which the released code
    starts.

    Args:
        xy: `[P, 2]` (x, y) in pixels, first positions.
        visible: bool `[P]`.
        height, width: of the frame in pixels.

    Returns:
        float32 `[P, 2]`, or None where the tracks were not begun from such a grid.
    """
    for mode, side in STARTING_GRIDS.items():
        if len(xy) == side**2:
            grid = starting_points(mode, height, width)[:, 1:]
            near = np.abs(xy - grid).max(-1) <= width / 180
            return grid if near[visible].all() else None
    return None


STARTING_GRIDS = {"object": 20, "scene": 10}
"""Points a side by the kind of video."""


def pseudo_tracker(name: str) -> Tracker:
    """A tracker by name.

    Args:
        name: "lucas-kanade" (OpenCV, pyramidal, forth and back), "cotracker" (through `torch.hub`) or "patches" (the
            patch of pixels that looks most alike; needs nothing, and knows nothing of visibility).

    Raises:
        ValueError: an unknown name.
        ImportError: OpenCV is not installed.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracker must be one of {', '.join(TRACKERS)}, or a function of one's own, got {name!r}")
    if name == "lucas-kanade":
        _require_opencv()
    return TRACKERS[name]


def lucas_kanade(video: np.ndarray, queries: np.ndarray) -> Tracks:
    """Pyramidal Lucas-Kanade from frame to frame, away from each query's frame in both directions.

    A point is visible as long as it is found, inside the frame, and following it back leads to where it came from
    within a pixel; once lost it stays where it was last seen.

    Args:
        video: uint8 `[T, H, W, 3]`.
        queries: `[P, 3]` (frame, x, y) in pixels.

    Raises:
        ImportError: OpenCV is not installed.
        ValueError: as `corrdit.PointTracker.track`.
    """
    _require_opencv()
    import cv2

    def followed(before: np.ndarray, after: np.ndarray, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _followed(cv2, _grey(cv2, before), _grey(cv2, after), xy)

    return _frame_to_frame(video, queries, followed)


def dis_flow(video: np.ndarray, queries: np.ndarray) -> Tracks:
    """OpenCV's dense inverse search (Kroeger et al., "Fast Optical Flow using Dense Inverse Search", 2016) from frame
    to frame, with the same rule of visibility as `lucas_kanade`.

    Args, raises: as `lucas_kanade`.
    """
    _require_opencv()
    import cv2

    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def followed(before: np.ndarray, after: np.ndarray, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = _grey(cv2, before), _grey(cv2, after)
        there = xy + _at(search.calc(first, second, None), xy)
        back = there + _at(search.calc(second, first, None), there)
        size = torch.tensor([before.shape[1], before.shape[0]])
        inside = ((there >= 0) & (there <= size)).all(-1)
        return there, ((back - xy).norm(dim=-1) <= LARGEST_RETURN) & inside

    return _frame_to_frame(video, queries, followed)


def _frame_to_frame(
    video: np.ndarray,
    queries: np.ndarray,
    followed: Callable[[np.ndarray, np.ndarray, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> Tracks:
    """Follow points away from their queries' frames; `followed` gives the places `[P, 2]` in a neighbouring frame and
    whether each was found there."""
    clip = check_video(video)
    frames, height, width = (int(size) for size in clip.shape[:3])
    table = check_queries(queries, frames, height, width)
    pixels = np.asarray(clip[:])
    anchor, points = table[:, 0].long(), torch.arange(len(table))
    xy = table[None, :, 1:].repeat(frames, 1, 1)
    visible = torch.zeros(frames, len(table), dtype=torch.bool)
    visible[anchor, points] = True
    for way in (1, -1):
        order = range(frames) if way > 0 else range(frames - 1, -1, -1)
        for frame in order:
            chosen = ((anchor - frame) * way <= 0).nonzero()[:, 0]
            following = frame + way
            if 0 <= following < frames and len(chosen):
                place, seen = followed(pixels[frame], pixels[following], xy[frame, chosen])
                seen &= visible[frame, chosen]
                xy[following, chosen] = torch.where(seen[:, None], place, xy[frame, chosen])
                visible[following, chosen] = seen
    return Tracks(xy=xy, visible=visible, score=visible.float())


def _grey(cv2: Any, frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)


def _at(flow: np.ndarray, xy: torch.Tensor) -> torch.Tensor:
    """Flow `[H, W, 2]` between pixel centres at places `[P, 2]`."""
    size = torch.tensor([flow.shape[1], flow.shape[0]])
    grid = (2 * xy / size - 1)[None, None]
    field = torch.from_numpy(flow).permute(2, 0, 1)[None]
    return F.grid_sample(field, grid, align_corners=False, padding_mode="border")[0, :, 0].T


def cotracker(video: np.ndarray, queries: np.ndarray) -> Tracks:
    """CoTracker 3, which `torch.hub` fetches on first use (a network is needed then).

    Args:
        video: uint8 `[T, H, W, 3]`.
        queries: `[P, 3]` (frame, x, y) in pixels.

    Raises:
        ImportError: it is neither in torch's cache nor to be fetched.
    """
    frames = check_video(video)
    table = check_queries(queries, *(int(size) for size in frames.shape[:3]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = torch.hub.load(COTRACKER_REPOSITORY, COTRACKER_MODEL, trust_repo=True, verbose=False).to(device)
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"CoTracker ({COTRACKER_REPOSITORY}) is not in torch's cache and cannot be fetched: {error}; run once with "
            f"a network, or take another tracker ({', '.join(sorted(set(TRACKERS) - {'cotracker'}))})"
        ) from error
    clip = torch.as_tensor(frames[:]).permute(0, 3, 1, 2)[None].float().to(device)
    with torch.no_grad():
        # CoTracker counts pixels by their centres.
        given = table.clone()
        given[:, 1:] -= 0.5
        tracks, visible = model(clip, queries=given[None].to(device))[:2]
    xy, seen = tracks[0].cpu().float() + 0.5, visible[0].cpu().bool()
    return Tracks(xy=xy, visible=seen, score=seen.float())


def cotracker_is_here() -> bool:
    """Whether torch's hub has CoTracker's code and weights on this machine, so that nothing needs a network."""
    hub = pathlib.Path(torch.hub.get_dir())
    code = any(hub.glob(f"{COTRACKER_REPOSITORY.replace('/', '_')}_*/hubconf.py"))
    return code and (hub / "checkpoints" / COTRACKER_WEIGHTS).is_file()


TRACKERS: dict[str, Tracker] = {"lucas-kanade": lucas_kanade, "cotracker": cotracker, "patches": nearest_patches}


def _followed(cv2: Any, before: np.ndarray, after: np.ndarray, xy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places `[P, 2]` in the frame after, and whether each point was found there and leads back."""
    options = {"winSize": (15, 15), "maxLevel": 3}
    # OpenCV's coordinates have the centre of the first pixel at (0, 0).
    start = np.ascontiguousarray(xy.numpy() - 0.5, dtype=np.float32).reshape(-1, 1, 2)
    there, found, _ = cv2.calcOpticalFlowPyrLK(before, after, start, None, **options)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(after, before, there, None, **options)
    near = np.linalg.norm(back - start, axis=-1)[:, 0] <= LARGEST_RETURN
    place = torch.from_numpy(there[:, 0] + 0.5)
    size = torch.tensor([before.shape[1], before.shape[0]])
    inside = ((place >= 0) & (place <= size)).all(-1)
    return place, torch.from_numpy((found[:, 0] == 1) & (returned[:, 0] == 1) & near) & inside


def _require_opencv() -> None:
    if importlib.util.find_spec("cv2") is None:
        raise ImportError(
            "this tracker needs OpenCV, which is not installed; pip install opencv-python-headless, or "
            f"take another tracker ({', '.join(sorted(set(TRACKERS) - {'lucas-kanade'}))})"
        )
