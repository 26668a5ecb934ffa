"""Videos longer than memory: read block by block, in memory that does not grow, and gone on with after a stop."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from pixel_backbone import PixelBackbone, moving_texture

from corrdit import PointTracker
from corrdit.video import read_video, write_video

POINTS = [[0, 40.0, 30.0], [0, 21.3, 12.7], [17, 50.0, 33.0]]
BLOCKS = {"frames_per_block": 6}


class RepeatedTexture:
    """Frames of a texture made as they are asked for; says how many were held at once."""

    dtype = np.dtype(np.uint8)

    def __init__(self, frames: int, size: tuple[int, int]) -> None:
        self.texture, self.most = moving_texture(8, (2, 1), size), 0
        self.shape = (frames, *self.texture.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> np.ndarray:
        numbers = range(*part.indices(len(self)))
        self.most = max(self.most, len(numbers))
        return np.stack([self.texture[number % 8] for number in numbers])


@pytest.fixture
def path(tmp_path):
    write_video(tmp_path / "long.mp4", moving_texture(30, (2, 1)), 10)
    return tmp_path / "long.mp4"


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("xy", "visible", "score"))


class WatchedBackbone(PixelBackbone):
    """Notes the bytes of all tensors that are alive at each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def forward(self, *arguments):
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        alive = [
            tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta
        ]
        self.bytes.append(sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return super().forward(*arguments)


@pytest.mark.parametrize(("few", "many"), [(24, 72), pytest.param(64, 512, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_video(few, many):
    peaks, tracks = {}, {}
    for frames in (few, many):
        video, backbone = RepeatedTexture(frames, (16, 24)), WatchedBackbone()
        tracks[frames] = PointTracker(backbone, frames_per_block=8).track(video, [[0, 12.0, 9.0]]).xy
        assert video.most <= 9  # the anchor's frame beside a block
        peaks[frames] = max(backbone.bytes) - min(backbone.bytes[:1])
    assert peaks[few] > 10_000
    assert peaks[many] < peaks[few] + 100 * (many - few)  # the tracks themselves: 13 bytes a frame
    assert torch.equal(tracks[many][: few // 2], tracks[few][: few // 2])


WAYS = [BLOCKS, {**BLOCKS, "crops": (0.5,), "crop_tokens": 4}, {"schedule": "chained"}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_stopped_run_goes_on_where_it_was(options, path, tmp_path):
    backbone = PixelBackbone()
    tracker = PointTracker(backbone, **options)
    whole = tracker.track(read_video(path).frames, POINTS)
    needed = len(backbone.forwards)
    assert same(tracker.track(path, POINTS), whole)
    folder, forward, left = tmp_path / "parts", backbone.forward, [needed // 2]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(*arguments)

    backbone.forward = stopping
    with pytest.raises(KeyboardInterrupt):
        tracker.track(path, POINTS, resume=folder)
    backbone.forward = forward
    backbone.forwards.clear()
    steps = []
    assert same(tracker.track(path, POINTS, resume=folder, progress=lambda *step: steps.append(step)), whole)
    assert 0 < len(backbone.forwards) < needed
    assert steps[-1] == (needed, needed)
    backbone.forwards.clear()
    assert same(tracker.track(path, POINTS, resume=folder), whole)
    assert not backbone.forwards


def test_blocks_of_another_run_are_refused_and_damaged_ones_made_again(path, tmp_path):
    folder, backbone = tmp_path / "parts", PixelBackbone()
    tracker = PointTracker(backbone, **BLOCKS)
    whole = tracker.track(path, POINTS, resume=folder)
    for other, points, named in (
        (PointTracker(PixelBackbone(61.0), **BLOCKS), POINTS, "weights 'pixels 60.0'"),
        (PointTracker(backbone, frames_per_block=7), POINTS, "frames_per_block 6"),
        (tracker, POINTS[:2], "queries"),
    ):
        with pytest.raises(ValueError, match=named):
            other.track(path, points, resume=folder)
    block = sorted(folder.glob("*/block.npz"))[1]
    block.write_bytes(block.read_bytes()[:-7])
    backbone.forwards.clear()
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(tracker.track(path, POINTS, resume=folder), whole)
    assert len(backbone.forwards) == 2  # the six frames of one block, four at a time beside the anchor
    write_video(path, moving_texture(30, (1, 1)), 10)
    with pytest.raises(ValueError, match="video"):
        tracker.track(path, POINTS, resume=folder)


def test_resume_needs_a_file(path, tmp_path):
    with pytest.raises(ValueError, match="give its path, or drop resume"):
        PointTracker(PixelBackbone(), **BLOCKS).track(read_video(path).frames, POINTS, resume=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
