"""Pictures of one video for the report: one forward at the layer and step that match best, and its maps drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.html_report import Picture
from corrdit.analysis.point_readings import AttentionReading, read_attention
from corrdit.analysis.protocols import FEATURE_READINGS, AnalysisOptions
from corrdit.analysis.sources import AnalysisVideo
from corrdit.analysis.token_maps import AttentionPicture, FeaturePicture, attention_picture, feature_picture
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.integrations.diffusers.analysis.videos import EncodedVideo, encoded_video, given_latents
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.tracking.readings import image_given
from corrdit.tracking.tracks import Tracks
from corrdit.video import resize_frame
from corrdit.visualization.attention_maps import draw_attention_maps, draw_components
from corrdit.visualization.sheet import contact_sheet, sheet_frames
from corrdit.visualization.tracks import TrackStyle, draw_tracks

SHOWN_FRAMES = 6
WIDTH = 200
ATTENTION, TEXT, COMPONENTS, TRACKS = (
    "Attention maps of chosen points",
    "Attention of words on the video",
    "Principal components",
    "Tracks",
)
SHOWN_POINTS = 3
SHOWN_WORDS = 4


@dataclass(frozen=True, eq=False)
class VideoPictures:
    """Maps of one video at one layer and step.

    Args:
        encoded: the frames that were read and their truth.
        points: int64 `[P']`, the chosen points among those of the truth.
        words: text tokens shown.
        attention: maps of queries and keys.
        features: maps by the name of the feature; none where features were left out.
        reading: matches of all points, for tracks drawn over the video.
    """

    encoded: EncodedVideo
    points: Tensor
    words: tuple[str, ...]
    attention: AttentionPicture
    features: dict[str, FeaturePicture]
    reading: AttentionReading


def video_pictures(
    backbone: Backbone, given: AnalysisVideo, *, step: int, timestep: float, layer: int, options: AnalysisOptions
) -> VideoPictures:
    """Read one video once more for pictures, with its own prompt where it has one.

    Args:
        backbone: of `load_backbone`.
        given: the video, its truth and prompt.
        step, timestep, layer: which to show.
        options: as the analysis was made with.

    Raises:
        ValueError: as `analyze_video`.
    """
    encoded = encoded_video(backbone, given.video, given.xy, given.visible, options)
    points = telling_points(encoded.truth.xy, encoded.truth.visible)
    stride = backbone.token_stride
    text, every, places = prompt_words(backbone, given.prompt)
    shown = _telling(every)
    words, indices = tuple(every[n] for n in shown), [places[n] for n in shown]
    plain = replace(options, per_head=True)

    def operation(
        q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None
    ) -> tuple[AttentionPicture, AttentionReading]:
        chosen = encoded.truth.queries[points]
        drawn = attention_picture(
            q, k, grid, key_mask, points=chosen, text_tokens=indices, stride=stride, options=options
        )
        reading = read_attention(q, k, grid, key_mask, points=encoded.truth.queries, stride=stride, options=plain)
        return drawn, reading

    def of_features(features: Tensor, grid: TokenGrid) -> FeaturePicture:
        return feature_picture(features, grid, points=encoded.truth.queries[points], stride=stride)

    found: dict[str, Any] = {}
    ((_, latents),) = given_latents(backbone, encoded.latents, {step: timestep}, options)
    reading_forward(
        backbone,
        latents,
        timestep,
        layers=(layer,),
        operation=operation,
        feature_operation=of_features if options.features else None,
        deliver=lambda layer, name, result: found.__setitem__(name, result),
        text=text,
        image=image_given(backbone, encoded.latents).get("image"),
    )
    drawn, reading = found["attention"]
    features = {name: found[name] for name in FEATURE_READINGS if name in found}
    return VideoPictures(encoded, points, words[: len(drawn.text)], drawn, features, reading)


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
        self.latents = sheet_frames(len(groups), SHOWN_FRAMES)
        # A latent frame is shown as the middle one of the video frames it stands for.
        self.frame_numbers = [groups[latent][len(groups[latent]) // 2] for latent in self.latents]
        self.frames = found.encoded.frames[self.frame_numbers]
        height, width = self.frames.shape[1:3]
        self.size = (max(1, round(WIDTH * height / width)), WIDTH)
        self.labels = [f"frame {number}" for number in self.frame_numbers]
        truth = found.encoded.truth
        xy = truth.xy.numpy() / np.array(found.encoded.scale)
        self.truth = np.where(truth.visible.numpy()[..., None], xy, np.nan)[self.frame_numbers]

    def attention(self) -> list[Picture]:
        """A sheet for each chosen point: queries and keys, then each feature."""
        maps = {"query-key": (self.found.attention.rows, 0.5)}
        maps |= {feature: (drawn.rows, 3.0) for feature, drawn in self.found.features.items()}
        pictures = []
        for number, point in enumerate(self.found.points.tolist()):
            query, truth = self.truth[0, point], self.truth[:, point]
            rows = [
                (kind, self._over_frames(values[number].numpy(), gain=gain, query=query, truth=truth))
                for kind, (values, gain) in maps.items()
            ]
            caption = (
                f"Where point {number + 1} (ring in the first frame) is matched; its true place is a cross where it is "
                "visible. Each frame is scaled by itself."
            )
            pictures.append(self._sheet(ATTENTION, rows, caption))
        return pictures

    def text(self) -> list[Picture]:
        """One sheet, a row a word; nothing without words."""
        maps = zip(self.found.words, self.found.attention.text.numpy(), strict=True)
        rows = [(word, self._over_frames(values, gain=0.7)) for word, values in maps]
        caption = "What the longest words of the prompt attend to in the video (softmax over all tokens)."
        return [self._sheet(TEXT, rows, caption)] if rows else []

    def components(self) -> list[Picture]:
        """One sheet: frames, queries, keys, features."""
        values = {"queries": self.found.attention.queries, "keys": self.found.attention.keys}
        values |= {name: picture.components for name, picture in self.found.features.items()}
        rows = [("video", [resize_frame(frame, *self.size) for frame in self.frames])]
        rows += [(kind, draw_components(maps.numpy()[self.latents], self.size)) for kind, maps in values.items()]
        caption = (
            "First three principal components over all tokens of the video as red, green and blue; the same colour in "
            "two frames means similar tokens."
        )
        return [self._sheet(COMPONENTS, rows, caption)]

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

    def _over_frames(self, maps: np.ndarray, **drawing: Any) -> list[np.ndarray]:
        return draw_attention_maps(self.frames, maps[self.latents], size=self.size, **drawing)

    def _sheet(self, section: str, rows: Sequence[tuple[str, list[np.ndarray]]], caption: str) -> Picture:
        """One row of frames for each kind."""
        pictures = [picture for _, row in rows for picture in row]
        labels = [f"{kind}, {label}" for kind, _ in rows for label in self.labels]
        return (section, contact_sheet(pictures, labels, columns=len(self.labels)), f"{self.place}. {caption}")


def telling_points(xy: Tensor, visible: Tensor, count: int = SHOWN_POINTS) -> Tensor:
    """Indices of points that say much in a picture: seen for long, moving far, apart from each other.

    Args:
        xy: `[T, P, 2]`.
        visible: bool `[T, P]`.
        count: most points.
    """
    far = ((xy - xy[0]).norm(dim=-1) * visible).amax(0)
    worth = visible.float().mean(0) * (1 + far)
    chosen = [int(worth.argmax())]
    while len(chosen) < min(count, xy.shape[1]):
        apart = (xy[0][:, None] - xy[0][chosen]).norm(dim=-1).amin(1)
        chosen.append(int((worth * apart).argmax()))
    return torch.tensor(chosen)


def prompt_words(backbone: Backbone, prompt: str) -> tuple[dict[str, Tensor] | None, list[str], list[int]]:
    """Text arguments of the prompt (None for the empty one), its words and their places among the text tokens."""
    tokenizer = getattr(backbone.pipe, "tokenizer", None)
    if not prompt or tokenizer is None or getattr(backbone.pipe, "text_encoder", None) is None:
        return None, [], []
    identifiers = np.asarray(tokenizer(prompt).input_ids).reshape(-1).tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    places = [place for place, identifier in enumerate(identifiers) if identifier not in special]
    words = [str(tokenizer.decode([identifiers[place]])) for place in places]
    return backbone.encoded_prompt(prompt), words, places


def _telling(words: Sequence[str]) -> list[int]:
    """The longest words, in their order: short ones are mostly articles and prepositions."""
    return sorted(sorted(range(len(words)), key=lambda place: -len(words[place]))[:SHOWN_WORDS])
