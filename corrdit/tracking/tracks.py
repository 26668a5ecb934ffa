"""The result of tracking: where every point is in every frame, whether it is seen, and how sure that is.

And the stretching of tracks of latent frames over video frames, as DiffTrack's released code does it.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike

from corrdit.arguments import whole_number
from corrdit.array_files import read_arrays, write_arrays
from corrdit.files import write_csv
from corrdit.video.frames import VideoLike, as_frames
from corrdit.video.info import DEFAULT_FPS

if TYPE_CHECKING:
    from corrdit.visualization import TrackStyle

_DRAWN = (".mp4", ".mov", ".gif")
_OWN_NAMES = ("xy", "visible", "score", "queries", "hdr")


@dataclass(frozen=True, eq=False, repr=False)
class Tracks:
    """Positions of P points in the T frames of a video.

    Arrays are accepted as tensors, numpy arrays or nested lists and kept as detached CPU tensors.

    Args:
        xy: float32 `[T, P, 2]`, (x, y) in pixels with the origin at the frame's top left corner; the centre of the
            first pixel is (0.5, 0.5).
        visible: bool `[T, P]`.
        score: float32 `[T, P]`, confidence of each position, larger is surer; the unit is the tracker's own.

    Raises:
        ValueError: shapes that do not fit together, a `visible` that is not boolean, or numbers that are not finite.
    """

    xy: torch.Tensor
    visible: torch.Tensor
    score: torch.Tensor

    def __post_init__(self) -> None:
        xy = _tensor("xy", self.xy, torch.float32)
        if xy.ndim != 3 or xy.shape[2] != 2 or xy.shape[0] == 0:
            raise ValueError(f"Tracks xy must have shape [frames, points, 2] with at least one frame, got {_shape(xy)}")
        visible = _visibility(self.visible)
        score = _tensor("score", self.score, torch.float32)
        for name, value in (("visible", visible), ("score", score)):
            if value.shape != xy.shape[:2]:
                raise ValueError(
                    f"Tracks {name} must have shape [frames, points] = {_shape(xy[..., 0])} as xy has, "
                    f"got {_shape(value)}"
                )
        for name, value in (("xy", xy), ("score", score)):
            broken = int((~torch.isfinite(value)).sum())
            if broken:
                raise ValueError(f"Tracks {name} holds {broken} numbers that are NaN or infinite; all must be finite")
        for name, value in (("xy", xy), ("visible", visible), ("score", score)):
            object.__setattr__(self, name, value)

    @property
    def frames(self) -> int:
        """T, the number of video frames."""
        return self.xy.shape[0]

    @property
    def points(self) -> int:
        """P, the number of points."""
        return self.xy.shape[1]

    def numpy(self) -> dict[str, np.ndarray]:
        """The arrays by name: xy float32 `[T, P, 2]`, visible bool `[T, P]`, score float32 `[T, P]`."""
        return {"xy": self.xy.numpy(), "visible": self.visible.numpy(), "score": self.score.numpy()}

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        queries: object = None,
        columns: Mapping[str, ArrayLike] | None = None,
        hdr: str | None = None,
        video: VideoLike | None = None,
        fps: float | None = None,
        style: TrackStyle | None = None,
    ) -> None:
        """Write the tracks, beside and then renamed, as the file's ending says.

        - .npz: `xy`, `visible`, `score` and what is given of `queries`, `columns` and `hdr`; `load` reads it.
        - .csv: a row for each point and frame: frame, point, x, y, visible (0 or 1), score, then the columns.
        - .mp4, .mov, .gif: the tracks drawn over `video`.

        Args:
            path: the file.
            queries: float `[P, 3]` (frame, x, y) in pixels.
            columns: further facts of the points, such as labels, `[P]` each, by name.
            hdr: "PQ" or "HLG" of a video of high dynamic range (`VideoInfo.hdr`).
            video: that was tracked, in any form that `track` takes.
            fps: frames per second of the drawn video; those of its file, or 24.
            style: how it is drawn.

        Raises:
            ValueError: another ending, `queries` of another shape than `[P, 3]`, columns of another length or named as
                what is there already, a drawing without its video or with one of other frames.
            OSError: the folder is missing, cannot be written, or the disk is full; no part of the file is left.
        """
        suffix = Path(path).suffix.lower()
        further = {name: np.asarray(values) for name, values in (columns or {}).items()}
        for name, values in further.items():
            if values.shape != (self.points,) or name in (*_OWN_NAMES, "frame", "point", "x", "y"):
                raise ValueError(
                    f"column {name!r} has shape {list(values.shape)}; accepted is [points] = [{self.points}] under a "
                    "name that the file does not use itself"
                )
        if suffix == ".npz":
            write_arrays(path, {**self.numpy(), **self._given(queries, hdr), **further})
        elif suffix == ".csv":
            write_csv(path, self._rows(further))
        elif suffix in _DRAWN:
            if video is None:
                raise ValueError(f"{path} shows tracks over their video; give it as video=")
            self._write_drawn(path, video, fps, style)
        else:
            raise ValueError(f"{path} does not end in .npz, .csv, {', '.join(_DRAWN)}, as which tracks are written")

    def draw(self, video: VideoLike, *, style: TrackStyle | None = None) -> np.ndarray:
        """The frames of the video with the tracks on them, see `corrdit.visualization.draw_tracks`.

        Args:
            video: that was tracked, in any form that `track` takes.
            style: a `corrdit.visualization.TrackStyle`.

        Returns:
            uint8 `[T, h, w, 3]`, enlarged where the shorter side is under 240 pixels.

        Raises:
            ValueError: the video and the tracks have different numbers of frames.
        """
        from corrdit.visualization import draw_tracks

        frames = as_frames(video)
        return draw_tracks(np.asarray(frames[0 : len(frames)]), self, style=style)

    def __repr__(self) -> str:
        return f"Tracks({self.points} points through {self.frames} frames, {self._visible_share()} visible)"

    def _repr_html_(self) -> str:
        from corrdit.visualization.tracks_page import tracks_svg

        return f"<div>{tracks_svg(self.xy.numpy(), self.visible.numpy())}<br>{html.escape(repr(self))}</div>"

    def _visible_share(self) -> str:
        return f"{100 * float(self.visible.float().mean()):.0f} %" if self.points else "none"

    def _given(self, queries: object, hdr: str | None) -> dict[str, np.ndarray]:
        arrays = {}
        if queries is not None:
            table = _tensor("queries", queries, torch.float32)
            if table.shape != (self.points, 3):
                raise ValueError(f"queries must have shape [points, 3] = [{self.points}, 3], got {_shape(table)}")
            arrays["queries"] = table.numpy()
        if hdr is not None:
            arrays["hdr"] = np.array(hdr)
        return arrays

    def _rows(self, columns: Mapping[str, np.ndarray]) -> list[dict[str, object]]:
        """One for each point and frame, point by point."""
        return [
            {
                "frame": frame,
                "point": point,
                **{name: round(float(self.xy[frame, point, axis]), 3) for axis, name in enumerate(("x", "y"))},
                "visible": int(self.visible[frame, point]),
                "score": round(float(self.score[frame, point]), 6),
                **{name: values[point] for name, values in columns.items()},
            }
            for point in range(self.points)
            for frame in range(self.frames)
        ]

    def _write_drawn(
        self, path: str | os.PathLike[str], video: VideoLike, fps: float | None, style: TrackStyle | None
    ) -> None:
        from corrdit.video import VideoWriter
        from corrdit.visualization import iterate_drawn_tracks

        frames = as_frames(video)
        if len(frames) != self.frames:
            raise ValueError(f"the video has {len(frames)} frames, the tracks have {self.frames}; they must agree")
        known = getattr(video if hasattr(video, "fps") else getattr(frames, "info", None), "fps", DEFAULT_FPS)
        height, width = frames.shape[1:3]
        shown = (np.asarray(frames[index : index + 1])[0] for index in range(len(frames)))
        with VideoWriter(path, fps or known) as writer:
            for picture in iterate_drawn_tracks(shown, self, height, width, style=style):
                writer.write(picture)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tracks:
        """Read a file that `save` wrote; further arrays in it are left alone.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an .npz file, or one without xy, visible and score.
        """
        arrays = read_arrays(path, ("xy", "visible", "score"), what="a tracks file (.npz with xy, visible, score)")
        xy, score = (_tensor(name, arrays[name], torch.float32) for name in ("xy", "score"))
        return cls(xy, _visibility(arrays["visible"]), score)


def interpolate_tracks(tracks: torch.Tensor | np.ndarray, frames: int) -> torch.Tensor | np.ndarray:
    """Linear interpolation over time with pixel-centred ends (`align_corners=False`), as DiffTrack released it.

    Video frame t reads latent time (t + 0.5) * F / frames - 0.5, clamped to the first and the last latent frame. For
    13 latent frames and 49 video frames this puts video frame 0 at latent time -0.37: kept for parity only. A codec's
    own map of latent frames to video frames is right where one is known.

    Args:
        tracks: float `[B, F, P, 2]` (batch, latent frame, point, (x, y)).
        frames: number of video frames.

    Returns:
        `[B, frames, P, 2]`, of the kind (tensor or array) and the precision given.

    Raises:
        ValueError: another shape, no frames, or whole numbers in place of real ones.
    """
    frames = whole_number("frames", frames, 1)
    given = torch.as_tensor(tracks)
    if given.ndim != 4 or given.shape[-1] != 2 or given.shape[1] == 0:
        raise ValueError(
            "tracks must have shape [batch, latent frames, points, 2] with at least one latent frame, "
            f"got {list(given.shape)}"
        )
    if not given.is_floating_point():
        raise ValueError(f"tracks must be floating-point numbers, got {given.dtype}")
    latent_frames = given.shape[1]
    precision = torch.promote_types(given.dtype, torch.float32)
    time = (torch.arange(frames, device=given.device, dtype=precision) + 0.5) * (latent_frames / frames) - 0.5
    time = time.clamp(0, latent_frames - 1)
    before = time.floor().long().clamp(max=max(latent_frames - 2, 0))
    after = (before + 1).clamp(max=latent_frames - 1)
    share = (time - before)[None, :, None, None].to(given.dtype)
    stretched = given[:, before] * (1 - share) + given[:, after] * share
    return stretched.numpy() if isinstance(tracks, np.ndarray) else stretched


def _tensor(name: str, value: object, dtype: torch.dtype) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Tracks {name} must be an array of numbers, got {type(value).__name__}: {error}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"Tracks {name} must be real numbers, got {tensor.dtype}")
    return tensor.detach().to(device="cpu", dtype=dtype)


def _visibility(value: object) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    if tensor.dtype != torch.bool:
        raise ValueError(f"Tracks visible must be boolean, got {tensor.dtype}; compare with a threshold first")
    return tensor.detach().cpu()


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"
