"""The maps behind the pictures of a report: one forward of one video at the layer and step that match best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corrdit.analysis.options import FEATURE_READINGS, AnalysisOptions
from corrdit.analysis.pictures import AttentionPicture, FeaturePicture, attention_picture, feature_picture
from corrdit.analysis.reading import AttentionReading, read_attention
from corrdit.analysis.sources import AnalysisVideo
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.integrations.diffusers.analysis.videos import EncodedVideo, encoded_video, given_latents
from corrdit.tracking.readings import image_given

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
    backbone: Any, given: AnalysisVideo, *, step: int, timestep: float, layer: int, options: AnalysisOptions
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
    stride = tuple(backbone.token_stride)
    text, words, indices = _prompted(backbone, given.prompt)
    plain = replace(options, per_head=True)

    def operation(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> tuple[Any, Any]:
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
        **image_given(backbone, encoded.latents),
    )
    drawn, reading = found["attention"]
    features = {name: found[name] for name in FEATURE_READINGS if name in found}
    return VideoPictures(encoded, points, words[: len(drawn.text)], drawn, features, reading)


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


def _prompted(backbone: Any, prompt: str) -> tuple[dict[str, Tensor] | None, tuple[str, ...], list[int]]:
    """Text arguments of the prompt (None for the empty one), its first words and their places among the tokens."""
    tokenizer = getattr(backbone.pipe, "tokenizer", None)
    if not prompt or tokenizer is None or getattr(backbone.pipe, "text_encoder", None) is None:
        return None, (), []
    identifiers = np.asarray(tokenizer(prompt).input_ids).reshape(-1).tolist()
    special = set(getattr(tokenizer, "all_special_ids", ()))
    places = [place for place, identifier in enumerate(identifiers) if identifier not in special]
    words = [str(tokenizer.decode([identifiers[place]])) for place in places]
    # Short words are mostly articles and prepositions.
    telling = sorted(range(len(places)), key=lambda place: -len(words[place]))[:SHOWN_WORDS]
    order = sorted(telling)
    return backbone.encoded_prompt(prompt), tuple(words[n] for n in order), [places[n] for n in order]
