"""What an analysis measures and how; the quirks of DiffTrack's released code by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from corrdit.arguments import choice, entries, resolved_index, whole_number
from corrdit.geometry import GEOMETRIES
from corrdit.ops.backends import check_budget
from corrdit.tracking.options import POSTERIORS
from corrdit.tracking.released_costs import ROUNDINGS

FEATURE_READINGS = ("attention output", "projected output")
"""Intermediate features: heads joined before the attention's output projection, and what comes out of it."""

TOKEN_THRESHOLDS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Thresholds where none are given, in tokens of the narrower side; 8 pixels are among them for tokens of 4 to 32."""

_CHOICES = {
    "geometry": GEOMETRIES,
    "token_choice": ("nearest", "released"),
    "time": ("codec", "released"),
    "similarity": ("cosine", "dot"),
    "latents": ("frames", "video"),
    "noise": ("noised", "inverted", "clean"),
    "average": ("pooled", "released"),
    "rounding": ROUNDINGS,
    "posterior": POSTERIORS,
}


@dataclass(frozen=True)
class AnalysisOptions:
    """Settings of an analysis.

    Args:
        layers: attention layers, counted over all blocks, negative ones from the last; None for all.
        steps: denoising steps, 0 the noisiest, negative ones from the last; None for all.
        inference_steps: length of the schedule that `steps` counts in; None for the backbone's preset.
        per_head: whether every head is read by itself beside the mean over heads.
        low_pass: standard deviations in tokens of low-pass filters on queries and keys (see
            `corrdit.tracking.filtering`); the mean over heads is also read through each of them.
        features: whether intermediate features are matched too.
        thresholds: a hit is nearer than this, in pixels of the encoded frames; None for 1/4 to 4 tokens.
        least_motion: in tokens; points that moved farther from their place in the first frame are also counted apart,
            because points that stand still are matched well by a map that never moves.
        geometry: "centers" (token centres) or "released" (DiffTrack's reading of match maps), see
            `corrdit.geometry`.
        token_choice: the token whose attention a point stands for: the "nearest" one, or "released": x / stride and
            y / stride rounded, clipped by the wrong side and used as row and column, so that the token is transposed.
        time: how matches in latent frames become positions in video frames: "codec" places a latent frame at the mean
            of the video frames it stands for and interpolates linearly; "released" stretches them evenly.
        similarity: of features: "cosine", or "dot" (released).
        count_query_frame: whether the query frame, where every point is right, counts as a match (released).
        count_hidden_starts: whether points hidden in the first frame count where they are seen later (released).
        average: "pooled" counts every position of every video the same. "released" is DiffTrack's: the confidence of a
            point is its mean over the frames that show it (0 for none) and all points are in their mean, and what is
            reported, best and harmonic mean included, is the mean of the videos' own figures.
        bidirectional: whether the softmax over source tokens takes part in query-key matching.
        rounding: of matches, "none" or "bfloat16": the arithmetic of DiffTrack's released runs, in which near
            candidates tie, see `corrdit.tracking.released_costs`. Filtered readings stay unrounded.
        latents: of given videos: "frames" (every frame a latent of its own, as the tracker reads) or "video"
            (temporally compressed as the model was trained; released).
        posterior: of given videos: "mode" (the codec's most likely latents) or "sample" (drawn with `seed`, released).
        encoded_size: (height, width) in pixels of given videos, in place of a number of tokens; None for the backbone's
            preset.
        resize_first: (height, width) to which given videos are resized before that (released: 256 x 256).
        antialias: whether they are resized with antialiasing (released: without).
        noise: of given videos: "noised" (fresh noise to the timestep of each step), "inverted" (along the model's own
            path, see `corrdit.integrations.diffusers.inversion`; costs a whole forward pass for each step of the
            schedule) or "clean".
        seed: of the noise.
        max_frames: most latent frames of a given video that are read, spread evenly over it; None for the backbone's
            preset (with latents="video", for all).
        tokens_per_frame: limit of tokens a frame is encoded to; None for the backbone's preset.
        backend: of the operations, see `corrdit.ops`.
        memory_budget: bytes an operation may use beyond inputs and outputs (streaming).

    Raises:
        ValueError: a value that is not accepted.
    """

    layers: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    inference_steps: int | None = None
    per_head: bool = True
    low_pass: tuple[float, ...] = ()
    features: bool = True
    thresholds: tuple[float, ...] | None = None
    least_motion: float = 1.5
    geometry: str = "centers"
    token_choice: str = "nearest"
    time: str = "codec"
    similarity: str = "cosine"
    count_query_frame: bool = False
    count_hidden_starts: bool = False
    average: str = "pooled"
    bidirectional: bool = True
    rounding: str = "none"
    latents: str = "frames"
    posterior: str = "mode"
    encoded_size: tuple[int, int] | None = None
    resize_first: tuple[int, int] | None = None
    antialias: bool = True
    noise: str = "noised"
    seed: int = 0
    max_frames: int | None = None
    tokens_per_frame: int | None = None
    backend: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            choice(name, getattr(self, name), accepted)
        for name in ("layers", "steps"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _distinct(name, value))
        for name, minimum in (("inference_steps", 1), ("max_frames", 2), ("tokens_per_frame", 1), ("memory_budget", 1)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), minimum)
        for name in ("encoded_size", "resize_first"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _size(name, getattr(self, name)))
        if self.encoded_size is not None and self.tokens_per_frame is not None:
            raise ValueError("encoded_size fixes the tokens of a frame; drop tokens_per_frame or encoded_size")
        check_budget(self.backend, self.memory_budget)
        if self.thresholds is not None:
            given = tuple(float(threshold) for threshold in self.thresholds)
            if not given or not all(0 < threshold < float("inf") for threshold in given):
                raise ValueError(f"thresholds must be positive distances in pixels, at least one, got {given}")
            object.__setattr__(self, "thresholds", tuple(sorted(set(given))))
        spreads = tuple(float(spread) for spread in self.low_pass)
        if not all(0 < spread < float("inf") for spread in spreads) or len(set(spreads)) < len(spreads):
            raise ValueError(f"low_pass must be different standard deviations above 0, in tokens, got {self.low_pass}")
        object.__setattr__(self, "low_pass", spreads)
        if not self.least_motion >= 0:
            raise ValueError(f"least_motion must be a distance in tokens of at least 0, got {self.least_motion}")

    @property
    def execution(self) -> dict[str, Any]:
        """`backend` and `memory_budget`, as the operations take them."""
        return {"backend": self.backend, "memory_budget": self.memory_budget}

    def thresholds_for(self, stride: tuple[int, int]) -> tuple[float, ...]:
        """Thresholds in pixels for tokens of `stride` (dy, dx) pixels."""
        return self.thresholds or tuple(share * min(stride) for share in TOKEN_THRESHOLDS)

    def described(self) -> dict[str, object]:
        """The settings as plain numbers, words and lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


PROTOCOLS: dict[str, dict[str, Any]] = {
    "default": {},
    # What DiffTrack's released analysis does.
    "published": {
        "thresholds": (8.0,),
        "geometry": "released",
        "token_choice": "released",
        "time": "released",
        "similarity": "dot",
        "count_query_frame": True,
        "count_hidden_starts": True,
        "average": "released",
        "latents": "video",
    },
}


def analysis_options(protocol: str, given: Mapping[str, Any]) -> AnalysisOptions:
    """The options of a protocol, "default" or "published", with those given by name in place of its own.

    Raises:
        ValueError: an unknown protocol or option, or a value that is not accepted.
    """
    choice("protocol", protocol, PROTOCOLS)
    known = [field.name for field in fields(AnalysisOptions)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown analysis option {unknown[0]!r}; the options are {', '.join(known)}")
    return AnalysisOptions(**{**PROTOCOLS[protocol], **given})


def resolved(name: str, wanted: Iterable[int] | None, count: int, owner: str) -> tuple[int, ...]:
    """Non-negative indices in ascending order out of `count`; None means all.

    Raises:
        ValueError: an index outside.
    """
    indices = range(count) if wanted is None else wanted
    among = f"{owner}, which has {count}"
    return tuple(sorted({resolved_index(name, index, count, among) for index in indices}))


def _size(name: str, value: object) -> tuple[int, int]:
    sides = entries(name, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be (height, width) in pixels, got {sides}")
    return whole_number(f"height of {name}", sides[0], 1), whole_number(f"width of {name}", sides[1], 1)


def _distinct(name: str, value: object) -> tuple[int, ...]:
    entries = tuple(value) if isinstance(value, Iterable) else (value,)
    if not entries or not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise ValueError(f"{name} must be whole numbers, at least one, got {value!r}")
    return tuple(dict.fromkeys(entries))
