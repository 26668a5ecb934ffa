"""Pictures of one video for the report, from its maps."""

from __future__ import annotations

import numpy as np

from corrdit.analysis.html_report import Picture
from corrdit.analysis.options import FEATURE_READINGS
from corrdit.integrations.diffusers.analysis.picturing import VideoPictures
from corrdit.tracking.tracks import Tracks
from corrdit.video import resize_frame
from corrdit.visualization.attention_maps import draw_attention_maps, draw_components
from corrdit.visualization.sheet import contact_sheet
from corrdit.visualization.tracks import TrackStyle, draw_tracks

SHOWN_FRAMES = 6
WIDTH = 200
ATTENTION, TEXT, COMPONENTS, TRACKS = (
    "Attention maps of chosen points",
    "Attention of words on the video",
    "Principal components",
    "Tracks",
)


def drawn_pictures(found: VideoPictures, *, name: str, head: int | None, where: str) -> list[Picture]:
    """All pictures of one video.

    Args:
        found: of `video_pictures`.
        name: of the video.
        head: whose matches are drawn as tracks; None for the mean over heads.
        where: the layer and timestep, in words.

    Returns:
        (section, pixels, caption) of each.
    """
    painter = _Painter(found, name, where)
    return [*painter.attention(), *painter.text(), *painter.components(), *painter.tracks(head)]


class _Painter:
    def __init__(self, found: VideoPictures, name: str, where: str) -> None:
        self.found, self.place = found, f"video {name}, {where}"
        groups = found.encoded.truth.frame_map
        count = len(groups)
        self.latents = sorted({round(place) for place in np.linspace(0, count - 1, min(count, SHOWN_FRAMES))})
        # A latent frame is shown as the middle one of the video frames it stands for.
        self.frame_numbers = [groups[latent][len(groups[latent]) // 2] for latent in self.latents]
        self.frames = found.encoded.frames[self.frame_numbers]
        height, width = self.frames.shape[1:3]
        self.size = (max(1, round(WIDTH * height / width)), WIDTH)
        self.labels = [f"frame {number}" for number in self.frame_numbers]
        truth = found.encoded.truth
        scale = np.array(found.encoded.scale)
        xy = truth.xy.numpy() / scale
        self.truth = np.where(truth.visible.numpy()[..., None], xy, np.nan)[self.frame_numbers]

    def attention(self) -> list[Picture]:
        """A sheet for each chosen point: queries and keys, then each feature."""
        pictures: list[Picture] = []
        for number, point in enumerate(self.found.points.tolist()):
            rows, labels = [], []
            maps = {"query-key": (self.found.attention.rows, 0.5)}
            maps |= {feature: (drawn.rows, 3.0) for feature, drawn in self.found.features.items()}
            for kind, (values, gain) in maps.items():
                rows += self._over_frames(values[number].numpy(), point, gain)
                labels += [f"{kind}, {label}" for label in self.labels]
            caption = (
                f"{self.place}. Where point {number + 1} (ring in the first frame) is matched; its true place is a "
                "cross where it is visible. Each frame is scaled by itself."
            )
            pictures.append((ATTENTION, contact_sheet(rows, labels, columns=len(self.labels)), caption))
        return pictures

    def text(self) -> list[Picture]:
        """One sheet, a row a word; nothing without words."""
        words = self.found.words
        if not words:
            return []
        rows, labels = [], []
        for word, maps in zip(words, self.found.attention.text.numpy(), strict=True):
            rows += draw_attention_maps(self.frames, maps[self.latents], size=self.size, gain=0.7)
            labels += [f"{word}, {label}" for label in self.labels]
        caption = (
            f"{self.place}. What the longest words of the prompt attend to in the video (softmax over all tokens)."
        )
        return [(TEXT, contact_sheet(rows, labels, columns=len(self.labels)), caption)]

    def components(self) -> list[Picture]:
        """One sheet: frames, queries, keys, features."""
        rows = [resize_frame(frame, *self.size) for frame in self.frames]
        labels = [f"video, {label}" for label in self.labels]
        values = {"queries": self.found.attention.queries, "keys": self.found.attention.keys}
        values |= {
            name: self.found.features[name].components for name in FEATURE_READINGS if name in self.found.features
        }
        for kind, components in values.items():
            rows += draw_components(components.numpy()[self.latents], self.size)
            labels += [f"{kind}, {label}" for label in self.labels]
        caption = (
            f"{self.place}. First three principal components over all tokens of the video as red, green and blue; the "
            "same colour in two frames means similar tokens."
        )
        return [(COMPONENTS, contact_sheet(rows, labels, columns=len(self.labels)), caption)]

    def tracks(self, head: int | None) -> list[Picture]:
        """Two sheets: matches of the reading, and the truth."""
        encoded = self.found.encoded
        positions = self.found.reading.positions[0 if head is None else 1 + head]
        visible = encoded.truth.visible[self.frame_numbers]
        found = np.concatenate([encoded.truth.queries[None], positions])[self.latents] / np.array(encoded.scale)
        true = encoded.truth.xy.numpy()[self.frame_numbers] / np.array(encoded.scale)
        pictures: list[Picture] = []
        size = (self.size[0] * 3 // 2, self.size[1] * 3 // 2)
        for xy, words in ((found, "Matches from the first frame"), (true, "True places")):
            tracks = Tracks(xy=xy, visible=visible, score=visible.float())
            drawn = draw_tracks(self.frames, tracks, starts=true[0], size=size, style=TrackStyle(trail=0))
            caption = f"{self.place}. {words} of the points; rings where a point is truly hidden."
            pictures.append((TRACKS, contact_sheet(drawn, self.labels, columns=min(3, len(self.labels))), caption))
        return pictures

    def _over_frames(self, maps: np.ndarray, point: int, gain: float) -> list[np.ndarray]:
        return draw_attention_maps(
            self.frames, maps[self.latents], size=self.size, query=self.truth[0, point], truth=self.truth[:, point],
            gain=gain,
        )  # fmt: skip
