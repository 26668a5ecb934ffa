"""Videos with truth in TAP-Vid's files. Needs torch and numpy only."""

from corrdit.data.corruptions import Corruption
from corrdit.data.tapvid import TapVidSample, TapVidVideo, read_tapvid
from corrdit.data.tapvid_set import TapVidEntry, TapVidSet
from corrdit.data.tapvid_writing import write_tapvid, write_tapvid_shards

__all__ = [
    "Corruption",
    "TapVidEntry",
    "TapVidSample",
    "TapVidSet",
    "TapVidVideo",
    "read_tapvid",
    "write_tapvid",
    "write_tapvid_shards",
]
