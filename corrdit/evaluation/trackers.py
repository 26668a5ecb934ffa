"""Trackers by name: the model's with our options or as released, and what they have to beat."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from corrdit.tracking import Tracks
from corrdit.tracking.baselines import nearest_patches, standing_still
from corrdit.tracking.options import PRESETS, TrackerOptions, changed_options

Track = Callable[[Any, Any], Tracks]
"""`track(video uint8 [T, H, W, 3], queries [P, 3])`."""

PATCH_VALUES = 2**26
"""Differences of patches to a frame, points times pixels, that are in memory at once."""

FEATURE_TEMPERATURE = 8.0
"""Cosines lie between -1 and 1: without this factor the softmax over a frame is nearly flat."""


@dataclass(frozen=True)
class TrackerKind:
    """A way of tracking.

    Args:
        description: one line for help texts.
        needs_model: whether it reads a video transformer.
        check: raises ValueError for options it does not take.
        build: gives the tracker for a backbone (None without a model) and options.
        queries_at_once: most queries for frames of (height, width), or None for any number.
    """

    description: str
    needs_model: bool
    check: Callable[[Mapping[str, Any]], None]
    build: Callable[[Any, Mapping[str, Any]], Track]
    queries_at_once: Callable[[int, int], int | None] = lambda height, width: None


def _checked_preset(preset: str) -> Callable[[Mapping[str, Any]], None]:
    def check(options: Mapping[str, Any]) -> None:
        changed_options(PRESETS[preset], options)

    return check


def _point_tracker(preset: str) -> Callable[[Any, Mapping[str, Any]], Track]:
    def build(backbone: Any, options: Mapping[str, Any]) -> Track:
        from corrdit.tracking import PointTracker

        return PointTracker(backbone, preset=preset, **options).track

    return build


def _checked_features(options: Mapping[str, Any]) -> None:
    changed_options(TrackerOptions(), {name: value for name, value in options.items() if name != "feature"})


def _feature_tracker(backbone: Any, options: Mapping[str, Any]) -> Track:
    from corrdit.integrations.diffusers.feature_backbone import FeatureBackbone
    from corrdit.tracking import PointTracker

    given = {"temperature": FEATURE_TEMPERATURE, **options, "heads": "logits", "head_weights": ()}
    read = FeatureBackbone(backbone, **{name: given.pop(name) for name in ("feature",) if name in given})
    if not given.get("layers"):
        given.setdefault("layer", backbone.preset.reading.layer)
    return PointTracker(read, **given).track


def _checked_signature(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], None]:
    """Options are the keyword-only arguments of the function."""
    parameters = inspect.signature(function).parameters.values()
    accepted = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

    def check(options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(accepted))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(accepted) or 'none'}")

    return check


def _standing_still(backbone: Any, options: Mapping[str, Any]) -> Track:
    return lambda video, queries: standing_still(queries, len(video))


def _nearest_patches(backbone: Any, options: Mapping[str, Any]) -> Track:
    return lambda video, queries: nearest_patches(video, queries, **options)


def _lucas_kanade_installed(options: Mapping[str, Any]) -> None:
    _checked_signature(lambda: None)(options)
    if importlib.util.find_spec("cv2") is None:
        raise ValueError("Lucas-Kanade is OpenCV's; install opencv-python-headless, or leave this tracker out")


def _lucas_kanade(backbone: Any, options: Mapping[str, Any]) -> Track:
    from corrdit.analysis.pseudo_truth import lucas_kanade

    return lucas_kanade


TRACKER_KINDS: dict[str, TrackerKind] = {
    "ours": TrackerKind(
        "queries and keys of the model, with the options of corrdit's default",
        True,
        _checked_preset("default"),
        _point_tracker("default"),
    ),
    "released": TrackerKind(
        "queries and keys of the model, by DiffTrack's released procedure",
        True,
        _checked_preset("published"),
        _point_tracker("published"),
    ),
    "features": TrackerKind(
        "output of the model's attention layer in place of queries and keys",
        True,
        _checked_features,
        _feature_tracker,
    ),
    "patches": TrackerKind(
        "the patch of pixels that looks most alike",
        False,
        _checked_signature(nearest_patches),
        _nearest_patches,
        lambda height, width: max(1, PATCH_VALUES // (height * width)),
    ),
    "still": TrackerKind(
        "points that stand still",
        False,
        _checked_signature(lambda: None),
        _standing_still,
    ),
    "lucas_kanade": TrackerKind(
        "OpenCV's Lucas-Kanade from frame to frame (needs opencv-python-headless)",
        False,
        _lucas_kanade_installed,
        _lucas_kanade,
    ),
}


@dataclass(frozen=True)
class TrackerChoice:
    """A tracker of an evaluation.

    Args:
        label: its name in files and tables.
        kind: one of `TRACKER_KINDS`.
        options: of that kind, by name.

    Raises:
        ValueError: an unknown kind or option, or a value out of range.
    """

    label: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.label:
            raise ValueError("a tracker has an empty label; give it a name")
        if self.kind not in TRACKER_KINDS:
            raise ValueError(f"unknown tracker {self.kind!r}; accepted are {', '.join(TRACKER_KINDS)}")
        try:
            TRACKER_KINDS[self.kind].check(self.options)
        except ValueError as error:
            raise ValueError(f"tracker {self.label}: {error}") from error

    @property
    def needs_model(self) -> bool:
        """Whether it reads a video transformer."""
        return TRACKER_KINDS[self.kind].needs_model

    def build(self, backbone: Any) -> Track:
        """The tracker; `backbone` may be None where it needs none.

        Raises:
            ValueError: options the backbone cannot serve, such as a layer it does not have.
        """
        try:
            return TRACKER_KINDS[self.kind].build(backbone, self.options)
        except ValueError as error:
            raise ValueError(f"tracker {self.label}: {error}") from error

    def queries_at_once(self, height: int, width: int) -> int | None:
        """Most queries it is given together for frames of this size."""
        return TRACKER_KINDS[self.kind].queries_at_once(height, width)

    def described(self) -> dict[str, Any]:
        """Kind and options, as `settings.json` keeps them."""
        return {"kind": self.kind, **{name: _plain(value) for name, value in self.options.items()}}


def chosen_trackers(
    trackers: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    model_options: Mapping[str, Any] | None = None,
) -> list[TrackerChoice]:
    """Trackers from names, or from labels with options.

    Args:
        trackers: names of `TRACKER_KINDS`, in a list or joined by commas; or options by label, where the option `kind`
            says which tracker it is if that is not the label: `{"whole tokens": {"kind": "ours", "refine": 0}}`.
        model_options: options for all trackers that read a model, under those of their own.

    Raises:
        ValueError: no tracker, the same twice, or what `TrackerChoice` refuses.
    """
    if isinstance(trackers, str):
        trackers = [name.strip() for name in trackers.split(",") if name.strip()]
    if not isinstance(trackers, Mapping):
        names = list(trackers)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the tracker {twice[0]} is asked for twice; give labels with options to tell them apart")
        trackers = dict.fromkeys(names)
    if not trackers:
        raise ValueError(f"no tracker is asked for; accepted are {', '.join(TRACKER_KINDS)}")
    choices = []
    for label, given in trackers.items():
        options = dict(given or {})
        kind = str(options.pop("kind", label))
        shared = dict(model_options or {}) if kind in TRACKER_KINDS and TRACKER_KINDS[kind].needs_model else {}
        choices.append(TrackerChoice(str(label), kind, {**shared, **options}))
    return choices


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
