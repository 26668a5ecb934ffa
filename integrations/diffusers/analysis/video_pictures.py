"""What pictures of one video are drawn from: maps of chosen layers and steps, points and words."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.counts import TrueTracks
from corrdit.analysis.point_readings import AttentionReading, read_attention
from corrdit.analysis.protocols import FEATURE_READINGS, AnalysisOptions
from corrdit.analysis.sources import AnalysisVideo
from corrdit.analysis.token_maps import AttentionPicture, FeaturePicture, attention_picture, feature_picture
from corrdit.arguments import finite_number
from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import ReadingCapture, reading_forward
from corrdit.integrations.diffusers.analysis.videos import EncodedVideo, encoded_video, given_latents
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.diffusers.guidance.comparison import generated_frames
from corrdit.integrations.diffusers.text_attention import of_text, text_maps
from corrdit.tracking.readings import image_given

SHOWN_POINTS = 3
SHOWN_WORDS = 4
Place = tuple[int, int]
"""Step and layer."""


@dataclass(frozen=True)
class PictureChoice:
    """What is drawn of a video.

    Args:
        layers, steps: each layer at each step, of those that were analysed; () for the ones that match best.
        points: (x, y) in pixels of the first frame; () for some points that say much.
        words: of the prompt; () for its longest ones.

    Raises:
        ValueError: a point that is no pair of numbers.
    """

    layers: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for point in self.points:
            if len(point) != 2:
                raise ValueError(f"a point of pictures is (x, y) in pixels of the first frame, got {list(point)}")
            for value in point:
                finite_number("a point's coordinate", value)


@dataclass(frozen=True, eq=False)
class VideoPictures:
    """Maps of one video at one layer and step.

    Args:
        step, layer, timestep: which.
        encoded: the frames that were read and their truth.
        marks: float `[T, P', 2]`, places of the chosen points in pixels of the video; NaN where hidden or not known.
        words: text tokens shown.
        text: `[words, F, h, w]`, how much each place attends to them (`text_maps`, which see).
        attention: maps of queries and keys.
        features: maps by the name of the feature; none where features were left out.
        reading: matches of all points, for tracks drawn over the video.
    """

    step: int
    layer: int
    timestep: float
    encoded: EncodedVideo
    marks: np.ndarray
    words: tuple[str, ...]
    text: Tensor
    attention: AttentionPicture
    features: dict[str, FeaturePicture]
    reading: AttentionReading


@dataclass
class _PictureReader:
    """Reads maps of chosen points and words as queries, keys and features come by."""

    backbone: Backbone
    encoded: EncodedVideo
    prompt: str
    options: AnalysisOptions
    choice: PictureChoice
    found: dict[Place, dict[str, Any]] = field(default_factory=dict)
    step: int = 0

    def __post_init__(self) -> None:
        self.points, self.marks = _chosen_points(self.encoded, self.choice.points)
        self.words, self.tokens = _words(self.backbone, self.prompt, self.choice.words)
        self.stride = self.backbone.token_stride

    def attention(
        self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None
    ) -> tuple[AttentionPicture, AttentionReading, Tensor | None]:
        """The operation on queries and keys, and on the text beside the video where it is in them."""
        plain = replace(self.options, per_head=True)
        queries = self.encoded.truth.queries
        drawn = attention_picture(q, k, grid, key_mask, points=self.points, stride=self.stride, options=plain)
        reading = read_attention(q, k, grid, key_mask, points=queries, stride=self.stride, options=plain)
        return drawn, reading, of_text(self.text)(q, k, grid, key_mask) if grid.text_tokens else None  # type: ignore[return-value]

    def text(self, q: Tensor, k: Tensor, grid: CrossGrid, key_mask: Tensor | None) -> Tensor:
        """The operation on queries of the video and keys of the text."""
        shown = [token for token in self.tokens if token < grid.keys]
        if not shown:
            return torch.zeros(0, grid.frames, grid.height, grid.width)
        return text_maps(q, k, grid, key_mask, tokens=shown)[0].cpu()

    def watching_text(
        self, model: Any, layers: Sequence[int], steps: Sequence[int] | None
    ) -> AbstractContextManager[object]:
        """A capture of a model's cross-attention to the text, where that is apart and there are words."""
        if self.backbone.layout.text is not None or not self.tokens:
            return contextlib.nullcontext()

        def kept(step: int, layer: int, result: Tensor) -> None:
            self.take(self.step if steps is None else step, layer, "words", result)

        return capture(model, layers=layers, steps=steps, operation=self.text, callback=kept, attention="cross")

    def of_features(self, features: Tensor, grid: TokenGrid) -> FeaturePicture:
        """The operation on features."""
        return feature_picture(features, grid, points=self.points, stride=self.stride)

    @property
    def features(self) -> Callable[[Tensor, TokenGrid], FeaturePicture] | None:
        """The operation on features, or None where they are left out."""
        return self.of_features if self.options.features else None

    def take(self, step: int, layer: int, name: str, result: Any) -> None:
        """Keep what an operation gave."""
        self.found.setdefault((step, layer), {})[name] = result

    def pictures(self, timesteps: Mapping[int, float]) -> list[VideoPictures]:
        """All that was found, by steps and layers."""
        made = []
        for (step, layer), parts in sorted(self.found.items()):
            drawn, reading, text = parts["attention"]
            text = parts.get("words", text)
            text = torch.zeros(0, *drawn.rows.shape[1:]) if text is None else text
            features = {name: parts[name] for name in FEATURE_READINGS if name in parts}
            words, known = self.words[: len(text)], (step, layer, timesteps[step], self.encoded, self.marks)
            made.append(VideoPictures(*known, words, text, drawn, features, reading))
        return made


