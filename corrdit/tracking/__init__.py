"""Following points through a video: the result type, geometry between pixels and tokens, and the tracker."""

from corrdit.tracking.options import TrackerOptions
from corrdit.tracking.tracker import PointTracker
from corrdit.tracking.tracks import Tracks, interpolate_tracks
from corrdit.tracking.video_reading import VideoReading

__all__ = ["PointTracker", "TrackerOptions", "Tracks", "VideoReading", "interpolate_tracks"]
