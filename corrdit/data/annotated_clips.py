"""Real videos with annotated motion: joints of animals (BADJA) and true optical flow between two pictures (KITTI).

Biggs et al., "Creatures Great and SMAL: Recovering the Shape and Motion of Animals from Video" (2018): `NAME.json`
beside `NAME.mp4`, a list with an entry for each annotated frame: `image_path`, whose stem is the frame's number,
`joints` `[J, 2]` as (row, column) in pixels of full resolution, 1080 x 1920, and `visibility` `[J]`. Where
`segmentation_path` names a picture of the animal's mask (its last parts, below the folder), PCK has a reach: any size
with the sides of full resolution or of the video's frames, black outside of the animal.

Menze and Geiger, "Object Scene Flow for Autonomous Vehicles" (2015): `NAME_frame1.png`, `NAME_frame2.png` and
`NAME_flow_gt.png` of 16 bits: (value - 2^15) / 64 pixels to the right and down, and whether the flow is known.

Frames are shrunk to 256 x 256, the size for which TAP-Vid's figures are given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corrdit.data.tapvid import METRIC_SIZE, TapVidVideo

FULL_SIZE = (1080, 1920)
"""Height and width in which joints are given."""
PCK_SHARE = 0.2
FLOW_STEP = 16
"""Pixels between the points whose flow is followed, in both directions."""
_FLOW_ENDING = "_flow_gt.png"
_SAME_SIDES = 0.02
"""Largest logarithm of the ratio of a mask's sides to those of the frames."""


def annotated_files(folder: Path) -> list[str]:
    """Names of the annotations in a folder: joints (`NAME.json` beside `NAME.mp4`) and flow (`NAME_flow_gt.png`).

    Joints without a video are among them, so that reading them says what is missing; other .json files are not.

    Raises:
        ValueError: two clips of one name.
    """
    joints = [file.name for file in folder.glob("*.json") if file.with_suffix(".mp4").is_file() or _holds_joints(file)]
    files = sorted([*joints, *(file.name for file in folder.glob(f"*{_FLOW_ENDING}"))])
    by_name: dict[str, str] = {}
    for file in files:
        other = by_name.setdefault(annotated_name(file), file)
        if other != file:
            raise ValueError(
                f"{folder} holds two clips called {annotated_name(file)!r}: {other} and {file}; rename the files of one"
            )
    return files


def _holds_joints(file: Path) -> bool:
    """Whether a .json file begins as a list of annotated joints."""
    with open(file, "rb") as opened:
        return opened.read(1).strip() == b"[" and b'"joints"' in opened.read()


def annotated_name(file: str) -> str:
    """The name of the clip of an annotation."""
    return file.removesuffix(_FLOW_ENDING).removesuffix(".json")


def clip_files(annotation: Path) -> list[Path]:
    """The annotation, the files that hold its frames, and those of its masks."""
    name = annotated_name(annotation.name)
    if annotation.suffix == ".json":
        masks = (_mask_file(annotation, entry.mask) for entry in _entries(annotation))
        return [annotation, annotation.with_suffix(".mp4"), *filter(None, masks)]
    return [annotation, *(annotation.with_name(f"{name}_frame{number}.png") for number in (1, 2))]


def annotated_clip(annotation: Path) -> TapVidVideo:
    """The video and the tracks of an annotation, frames of 256 x 256.

    Frames without annotation are not scored.

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
    joints = len(entries[0].joints)
    points = np.full((joints, len(video), 2), np.nan)
    occluded = np.ones((joints, len(video)), dtype=bool)
    reach = np.full((len(video), 2), np.nan)
    annotated = np.zeros(len(video), dtype=bool)
    for number, places, visible, mask in entries:
        if not 0 <= number < len(video) or len(places) != joints:
            raise ValueError(
                f"{annotation}: frame {number} with {len(places)} joints does not fit a video of {len(video)} frames "
                f"and {joints} joints"
            )
        if annotated[number]:
            raise ValueError(f"{annotation}: frame {number} is annotated twice; give one entry for each frame")
        points[:, number] = places[:, ::-1] / np.array(FULL_SIZE[::-1])
        occluded[:, number] = ~visible
        annotated[number] = True
        if (file := _mask_file(annotation, mask)) is not None:
            reach[number] = _reach(file, frames.shape[1:3])
    known = None if np.isnan(reach).all() else reach
    points = np.where(occluded[..., None], np.nan, points)
    return TapVidVideo(annotation.stem, video, points, occluded, known, None if annotated.all() else annotated)


class _Entry(NamedTuple):
    """Frame number, joints [J, 2] (row, column), visibility [J] and path of the mask of an annotated frame."""

    number: int
    joints: np.ndarray
    visible: np.ndarray
    mask: str | None


def _entries(annotation: Path) -> list[_Entry]:
    try:
        listed = json.loads(annotation.read_text(encoding="utf-8"))
        found = []
        for entry in listed:
            places = np.asarray(entry["joints"], dtype=np.float64).reshape(-1, 2)
            visible = np.asarray(entry["visibility"])
            if visible.shape != places.shape[:1] or visible.dtype.kind not in "biuf" or (visible % 1).any():
                raise ValueError(
                    f"visibility {entry['visibility']} of {len(places)} joints; give true or false of each"
                )
            mask = entry.get("segmentation_path")
            found.append(_Entry(int(Path(entry["image_path"]).stem), places, visible.astype(bool), mask))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{annotation} is no list of annotated joints (image_path, joints [J, 2], visibility [J]): {error!r}"
        ) from error
    if not found:
        raise ValueError(f"{annotation} holds no annotated frame")
    return found


def _mask_file(annotation: Path, mask: str | None) -> Path | None:
    """The picture whose path below the annotation's folder ends as `mask` does; None where there is none."""
    parts = Path(mask).parts if mask else ()
    files = (annotation.parent.joinpath(*parts[start:]) for start in range(len(parts)))
    return next((file for file in files if file.is_file()), None)


def _reach(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """PCK's distance, .2 sqrt(area of the mask), as shares of the frame's width and height; NaN for an empty mask."""
    import imageio.v3 as imageio

    try:
        picture = np.asarray(imageio.imread(file, plugin="pillow"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"the mask {file} cannot be read as a picture: {error}") from error
    inside = picture.reshape(*picture.shape[:2], -1)[..., :3].any(axis=-1)
    sides = inside.shape[1] / inside.shape[0]
    if not any(abs(np.log(sides * height / width)) < _SAME_SIDES for height, width in (FULL_SIZE, size)):
        raise ValueError(
            f"the mask {file} is of {inside.shape[0]} x {inside.shape[1]}; its sides must be to each other as those of "
            f"{FULL_SIZE[0]} x {FULL_SIZE[1]} or of the video's frames, {size[0]} x {size[1]}"
        )
    return PCK_SHARE * np.sqrt(inside.sum()) / np.array(inside.shape[::-1]) if inside.any() else np.full(2, np.nan)


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
