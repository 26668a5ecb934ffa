"""Which frames go through the transformer together.

A video transformer sees a limited number of frames at once. Source: DiffTrack (arXiv 2506.17220), section on zero-shot
tracking, which found that the query's frame in every chunk and frames spread over the whole video serve best.
"""

from __future__ import annotations

from dataclasses import dataclass

from corrdit.arguments import whole_number

SCHEDULES = ("spread", "interleaved", "consecutive", "chained")


@dataclass(frozen=True)
class Chunk:
    """Video frames that are matched in one forward pass.

    Args:
        source: the frame whose points are followed.
        targets: the frames they are looked for in.
    """

    source: int
    targets: tuple[int, ...]

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames of the forward pass, in the order of the video."""
        return tuple(sorted((self.source, *self.targets)))


def anchored_chunks(
    others: list[int],
    anchor: int,
    *,
    frames_per_chunk: int = 13,
    schedule: str = "spread",
    stride: int | None = None,
    interval: int | None = None,
) -> list[Chunk]:
    """Chunks that all hold the anchor frame and together every other frame, of the video or of a block of it.

    Args:
        others: the other frames, ascending.
        anchor: the frame that is in every chunk.
        frames_per_chunk: frames of a forward pass, the anchor included; at least 2.
        schedule: "spread" takes every n-th frame with the smallest n that covers the video, each frame once;
            "interleaved" is DiffTrack's released way with `n = frames // (frames_per_chunk - 1)`, chunks starting one
            frame after another until all frames are covered, overlapping where they meet; "consecutive" takes
            neighbouring frames, chunks starting `stride` frames after another.
        stride: for "consecutive" only, 1 to frames_per_chunk - 1; frames_per_chunk - 1 (no overlap) by default.
        interval: for "interleaved" only, n in place of the released one.

    Raises:
        ValueError: a number is out of range or the schedule unknown.
    """
    window = whole_number("frames_per_chunk", frames_per_chunk, 2) - 1
    if stride is not None and schedule != "consecutive":
        raise ValueError(f'stride is for schedule="consecutive"; drop it for schedule={schedule!r}')
    if interval is not None and schedule != "interleaved":
        raise ValueError(f'interval is for schedule="interleaved"; drop it for schedule={schedule!r}')
    if schedule == "spread":
        count = -(-len(others) // window)
        return [Chunk(anchor, tuple(others[start::count])) for start in range(count)]
    if schedule == "interleaved":
        released = max((len(others) + 1) // window, 1)
        interval, step = released if interval is None else whole_number("interval", interval, 1), 1
    elif schedule == "consecutive":
        interval, step = 1, _checked_stride(window if stride is None else stride, window)
    else:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    chunks: list[Chunk] = []
    covered = 0
    while covered < len(others):
        start = len(chunks) * step
        chunk = Chunk(anchor, tuple(others[start : start + (window - 1) * interval + 1 : interval]))
        chunks.append(chunk)
        covered = len({frame for chunk in chunks for frame in chunk.targets})
    return chunks


def chained_chunks(frames: int, anchor: int, *, frames_per_chunk: int = 13) -> list[Chunk]:
    """Chunks of consecutive frames, each starting at the last frame of the one before, away from the anchor both ways.

    The way of tracking without the anchor in every chunk: positions found in the last frame of a chunk are the
    queries of the next, so errors add up.

    Raises:
        ValueError: a number is out of range.
    """
    _other_frames(frames, anchor)
    window = whole_number("frames_per_chunk", frames_per_chunk, 2) - 1
    chunks = []
    for way in (list(range(anchor, frames)), list(range(anchor, -1, -1))):
        for start in range(0, len(way) - 1, window):
            chunks.append(Chunk(way[start], tuple(way[start + 1 : start + 1 + window])))
    return chunks


def frame_blocks(frames: int, anchor: int, most: int | None) -> list[list[int]]:
    """The frames but the anchor, ascending, in blocks that are followed one after another.

    Args:
        frames: number of video frames, at least 2.
        anchor: the query's frame.
        most: frames of a block; a longer video is cut on each side of the anchor, the blocks next to it first. None
            for one block.

    Raises:
        ValueError: a number is out of range.
    """
    others = _other_frames(frames, anchor)
    if most is None or len(others) <= whole_number("most", most, 1):
        return [others]
    after, before = others[anchor:], others[:anchor]
    blocks = [after[start : start + most] for start in range(0, len(after), most)]
    for end in range(len(before), 0, -most):
        blocks.append(before[max(0, end - most) : end])
    return blocks


def last_visits(chunks: list[Chunk]) -> dict[int, int]:
    """For each target frame the index of the last chunk that holds it."""
    return {frame: index for index, chunk in enumerate(chunks) for frame in chunk.targets}


def _other_frames(frames: int, anchor: int) -> list[int]:
    frames = whole_number("frames", frames, 2)
    if whole_number("anchor", anchor, 0) >= frames:
        raise ValueError(f"anchor is frame {anchor}, but the video has frames 0 to {frames - 1}")
    return [frame for frame in range(frames) if frame != anchor]


def _checked_stride(stride: int, window: int) -> int:
    stride = whole_number("stride", stride, 1)
    if stride > window:
        raise ValueError(
            f"stride is {stride}, but a chunk holds {window} frames beside the anchor; a larger one skips frames"
        )
    return stride