def video_pictures(
    backbone: Backbone,
    given: AnalysisVideo,
    *,
    timesteps: Mapping[int, float],
    layers: Sequence[int],
    options: AnalysisOptions,
    choice: PictureChoice | None = None,
) -> list[VideoPictures]:
    """Read a given video once more for pictures, with its own prompt where it has one.

    Args:
        backbone: of `load_backbone`.
        given: the video, its truth and prompt.
        timesteps: of the steps to show, by their numbers.
        layers: to show.
        options: as the analysis was made with.
        choice: its points and words.

    Raises:
        ValueError: as `analyze_video`, or a word that is not in the prompt.
    """
    encoded = encoded_video(backbone, given.video, given.xy, given.visible, options, starts=given.starts)
    reader = _PictureReader(backbone, encoded, given.prompt, options, choice or PictureChoice())
    text = backbone.encoded_prompt(given.prompt) if reader.tokens else None
    for step, latents in given_latents(backbone, encoded.latents, timesteps, options):
        reader.step = step
        with reader.watching_text(backbone.transformer_at(timesteps[step]), layers, None):
            reading_forward(
                backbone,
                latents,
                timesteps[step],
                layers=tuple(layers),
                operation=reader.attention,
                feature_operation=reader.features,
                deliver=functools.partial(reader.take, step),
                text=text,
                image=image_given(backbone, encoded.latents).get("image"),
            )
    return reader.pictures(timesteps)


def generated_pictures(
    backbone: Backbone,
    prompt: str,
    truth: TrueTracks,
    *,
    seed: int,
    call: Mapping[str, Any],
    timesteps: Mapping[int, float],
    layers: Sequence[int],
    options: AnalysisOptions,
    choice: PictureChoice | None = None,
) -> list[VideoPictures]:
    """Generate a video once more, with the maps of its own denoising.

    Args:
        backbone, options, choice, timesteps, layers: as for `video_pictures`.
        prompt, seed, call: it was generated with; the call names the steps too.
        truth: its tracks, at the size it is generated.

    Raises:
        ValueError: as `analyze_generation`, or a word that is not in the prompt.
    """
    nothing = np.zeros((len(truth.xy), 1, 1, 3), np.uint8)
    encoded = EncodedVideo(torch.zeros(0), truth, nothing, (1.0, 1.0))
    reader = _PictureReader(backbone, encoded, prompt, options, choice or PictureChoice())
    capturing = ReadingCapture(
        backbone.pipe,
        layers=tuple(layers),
        steps=tuple(timesteps),
        operation=reader.attention,
        feature_operation=reader.features,
        deliver=reader.take,
    )
    with reader.watching_text(backbone.pipe, layers, tuple(timesteps)), capturing:
        video = generated_frames(backbone.pipe, call, seed)
    reader.encoded = replace(encoded, frames=video)
    return reader.pictures(timesteps)


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


def _chosen_points(encoded: EncodedVideo, given: Sequence[tuple[float, ...]]) -> tuple[Tensor, np.ndarray]:
    """`[P', 2]` points in encoded pixels, and their places `[T, P', 2]` in pixels of the video."""
    truth, scale = encoded.truth, torch.tensor(encoded.scale)
    if given:
        places = torch.tensor(given, dtype=torch.float32)
        marks = torch.full((len(truth.xy), len(places), 2), float("nan"))
        marks[0] = places
        return places * scale, marks.numpy()
    points = telling_points(truth.xy, truth.visible)
    seen = torch.where(truth.visible[..., None], truth.xy, torch.nan)[:, points] / scale
    seen[0] = truth.queries[points] / scale
    return truth.queries[points], seen.numpy()


def prompt_words(backbone: Backbone, prompt: str) -> tuple[list[str], list[int]]:
    """The tokens of the prompt as words, and their places among the text tokens; none without prompt or tokenizer."""
    tokenizer = getattr(backbone.pipe, "tokenizer", None)
    if not prompt or tokenizer is None or getattr(backbone.pipe, "text_encoder", None) is None:
        return [], []
    identifiers = np.asarray(tokenizer(prompt).input_ids).reshape(-1).tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    places = [place for place, identifier in enumerate(identifiers) if identifier not in special]
    return [str(tokenizer.decode([identifiers[place]])).strip() for place in places], places


def _words(backbone: Backbone, prompt: str, wanted: Sequence[str]) -> tuple[tuple[str, ...], list[int]]:
    """Words of the prompt, those asked for or the longest, and their places among its tokens.

    Raises:
        ValueError: a word that the prompt does not hold.
    """
    words, places = prompt_words(backbone, prompt)
    # Short words are mostly articles and prepositions.
    chosen = sorted(sorted(range(len(places)), key=lambda n: -len(words[n]))[:SHOWN_WORDS])
    if wanted:
        lower = [word.lower() for word in words]
        missing = [word for word in wanted if word.lower() not in lower]
        if missing:
            held = ", ".join(words) or "none"
            raise ValueError(f"{missing[0]!r} is no token of the prompt; its tokens are {held}")
        chosen = [lower.index(word.lower()) for word in wanted]
    return tuple(words[n] for n in chosen), [places[n] for n in chosen]
