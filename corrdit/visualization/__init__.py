"""Pictures of tracks and of motion: dots with trails, displacement as colours and arrows, contact sheets."""

from corrdit.visualization.colours import position_colours
from corrdit.visualization.flow import (
    colour_wheel,
    draw_flow_arrows,
    flow_colours,
    full_colour_at,
    write_flow_pictures,
    write_loss_curve,
)
from corrdit.visualization.page import write_comparison_page
from corrdit.visualization.sheet import contact_sheet
from corrdit.visualization.side_by_side import write_side_by_side
from corrdit.visualization.tracks import (
    TrackPainter,
    TrackStyle,
    draw_tracks,
    iterate_drawn_tracks,
    write_track_pictures,
)

__all__ = [
    "TrackPainter",
    "TrackStyle",
    "colour_wheel",
    "contact_sheet",
    "draw_flow_arrows",
    "draw_tracks",
    "flow_colours",
    "full_colour_at",
    "iterate_drawn_tracks",
    "position_colours",
    "write_comparison_page",
    "write_flow_pictures",
    "write_loss_curve",
    "write_side_by_side",
    "write_track_pictures",
]
