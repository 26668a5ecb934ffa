"""Trackers take videos as diffusers and others hand them out, and name what they do not take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pixel_backbone import STRIDE, PixelBackbone, moving_texture

import corrdit
from corrdit import PointTracker
from corrdit.tracking.baselines import nearest_patches
from corrdit.video import as_frames, read_video, write_video

QUERY = [(0, 30.0, 20.0), (1, 40.0, 24.0)]
VIDEO = moving_texture(4, (STRIDE, 0))


def reversed_twice(video):
    return np.ascontiguousarray(video[::-1, ::-1, ::-1, ::-1])[::-1, ::-1, ::-1, ::-1]


def read_only(video):
    video = video.copy()
    video.flags.writeable = False
    return video


class Lazy:
    """Gives slices as data sets in files do."""

    def __init__(self, video):
        self.video, self.shape, self.dtype = video, video.shape, video.dtype

    def __len__(self):
        return len(self.video)

    def __getitem__(self, part):
        return self.video[part]


FORMS = {
    "array": lambda video: video,
    "tensor": torch.from_numpy,
    "list of arrays": list,
    "list of tensors": lambda video: [torch.from_numpy(frame) for frame in video],
    "list of channels first": lambda video: [frame.transpose(2, 0, 1) for frame in video],
    "pictures": lambda video: [Image.fromarray(frame) for frame in video],
    "a batch of pictures": lambda video: [[Image.fromarray(frame) for frame in video]],
    "transparent pictures": lambda video: tuple(Image.fromarray(frame).convert("RGBA") for frame in video),
    "float64": lambda video: video / 255,
    "float32 tensor": lambda video: torch.from_numpy(video) / 255,
    "float16": lambda video: (video / 255).astype(np.float16),
    "big endian": lambda video: (video / 255).astype(">f4"),
    "gradients": lambda video: (torch.from_numpy(video) / 255).requires_grad_(),
    "list of floats": lambda video: list(video / np.float32(255)),
    "channels first": lambda video: np.ascontiguousarray(video.transpose(0, 3, 1, 2)),
    "channels first tensor": lambda video: torch.from_numpy(video).permute(0, 3, 1, 2).contiguous() / 255,
    "batch of one": lambda video: video[None] / 255,
    "batch of one, channels first": lambda video: torch.from_numpy(video).permute(0, 3, 1, 2)[None],
    "reversed": reversed_twice,
    "turned from BGR": lambda video: np.ascontiguousarray(video[..., ::-1])[..., ::-1],
    "cropped": lambda video: np.pad(video, ((0, 0), (5, 5), (5, 5), (0, 0)))[:, 5:-5, 5:-5],
    "read-only": read_only,
    "lazy": Lazy,
    "lazy, channels first": lambda video: Lazy(video.transpose(0, 3, 1, 2)),
    "lazy floats": lambda video: Lazy(video / 255),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_video(form):
    frames = as_frames(FORMS[form](VIDEO))
    assert tuple(frames.shape) == VIDEO.shape
    np.testing.assert_array_equal(torch.as_tensor(frames[:]), VIDEO)
    np.testing.assert_array_equal(torch.as_tensor(frames[1:3]), VIDEO[1:3])
    expected = PointTracker(PixelBackbone()).track(VIDEO, QUERY)
    found = PointTracker(PixelBackbone()).track(FORMS[form](VIDEO), QUERY)
    torch.testing.assert_close(found.xy, expected.xy, atol=0, rtol=0)
    torch.testing.assert_close(nearest_patches(FORMS[form](VIDEO), QUERY).xy, nearest_patches(VIDEO, QUERY).xy)


def test_bfloat16_is_rounded_to_what_it_holds():
    frames = as_frames((torch.from_numpy(VIDEO) / 255).bfloat16())
    assert np.abs(np.asarray(frames[:]).astype(int) - VIDEO).max() <= 1


def test_a_memory_mapped_array_is_read_by_slices(tmp_path):
    np.save(tmp_path / "video.npy", VIDEO)
    mapped = np.load(tmp_path / "video.npy", mmap_mode="r")
    frames = as_frames(mapped)
    assert not isinstance(frames, np.ndarray), "it would be read as a whole"
    np.testing.assert_array_equal(torch.as_tensor(frames[2:4]), VIDEO[2:4])
    found = PointTracker(PixelBackbone()).track(mapped, QUERY)
    torch.testing.assert_close(found.xy, PointTracker(PixelBackbone()).track(VIDEO, QUERY).xy)


def test_paths_and_what_was_read_from_them(tmp_path):
    write_video(tmp_path / "clip", VIDEO)
    expected = PointTracker(PixelBackbone()).track(VIDEO, QUERY)
    for video in (tmp_path / "clip", str(tmp_path / "clip"), read_video(tmp_path / "clip")):
        torch.testing.assert_close(PointTracker(PixelBackbone()).track(video, QUERY).xy, expected.xy)


def test_a_grid_of_points_by_its_name():
    tracks = PointTracker(PixelBackbone()).track(VIDEO, "grid:2")
    assert tracks.xy[0].tolist() == [[24.0, 16.0], [72.0, 16.0], [24.0, 48.0], [72.0, 48.0]]
    for spec in ("grid:0", "grid:513", "grid:", "grid:2.5", "points.csv"):
        with pytest.raises(ValueError, match=r"queries must be numbers .*, or grid:N .* got '"):
            PointTracker(PixelBackbone()).track(VIDEO, spec)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((3, 3, 3, 3), np.uint8), r"can be \[T, H, W, 3\] and \[T, 3, H, W\]"),
        (torch.zeros(3, 3, 9, 3), r"can be \[T, H, W, 3\] and \[T, 3, H, W\]"),
        (VIDEO.astype(np.float32), "floating-point from 0 to 1, got .* values from 0 to 255 in frame 0"),
        (VIDEO / 127.5 - 1, r"values from -1 to 1 .*by \(x \+ 1\) / 2"),
        (np.full((3, 8, 8, 3), np.nan), "values from nan to nan in frame 0"),
        (np.full((3, 8, 8, 3), 1.01), "values from 1.01"),
        (VIDEO.astype(np.int64), "int64"),
        (VIDEO.astype(np.uint16), "uint16"),
        (VIDEO > 99, "bool"),
        (VIDEO.astype(complex), "complex128"),
        (VIDEO[..., :1], r"\[frames, height, width, 3\]"),
        (np.zeros((3, 8, 8, 4), np.uint8), r"\[frames, height, width, 3\]"),
        (np.zeros((2, 3, 8, 8, 3), np.uint8), r"2 videos; give one of them, such as video\[0\]"),
        (torch.zeros(3, 8, 8, 3, device="meta"), "meta tensor"),
        (torch.zeros(3, 8, 8, 3).to_sparse(), "sparse_coo tensor"),
        ([], "without frames"),
        ([VIDEO[0], VIDEO[0, :8]], "frame 1 is ndarray .*, frame 0 ndarray .*; all frames must be alike"),
        ([Image.new("I;16", (8, 8))] * 2, "frame 0 is a picture of mode I;16"),
        ([VIDEO[0]], "one frame; tracking needs at least two"),
    ],
)
def test_wrong_values_are_named(video, message):
    with pytest.raises(ValueError, match=message) as caught:
        PointTracker(PixelBackbone()).track(video, QUERY)
    assert str(caught.value).startswith("video ")


@pytest.mark.parametrize("video", [None, 3, {"frames": VIDEO}, iter(VIDEO), [None, None], ["0.png", "1.png"]])
def test_what_is_no_video_is_named(video):
    with pytest.raises(TypeError, match=r"^video .* is a \w+; accepted are|^video is a \w+; accepted are"):
        PointTracker(PixelBackbone()).track(video, QUERY)


def test_pictures_three_pixels_high_leave_no_doubt():
    assert as_frames([Image.new("RGB", (3, 3))] * 3).shape == (3, 3, 3, 3)


def test_a_pipeline_in_place_of_a_backbone():
    pytest.importorskip("diffusers")
    backbone = corrdit.load_backbone("embedded")
    tracker = PointTracker(backbone.pipe)
    assert type(tracker.backbone) is type(corrdit.backbone_of(backbone.pipe))
    assert tracker.backbone.pipe is backbone.pipe
    transfer = corrdit.MotionTransfer(backbone.pipe)
    assert transfer.backbone.pipe is backbone.pipe
    with pytest.raises(ValueError, match="has no transformer"):
        corrdit.backbone_of(object())


@pytest.mark.parametrize("backbone", ["embedded", None, PixelBackbone])
def test_what_is_no_backbone_is_named(backbone):
    with pytest.raises(TypeError, match=r"backbone must be what corrdit\.load_backbone returns or a pipeline"):
        PointTracker(backbone)


def test_a_rate_that_varies_is_resampled_by_the_time_of_each_frame():
    pytest.importorskip("diffusers")
    from corrdit.integrations.diffusers.motion_transfer.reference import at_rate

    frames = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 4, 4, 3))
    times = 7 + np.array([0.0, 0.1, 0.2, 0.65, 0.9])
    with pytest.warns(UserWarning, match="5 frames at 5 a second are resampled to 10 at 10"):
        resampled, rate = at_rate(frames, 5.0, 10.0, times)
    assert resampled[:, 0, 0, 0].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert rate == 10
    even, _ = at_rate(frames, 5.0, None, times)
    assert even is frames
