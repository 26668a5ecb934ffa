"""Pictures of tracks: dots with trails over the video, and contact sheets."""

from corrdit.visualization.colours import position_colours
from corrdit.visualization.pictures import write_track_pictures
from corrdit.visualization.sheet import contact_sheet
from corrdit.visualization.tracks import TrackPainter, TrackStyle, draw_tracks, iterate_drawn_tracks

__all__ = [
    "TrackPainter",
    "TrackStyle",
    "contact_sheet",
    "draw_tracks",
    "iterate_drawn_tracks",
    "position_colours",
    "write_track_pictures",
]
