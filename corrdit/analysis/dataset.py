"""DiffTrack's data set of generated videos: prompts, videos, pseudo-tracks and visibility in one folder.

```
prompt.txt              one prompt a line; line n belongs to video n
videos/000.mp4          not in the released sets, whose videos are generated again
image/000.png           for image-to-video models
tracks/000.npy          [1, T, P, 2], (x, y) in pixels
visibility/000.npy      [1, T, P]
```

Some numbers may be missing (one of the published sets has 46 videos of 50).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corrdit.array_files import read_array
from corrdit.files import written_beside
from corrdit.tracking.tracks import Tracks
from corrdit.video import write_video

PROMPTS_FILE = "prompt.txt"
_PROMPTS_FILES = (PROMPTS_FILE, "prompts.txt")
"""The released name, and that of sets written by earlier versions."""
_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class DiffTrackEntry:
    """One video of the set.

    Args:
        number: of the video, and of its prompt's line.
        name: "000" and so on, as the files are named.
        prompt: empty where there is no list of prompts.
        video: the file, which need not exist: the published sets come without.
        tracks, visibility: files.
        image: the first frame for an image-to-video model; None where there is none.
    """

    number: int
    name: str
    prompt: str
    video: Path
    tracks: Path
    visibility: Path
    image: Path | None = None

    def load_tracks(self) -> tuple[np.ndarray, np.ndarray]:
        """xy float32 `[T, P, 2]` and visible bool `[T, P]`.

        Raises:
            ValueError: files that are damaged or of other shapes.
        """
        xy, visible = read_array(self.tracks), read_array(self.visibility)
        if xy.ndim != 4 or xy.shape[0] != 1 or xy.shape[3] != 2 or visible.shape != xy.shape[:3]:
            raise ValueError(
                f"{self.tracks} must be [1, frames, points, 2] and {self.visibility} [1, frames, points], got "
                f"{list(xy.shape)} and {list(visible.shape)}"
            )
        if xy.dtype.kind not in "fiu" or visible.dtype.kind not in "bfiu":
            raise ValueError(f"{self.tracks} and {self.visibility} must hold numbers, got {xy.dtype}, {visible.dtype}")
        return xy[0].astype(np.float32), visible[0] > 0.5


def read_difftrack(folder: str | os.PathLike[str]) -> list[DiffTrackEntry]:
    """The videos of a set that have tracks, in order of their numbers.

    Raises:
        ValueError: no such folder, no tracks in it, tracks without visibility, or fewer prompts than videos.
    """
    root = Path(folder)
    tracks = sorted(file for file in (root / "tracks").glob("*.npy") if _NUMBER.fullmatch(file.stem))
    if not tracks:
        raise ValueError(f"{folder} holds no tracks/NNN.npy; give a folder in the layout of DiffTrack's data set")
    list_file, prompts = _prompts(root)
    entries = []
    for file in tracks:
        number = int(file.stem)
        visibility = root / "visibility" / file.name
        if not visibility.is_file():
            raise ValueError(f"{visibility} is missing; every file of tracks needs one of visibility")
        if prompts and number >= len(prompts):
            raise ValueError(f"{list_file} has {len(prompts)} prompts, but there is a video {file.stem}")
        prompt = prompts[number] if prompts else ""
        video = root / "videos" / f"{file.stem}.mp4"
        image = root / "image" / f"{file.stem}.png"
        entries.append(
            DiffTrackEntry(number, file.stem, prompt, video, file, visibility, image if image.is_file() else None)
        )
    return entries


def set_prompts(folder: str | os.PathLike[str]) -> list[str]:
    """The prompts of a set; line n belongs to video n. Empty where there is no list of them."""
    return _prompts(Path(folder))[1]


def _prompts(root: Path) -> tuple[Path, list[str]]:
    """The list and what it holds, empty without one."""
    file = next((root / name for name in _PROMPTS_FILES if (root / name).is_file()), root / PROMPTS_FILE)
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return file, [line.strip() for line in lines]


def write_difftrack_video(
    folder: str | os.PathLike[str], number: int, video: np.ndarray, tracks: Tracks, *, fps: float = 8.0
) -> list[Path]:
    """Add one video with its tracks to a set; tracks come last, so that what has tracks is whole.

    Args:
        folder: of the set, made if need be.
        number: of the video.
        video: uint8 `[T, H, W, 3]`.
        tracks: of its points, in pixels.
        fps: frames per second of the file.

    Returns:
        The files.

    Raises:
        ValueError: tracks of another number of frames.
    """
    if tracks.frames != len(video):
        raise ValueError(f"the video has {len(video)} frames, its tracks have {tracks.frames}; they must agree")
    root = Path(folder)
    for name in ("videos", "visibility", "tracks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    files = [root / "videos" / f"{number:03}.mp4"]
    write_video(files[0], video, fps)
    for name, values in (("visibility", tracks.visible), ("tracks", tracks.xy)):
        files.append(root / name / f"{number:03}.npy")
        with written_beside(files[-1]) as file:
            np.save(file, values[None].numpy())
    return files


def write_prompts(folder: str | os.PathLike[str], prompts: list[str]) -> None:
    """Write the list of prompts of a set; line n belongs to video n."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with written_beside(Path(folder) / PROMPTS_FILE, "w") as file:
        file.writelines(" ".join(prompt.split()) + "\n" for prompt in prompts)
