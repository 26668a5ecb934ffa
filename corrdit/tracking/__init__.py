"""Following points through a video: the result type, geometry between pixels and tokens, and the tracker."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "Tracks": "corrdit.tracking.tracks",
    "interpolate_tracks": "corrdit.tracking.interpolation",
    "PointTracker": "corrdit.tracking.tracker",
    "TrackerOptions": "corrdit.tracking.options",
}
__all__ = ["PointTracker", "TrackerOptions", "Tracks", "interpolate_tracks"]

if TYPE_CHECKING:
    from corrdit.tracking.interpolation import interpolate_tracks
    from corrdit.tracking.options import TrackerOptions
    from corrdit.tracking.tracker import PointTracker
    from corrdit.tracking.tracks import Tracks


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.tracking' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
