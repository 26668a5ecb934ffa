"""Real videos with annotated motion: joints of animals (BADJA) and true optical flow between two pictures (KITTI).

Biggs et al., "Creatures Great and SMAL: Recovering the Shape and Motion of Animals from Video" (2018): `NAME.json`
beside `NAME.mp4`, a list with an entry for each annotated frame: `image_path`, whose stem is the frame's number,
`joints` `[J, 2]` as (row, column) in pixels of full resolution, 1080 x 1920, and `visibility` `[J]`. Where
`segmentation_path` names a picture of the animal's mask (its last parts, below the folder), PCK has a reach.

Menze and Geiger, "Object Scene Flow for Autonomous Vehicles" (2015): `NAME_frame1.png`, `NAME_frame2.png` and
`NAME_flow_gt.png` of 16 bits: (value - 2^15) / 64 pixels to the right and down, and whether the flow is known.

Frames are shrunk to 256 x 256, the size for which TAP-Vid's figures are given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from corrdit.data.tapvid import METRIC_SIZE, TapVidVideo

FULL_SIZE = (1080, 1920)
"""Height and width in which joints are given."""
PCK_SHARE = 0.2
FLOW_STEP = 16
"""Pixels between the points whose flow is followed, in both directions."""
_FLOW_ENDING = "_flow_gt.png"


def annotated_files(folder: Path) -> list[str]:
    """Names of the annotations in a folder: joints (`NAME.json` beside `NAME.mp4`) and flow (`NAME_flow_gt.png`)."""
    joints = [file.name for file in folder.glob("*.json") if file.with_suffix(".mp4").is_file()]
    return sorted([*joints, *(file.name for file in folder.glob(f"*{_FLOW_ENDING}"))])


def annotated_name(file: str) -> str:
    """The name of the clip of an annotation."""
    return file.removesuffix(_FLOW_ENDING).removesuffix(".json")


def clip_files(annotation: Path) -> list[Path]:
    """The annotation and the files that hold its frames."""
    name = annotated_name(annotation.name)
    if annotation.suffix == ".json":
        return [annotation, annotation.with_suffix(".mp4")]
    return [annotation, *(annotation.with_name(f"{name}_frame{number}.png") for number in (1, 2))]


def annotated_clip(annotation: Path) -> TapVidVideo:
    """The video and the tracks of an annotation, frames of 256 x 256.

    A joint is called hidden in frames without annotation, which are not scored.

    Raises:
        ValueError: files that are not as this module says.
        OSError: files that are missing.
    """
    return _joints_clip(annotation) if annotation.suffix == ".json" else _flow_clip(annotation)


def _joints_clip(annotation: Path) -> TapVidVideo:
    from corrdit.video import read_video
    from corrdit.video.reading import resize_frame

    entries = _entries(annotation)
    frames = read_video(annotation.with_suffix(".mp4")).frames
    video = np.stack([resize_frame(frame, METRIC_SIZE, METRIC_SIZE) for frame in frames])
    joints = len(entries[0][1])
    points = np.full((joints, len(video), 2), np.nan)
    occluded = np.ones((joints, len(video)), dtype=bool)
    reach = np.full((len(video), 2), np.nan)
    for number, places, visible, mask in entries:
        if not 0 <= number < len(video) or len(places) != joints:
            raise ValueError(
                f"{annotation}: frame {number} with {len(places)} joints does not fit a video of {len(video)} frames "
                f"and {joints} joints"
            )
        points[:, number] = places[:, ::-1] / np.array(FULL_SIZE[::-1])
        occluded[:, number] = ~visible
        reach[number] = _reach(annotation, mask)
    known = None if np.isnan(reach).all() else reach
    return TapVidVideo(annotation.stem, video, np.where(occluded[..., None], np.nan, points), occluded, known)


def _entries(annotation: Path) -> list[tuple[int, np.ndarray, np.ndarray, str | None]]:
    """Frame number, joints [J, 2] (row, column), visibility [J] and mask of every annotated frame."""
    try:
        listed = json.loads(annotation.read_text(encoding="utf-8"))
        found = []
        for entry in listed:
            places = np.asarray(entry["joints"], dtype=np.float64).reshape(-1, 2)
            visible = np.asarray(entry["visibility"]).astype(bool)
            if visible.shape != places.shape[:1]:
                raise ValueError(f"visibility {visible.shape} of {len(places)} joints")
            found.append((int(Path(entry["image_path"]).stem), places, visible, entry.get("segmentation_path")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{annotation} is no list of annotated joints (image_path, joints [J, 2], visibility [J]): {error!r}"
        ) from error
    if not found:
        raise ValueError(f"{annotation} holds no annotated frame")
    return found


def _reach(annotation: Path, mask: str | None) -> np.ndarray:
    """PCK's distance, .2 sqrt(area of the mask), as shares of the frame's width and height; NaN without a mask."""
    import imageio.v3 as imageio

    parts = Path(mask).parts if mask else ()
    for start in range(len(parts)):
        file = annotation.parent.joinpath(*parts[start:])
        if file.is_file():
            picture = np.asarray(imageio.imread(file))
            inside = picture.reshape(*picture.shape[:2], -1)[..., :3].any(axis=-1)
            return PCK_SHARE * np.sqrt(inside.sum()) / np.array(inside.shape[::-1])
    return np.full(2, np.nan)


def _flow_clip(annotation: Path) -> TapVidVideo:
    import imageio.v3 as imageio

    from corrdit.video.reading import resize_frame

    _, first, second = clip_files(annotation)
    frames = [np.asarray(imageio.imread(file, plugin="pillow", mode="RGB")) for file in (first, second)]
    flow, known = _read_flow(annotation)
    height, width = known.shape
    if any(frame.shape[:2] != (height, width) for frame in frames):
        raise ValueError(f"{annotation} is of {height} x {width} and its pictures of {frames[0].shape[:2]}")
    rows, columns = np.nonzero(known[FLOW_STEP // 2 :: FLOW_STEP, FLOW_STEP // 2 :: FLOW_STEP])
    rows, columns = (FLOW_STEP * place + FLOW_STEP // 2 for place in (rows, columns))
    start = np.stack([columns, rows], axis=-1) + 0.5
    points = np.stack([start, start + flow[rows, columns]], axis=1) / np.array([width, height])
    hidden = ((points < 0) | (points > 1)).any(axis=-1)
    video = np.stack([resize_frame(frame, METRIC_SIZE, METRIC_SIZE) for frame in frames])
    return TapVidVideo(annotated_name(annotation.name), video, points, hidden)


def _read_flow(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Flow float64 [H, W, 2] in pixels to the right and down, and bool [H, W] where it is known."""
    import av

    try:
        with av.open(str(file)) as container:
            picture: Any = next(container.decode(video=0))
    except (av.FFmpegError, StopIteration, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    if "48" not in picture.format.name:
        raise ValueError(f"{file} must be a PNG of three channels of 16 bits, got {picture.format.name}")
    values = picture.reformat(format="rgb48le").to_ndarray().astype(np.float64)
    return (values[..., :2] - 2**15) / 64, values[..., 2] > 0
