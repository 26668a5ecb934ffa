"""Video files are read as players show them, and what is wrong with a file or folder is named."""

from __future__ import annotations

import itertools
import math
import struct
import warnings
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest

from corrdit import Tracks
from corrdit.tracking.files import write_track_results
from corrdit.video import StreamedVideo, iterate_frames, probe_video, read_video, write_video

UNIT = 1 << 16
CORNERS = np.kron(
    np.array([[[220, 30, 30], [30, 220, 30]], [[30, 30, 220], [200, 200, 200]]], np.uint8),
    np.ones((16, 24, 1), np.uint8),
)
"""32 x 48 pixels, with a colour of its own in each quarter."""


def write_h264(
    path: Path, frames: np.ndarray, *, times: list[int] | None = None, aspect: str = "1", trc: int = 2
) -> None:
    """Frames at `times` in milliseconds, with a sample aspect ratio and a transfer characteristic."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        stream.codec_context.color_trc = trc
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index * 100 if times is None else times[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def with_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """Patches the display matrix: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    values = [round(value * UNIT) for value in (a, b, 0, c, d)]
    matrix = (values[0], values[1], 0, values[3], values[4], 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)


def placed(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Every pixel where the matrix puts it, one by one."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width]
    shown = np.einsum("ij,jyx->iyx", matrix, np.stack((x, y)))
    shown -= shown.min((1, 2), keepdims=True)
    result = np.empty((shown[1].max() + 1, shown[0].max() + 1, 3), np.uint8)
    result[shown[1], shown[0]] = picture
    return result


ORIENTATIONS = [
    matrix
    for matrix in (np.reshape(entries, (2, 2)) for entries in itertools.product((-1, 0, 1), repeat=4))
    if (np.abs(matrix).sum(0) == 1).all() and (np.abs(matrix).sum(1) == 1).all()
]


@pytest.mark.parametrize("matrix", ORIENTATIONS, ids=str)
def test_the_eight_orientations(tmp_path: Path, matrix: np.ndarray) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, [CORNERS] * 3)
    (a, c), (b, d) = matrix
    with_matrix(path, a, b, c, d)
    expected = placed(CORNERS, matrix)
    frames = read_video(path).frames
    assert frames.shape[1:] == expected.shape
    assert np.abs(frames[1].astype(int) - expected).mean() < 8
    info = probe_video(path)
    assert (info.height, info.width) == expected.shape[:2]
    streamed = StreamedVideo(path, max_side=24)
    height, width = (side // 2 for side in expected.shape[:2])
    assert streamed.shape == (3, height, width, 3)
    assert np.abs(streamed[1:2][0].astype(int) - expected[::2, ::2]).mean() < 12


@pytest.mark.parametrize("mirrored", [1, -1])
@pytest.mark.parametrize("degrees", [0.9, 89.1, 181.0, -90.9])
def test_nearly_a_quarter_turn_is_one(tmp_path: Path, degrees: float, mirrored: int) -> None:
    write_video(tmp_path / "clip.mp4", [CORNERS] * 2)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    with_matrix(tmp_path / "clip.mp4", cos, sin, -sin * mirrored, cos * mirrored)
    matrix = np.round([[cos, -sin * mirrored], [sin, cos * mirrored]]).astype(int)
    shown = read_video(tmp_path / "clip.mp4").frames[1].astype(int)
    assert np.abs(shown - placed(CORNERS, matrix)).mean() < 8


@pytest.mark.parametrize("degrees", [1.1, 45.0, 88.5, -30.0])
def test_other_angles_are_named(tmp_path: Path, degrees: float) -> None:
    write_video(tmp_path / "clip.mp4", [CORNERS] * 2)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    with_matrix(tmp_path / "clip.mp4", cos, sin, -sin, cos)
    with pytest.raises(
        ValueError, match=rf"clip\.mp4 is shown turned by {degrees} degrees .*accepted are quarter turns"
    ):
        read_video(tmp_path / "clip.mp4")


def test_a_sheared_picture_is_named_and_scale_is_left(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [CORNERS] * 2)
    with_matrix(tmp_path / "clip.mp4", 1, 0, 0.5, 1)
    with pytest.raises(ValueError, match="sheared"):
        read_video(tmp_path / "clip.mp4")
    for scale in (0, 2):
        with_matrix(tmp_path / "clip.mp4", scale, 0, 0, scale)
        assert np.abs(read_video(tmp_path / "clip.mp4").frames[1].astype(int) - CORNERS).mean() < 8


@pytest.mark.parametrize(
    ("aspect", "turned", "shape"),
    [
        ("2", False, (32, 96)),
        ("1/2", False, (64, 48)),
        ("12/11", False, (32, 52)),
        ("2", True, (96, 32)),
    ],
)
def test_pixels_become_squares(tmp_path: Path, aspect: str, turned: bool, shape: tuple[int, int]) -> None:
    path = tmp_path / "clip.mp4"
    write_h264(path, np.stack([CORNERS] * 3), aspect=aspect)
    if turned:
        with_matrix(path, 0, 1, -1, 0)
    info = probe_video(path)
    assert (info.height, info.width) == shape
    frames = read_video(path).frames
    assert frames.shape == (3, *shape, 3)
    stored = placed(CORNERS, np.array([[0, -1], [1, 0]])) if turned else CORNERS
    rows, columns = (np.arange(size) * side // size for size, side in zip(shape, stored.shape, strict=False))
    assert np.abs(frames[1].astype(int) - stored[rows][:, columns]).mean() < 12
    assert StreamedVideo(path, max_side=max(shape) // 2).shape[1:3] == tuple(side // 2 for side in shape)


def test_pixels_of_no_sensible_shape_are_named(tmp_path: Path) -> None:
    write_h264(tmp_path / "clip.mp4", np.stack([CORNERS] * 2), aspect="20")
    with pytest.raises(ValueError, match=r"clip\.mp4 says that its pixels are 20 wide and 1 high"):
        read_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_stream_is_read(tmp_path: Path, default: int) -> None:
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        streams = []
        for index in range(2):
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
            stream.disposition = av.stream.Disposition.default if index == default else av.stream.Disposition(0)
            streams.append(stream)
        for count in range(3):
            for index, stream in enumerate(streams):
                frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 60 + 100 * index, np.uint8), format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    frames = read_video(path).frames
    assert frames.shape == (3, 32, 48, 3)
    assert abs(frames.mean() - (60 + 100 * default)) < 4
    assert abs(next(iterate_frames(path)).mean() - (60 + 100 * default)) < 4


def corrupted(path: Path, numbers: list[int]) -> None:
    """Writes 12 frames of noise and overwrites half of the data of some."""
    rng = np.random.default_rng(0)
    write_video(path, rng.integers(0, 255, (12, 96, 96, 3), dtype=np.uint8))
    with av.open(str(path)) as container:
        entries = list(container.streams.video[0].index_entries)
    data = bytearray(path.read_bytes())
    for number in numbers:
        entry = entries[number]
        begin, end = entry.pos + entry.size // 2, entry.pos + entry.size
        data[begin:end] = b"\xff" * (end - begin)
    path.write_bytes(data)


def test_corrupt_frames_are_named(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    corrupted(path, [2])
    for read in (read_video, StreamedVideo):
        with pytest.warns(UserWarning, match=r"clip\.mp4: the decoder calls 1 of 12 frames corrupt: 2$"):
            read(path)
        with pytest.warns(UserWarning, match=r"calls 1 of 3 frames corrupt: 2$"):
            read(path, start=1, max_frames=3)
    with pytest.warns(UserWarning, match=r"clip\.mp4: the decoder calls frame 2 corrupt"):
        assert len(list(iterate_frames(path))) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_video(path, max_frames=2)
    with pytest.raises(ValueError, match="the decoder calls all of its 1 frames corrupt"):
        read_video(path, start=2, max_frames=1, min_frames=1)


def test_an_edit_list_cuts_nothing_off(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    grey = np.broadcast_to(np.arange(10, dtype=np.uint8)[:, None, None, None] * 20, (10, 32, 48, 3))
    write_video(path, grey, fps=10)
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12
    duration, begin = struct.unpack(">II", data[place : place + 8])
    tenth = 1024
    data[place : place + 8] = struct.pack(">II", duration // 2, begin + 2 * tenth)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        video = read_video(path)
        streamed = StreamedVideo(path)
    np.testing.assert_allclose(video.frames[:, 0, 0, 0], [40, 60, 80, 100, 120], atol=3)
    assert len(streamed) == 5
    assert video.info.frames == 5
    np.testing.assert_allclose(video.times, [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)


def test_times_of_a_variable_rate_are_kept(tmp_path: Path) -> None:
    times = [0, 40, 80, 300, 340, 1000, 1040, 1100]
    write_h264(tmp_path / "clip.mp4", np.stack([CORNERS] * 8), times=times)
    video = read_video(tmp_path / "clip.mp4")
    np.testing.assert_allclose(video.times, np.array(times) / 1000, atol=1e-4)
    part = StreamedVideo(tmp_path / "clip.mp4", start=2, max_frames=3)
    np.testing.assert_allclose(part.times, [0.08, 0.3, 0.34], atol=1e-4)
    np.testing.assert_allclose(read_video(tmp_path / "clip.mp4", fps=5, start=1).times, np.arange(1, 8) / 5)
    write_video(tmp_path / "frames", [CORNERS] * 3)
    np.testing.assert_allclose(read_video(tmp_path / "frames").times, np.arange(3) / 24)


@pytest.mark.parametrize(("trc", "hdr"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_named(tmp_path: Path, trc: int, hdr: str) -> None:
    path = tmp_path / "clip.mp4"
    write_h264(path, np.stack([CORNERS] * 3), trc=trc)
    assert probe_video(path).hdr == hdr
    with pytest.warns(UserWarning, match=rf"clip\.mp4 is a video of high dynamic range \({hdr}\)"):
        assert read_video(path).info.hdr == hdr
    with pytest.warns(UserWarning, match=hdr):
        assert StreamedVideo(path).info.hdr == hdr
    with pytest.warns(UserWarning, match=hdr):
        list(iterate_frames(path))


def test_standard_range_is_not_remarked_on(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", [CORNERS] * 2)
    assert probe_video(tmp_path / "clip.mp4").hdr is None
    assert probe_video(tmp_path / "clip.mp4").remarks == ()


def test_a_folder_of_videos_and_pictures_is_neither(tmp_path: Path) -> None:
    for number in range(3):
        imageio.imwrite(tmp_path / f"{number}.png", CORNERS)
    (tmp_path / "clip.mp4").write_bytes(b"")
    for read in (read_video, StreamedVideo, probe_video):
        with pytest.raises(ValueError, match=r"holds videos \(clip\.mp4\) and pictures \(0\.png, \.\.\.\)"):
            read(tmp_path)


@pytest.mark.parametrize("other", ["thumbnail.png", "cover.jpg", "thumb_256.png", ".DS_Store"])
def test_a_thumbnail_is_no_frame(tmp_path: Path, other: str) -> None:
    for number in range(3):
        imageio.imwrite(tmp_path / f"frame_{number:04d}.png", np.full((8, 8, 3), 10 * number, np.uint8))
    if other.startswith("."):
        (tmp_path / other).write_bytes(b"")
        frames = read_video(tmp_path).frames
    else:
        imageio.imwrite(tmp_path / other, np.full((8, 8, 3), 200, np.uint8))
        assert probe_video(tmp_path).frames == 3
        with pytest.warns(UserWarning, match=rf"numbered like frame_0000\.png; {other} is not read as one of them"):
            frames = read_video(tmp_path).frames
    assert frames[:, 0, 0, 0].tolist() == [0, 10, 20]


def test_several_series_of_frames_are_named(tmp_path: Path) -> None:
    for side, number in itertools.product(("left", "right"), range(3)):
        imageio.imwrite(tmp_path / f"{side}{number}.png", CORNERS)
    with pytest.raises(ValueError, match=r"several series of pictures: left0\.png \(3\), right0\.png \(3\)"):
        read_video(tmp_path)


def test_frames_without_numbers_are_frames(tmp_path: Path) -> None:
    for name, grey in (("a", 1), ("b", 2), ("last", 3)):
        imageio.imwrite(tmp_path / f"{name}.png", np.full((8, 8, 3), grey, np.uint8))
    assert read_video(tmp_path).frames[:, 0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("trc", "kept"), [(16, ["PQ"]), (2, [])])
def test_results_say_that_their_video_was_of_high_dynamic_range(tmp_path: Path, trc: int, kept: list[str]) -> None:
    write_h264(tmp_path / "clip.mp4", np.stack([CORNERS] * 3), trc=trc)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        video = StreamedVideo(tmp_path / "clip.mp4")
    tracks = Tracks(np.zeros((3, 1, 2)), np.ones((3, 1), bool), np.ones((3, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was said when the video was opened is not said again
        write_track_results(tmp_path, video, tracks, np.array([[0, 0.0, 0.0]]))
    with np.load(tmp_path / "tracks.npz") as arrays:
        assert [str(arrays[name]) for name in arrays if name == "hdr"] == kept
    assert Tracks.load(tmp_path / "tracks.npz").frames == 3
