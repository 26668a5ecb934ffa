"""The maps of one video at one layer and step drawn: sheets for a report, and every frame as a film."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.counts import video_positions
from corrdit.analysis.html_report import Picture
from corrdit.files import OutputFolder, written_beside
from corrdit.integrations.diffusers.analysis.video_pictures import VideoPictures
from corrdit.tracking.tracks import Tracks
from corrdit.video import resize_frame, write_video
from corrdit.visualization.attention_maps import draw_attention_maps, draw_components
from corrdit.visualization.figures import png_bytes
from corrdit.visualization.sheet import contact_sheet, sheet_frames
from corrdit.visualization.tracks import TrackStyle, draw_tracks

SHOWN_FRAMES = 6
WIDTH = 200
FILM_WIDTH = 480
LATENTS_A_SECOND, FRAMES_A_SECOND = 4.0, 8.0
ATTENTION, TEXT, COMPONENTS, TRACKS = (
    "Attention maps of chosen points",
    "Attention of words on the video",
    "Principal components",
    "Tracks",
)
_POINT_GAIN = {"query-key": 0.5}
"""Powers that show what would be too faint; 3 for features, whose similarities are large everywhere."""
_WORD_GAIN = 0.7


class Drawn(NamedTuple):
    """A sheet of a report, and films of its rows.

    Attributes:
        name: of the files.
        picture: section, pixels and caption.
        films: pictures of every frame uint8 `[n, h, w, 3]` and their rate, by what they show.
    """

    name: str
    picture: Picture
    films: dict[str, tuple[np.ndarray, float]]


def drawn_pictures(found: VideoPictures, *, name: str, head: int | None, films: bool = False) -> list[Drawn]:
    """All pictures of one video at one layer and step.

    Args:
        found: of `video_pictures`.
        name: of the video.
        head: whose matches are drawn as tracks; None for the mean over heads.
        films: whether every frame is drawn too.
    """
    painter = _Painter(found, name, films)
    return [*painter.attention(), *painter.text(), *painter.components(), *painter.tracks(head)]


def write_pictures(folder: str | os.PathLike[str], drawn: Sequence[Drawn]) -> list[Path]:
    """Write `NAME.png` and a film `NAME_KIND.mp4` (`NAME.mp4` where there is one kind) of each, all or none.

    Args:
        folder: of these pictures alone; what it held before goes.
        drawn: what to write.

    Returns:
        The files.
    """
    names = []
    with OutputFolder(folder, whole=True) as hidden:
        for name, (_, pixels, _), films in drawn:
            names.append(f"{name}.png")
            with written_beside(hidden / names[-1]) as file:
                file.write(png_bytes(pixels))
            for kind, (frames, rate) in films.items():
                names.append(f"{name}_{_plain(kind)}.mp4" if len(films) > 1 else f"{name}.mp4")
                write_video(hidden / names[-1], frames, rate)
    return [Path(folder) / name for name in names]


class _Painter:
    def __init__(self, found: VideoPictures, name: str, films: bool) -> None:
        self.found, self.films = found, films
        self.place = f"video {name}, layer {found.layer}, timestep {found.timestep:g}"
        groups = found.encoded.truth.frame_map
        # A latent frame is shown as the middle one of the video frames it stands for.
        self.middles = [group[len(group) // 2] for group in groups]
        self.latents = sheet_frames(len(groups), SHOWN_FRAMES)
        self.frame_numbers = [self.middles[latent] for latent in self.latents]
        self.frames = found.encoded.frames[self.frame_numbers]
        height, width = self.frames.shape[1:3]
        self.size = (max(1, round(WIDTH * height / width)), WIDTH)
        self.film_size = (max(1, round(FILM_WIDTH * height / width)), FILM_WIDTH)
        self.labels = [f"frame {number}" for number in self.frame_numbers]

    def attention(self) -> list[Drawn]:
        """A sheet for each chosen point: queries and keys, then each feature."""
        maps: dict[str, Tensor] = {"query-key": self.found.attention.rows}
        maps |= {feature: drawn.rows for feature, drawn in self.found.features.items()}
        pictures = []
        for number, marks in enumerate(self.found.marks.transpose(1, 0, 2), start=1):
            caption = (
                f"Where point {number} (ring in the first frame) is matched; its true place is a cross where it is "
                "known and visible. Each frame is scaled by itself."
            )
            rows = {kind: values[number - 1].numpy() for kind, values in maps.items()}
            gains = {kind: _POINT_GAIN.get(kind, 3.0) for kind in maps}
            pictures.append(self._maps(f"attention_point{number}", ATTENTION, rows, gains, caption, marks))
        return pictures

    def text(self) -> list[Drawn]:
        """One sheet, a row a word; nothing without words."""
        rows = dict(zip(self.found.words, self.found.text.numpy(), strict=True))
        caption = (
            "How much each place attends to words of the prompt: a softmax over the prompt's tokens, padding included "
            "where the model attends to it, mean over heads. Each frame is scaled by itself."
        )
        return [self._maps("words", TEXT, rows, dict.fromkeys(rows, _WORD_GAIN), caption)] if rows else []

    def components(self) -> list[Drawn]:
        """One sheet: frames, queries, keys, features."""
        values = {"queries": self.found.attention.queries, "keys": self.found.attention.keys}
        values |= {name: picture.components for name, picture in self.found.features.items()}
        rows = {"video": [resize_frame(frame, *self.size) for frame in self.frames]}
        rows |= {kind: draw_components(maps.numpy()[self.latents], self.size) for kind, maps in values.items()}
        caption = (
            "First three principal components over all tokens of the video as red, green and blue; the same colour in "
            "two frames means similar tokens."
        )
        films = {}
        if self.films:
            drawn = {kind: draw_components(maps.numpy(), self.film_size) for kind, maps in values.items()}
            films = {kind: (np.stack(frames), LATENTS_A_SECOND) for kind, frames in drawn.items()}
        return [Drawn("components", self._sheet(COMPONENTS, rows, caption), films)]

    def tracks(self, head: int | None) -> list[Drawn]:
        """Two sheets: matches of the reading, and the truth."""
        encoded = self.found.encoded
        truth, scale = encoded.truth, torch.tensor(encoded.scale)
        positions = self.found.reading.positions[0 if head is None else 1 + head]
        matched = torch.cat([truth.queries[None], positions])
        everywhere = video_positions(matched[None], truth, "codec")[0]
        pictures = []
        for name, sheet, film, words in (
            ("matches", matched[self.latents], everywhere, "Matches from the first frame"),
            ("truth", truth.xy[self.frame_numbers], truth.xy, "True places"),
        ):
            caption = f"{self.place}. {words} of the points; rings where a point is truly hidden."
            drawn = self._tracks(sheet / scale, self.frame_numbers, self.size[1] * 3 // 2, trail=0)
            pixels = contact_sheet(list(drawn), self.labels, columns=min(3, len(self.labels)))
            films = {}
            if self.films:
                whole = self._tracks(film / scale, list(range(len(truth.xy))), FILM_WIDTH, trail=15)
                films = {name: (whole, FRAMES_A_SECOND)}
            pictures.append(Drawn(name, (TRACKS, pixels, caption), films))
        return pictures

    def _tracks(self, xy: Tensor, frames: list[int], width: int, *, trail: int) -> np.ndarray:
        encoded = self.found.encoded
        visible, video = encoded.truth.visible[frames], encoded.frames[frames]
        starts = (encoded.truth.queries / torch.tensor(encoded.scale)).numpy()
        size = (max(1, round(width * video.shape[1] / video.shape[2])), width)
        tracks = Tracks(xy=xy, visible=visible, score=visible.float())
        return draw_tracks(video, tracks, starts=starts, size=size, style=TrackStyle(trail=trail))

    def _maps(
        self,
        name: str,
        section: str,
        rows: Mapping[str, np.ndarray],
        gains: Mapping[str, float],
        caption: str,
        marks: np.ndarray | None = None,
    ) -> Drawn:
        """Maps `[F, h, w]` of several kinds over the frames; marks `[T, 2]` are the place of the asking point."""

        def over(latents: Sequence[int], numbers: list[int], size: tuple[int, int], kind: str) -> list[np.ndarray]:
            drawing: dict[str, Any] = {"gain": gains[kind], "size": size}
            if marks is not None:
                drawing |= {"query": marks[0], "truth": marks[numbers]}
                drawing["truth"][0] = np.nan  # the ring stands there
            return draw_attention_maps(self.found.encoded.frames[numbers], rows[kind][list(latents)], **drawing)

        sheet = {kind: over(self.latents, self.frame_numbers, self.size, kind) for kind in rows}
        films = {}
        if self.films:
            every = range(len(self.middles))
            films = {kind: np.stack(over(every, self.middles, self.film_size, kind)) for kind in rows}
        picture = self._sheet(section, sheet, caption)
        return Drawn(name, picture, {kind: (frames, LATENTS_A_SECOND) for kind, frames in films.items()})

    def _sheet(self, section: str, rows: Mapping[str, Sequence[np.ndarray]], caption: str) -> Picture:
        """One row of frames for each kind."""
        pictures = [picture for row in rows.values() for picture in row]
        labels = [f"{kind}, {label}" for kind in rows for label in self.labels]
        return (section, contact_sheet(pictures, labels, columns=len(self.labels)), f"{self.place}. {caption}")


def _plain(words: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[^\w-]+", "_", words).strip("_")[:60] or "word"
