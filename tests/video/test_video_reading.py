"""Every accepted kind of video is read upright, in RGB, streamed; everything else is refused in one line."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import av
import imageio.v3 as imageio
import numpy as np
import pytest

from corrdit.video import StreamedVideo, fit_size, iterate_frames, probe_video, read_video, write_video

HEIGHT, WIDTH, FRAMES = 32, 48, 5


def moving_square(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A red square that moves 4 pixels to the right each frame, over blue."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 2] = 160
    for index in range(frames):
        video[index, 8:16, 4 * index : 4 * index + 8] = (220, 30, 30)
    return video


def write_webm(path: Path, video: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture(params=["mp4", "mov", "gif", "webm", "folder"])
def video_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "webm":
        write_webm(tmp_path / "clip.webm", moving_square())
        return tmp_path / "clip.webm"
    path = tmp_path / ("clip" if request.param == "folder" else f"clip.{request.param}")
    write_video(path, moving_square(), fps=12.5)
    return path


def test_each_kind_gives_the_same_pictures(video_path: Path) -> None:
    video = read_video(video_path)
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    for index, frame in enumerate(video.frames.astype(int)):
        square = frame[10:14, 4 * index + 2 : 4 * index + 6].mean((0, 1))
        np.testing.assert_allclose(square, (220, 30, 30), atol=30)
        np.testing.assert_allclose(frame[22:30, 2:46].mean((0, 1)), (0, 0, 160), atol=16)


def test_probe_agrees_with_reading(video_path: Path) -> None:
    info = probe_video(video_path)
    assert (info.height, info.width, info.frames) == (HEIGHT, WIDTH, FRAMES)
    assert info.fps == pytest.approx({".webm": 12, "": 24}.get(video_path.suffix, 12.5), rel=0.02)


def test_start_max_frames_and_size(video_path: Path) -> None:
    whole = read_video(video_path).frames
    part = read_video(video_path, start=1, max_frames=3).frames
    np.testing.assert_array_equal(part, whole[1:4])
    small = read_video(video_path, max_side=24)
    assert small.frames.shape == (FRAMES, 16, 24, 3)
    averaged = whole.reshape(FRAMES, 16, 2, 24, 2, 3).mean((2, 4))
    assert np.abs(small.frames - averaged).mean() < 4


def test_frames_of_a_folder_are_sorted_naturally(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        imageio.imwrite(tmp_path / f"frame{number}.png", np.full((8, 8, 3), number, np.uint8))
    (tmp_path / ".hidden.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert read_video(tmp_path).frames[:, 0, 0, 0].tolist() == [1, 2, 9, 10]


def test_grey_sixteen_bit_and_transparent_frames_become_rgb(tmp_path: Path) -> None:
    imageio.imwrite(tmp_path / "1.png", np.full((8, 8), 100, np.uint8))
    imageio.imwrite(tmp_path / "2.png", np.full((8, 8), 100 * 257, np.uint16))
    imageio.imwrite(tmp_path / "3.png", np.full((8, 8, 4), (100, 100, 100, 255), np.uint8))
    assert (read_video(tmp_path).frames == 100).all()


def test_recorded_rotation_is_applied(tmp_path: Path) -> None:
    """A telephone writes a landscape picture and a display matrix that turns it."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :16] = (200, 40, 40)
    path = tmp_path / "telephone.mp4"
    write_video(path, [np.ascontiguousarray(np.rot90(upright))] * 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    quarter_clockwise = (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in quarter_clockwise)
    path.write_bytes(data)
    frames = read_video(path).frames
    assert frames.shape == (3, 48, 32, 3)
    assert np.abs(frames[1].astype(int) - upright).mean() < 8
    assert read_video(path, max_side=24).frames.shape == (3, 24, 16, 3)


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A frame that cannot be read is no trouble before it is reached."""
    for number in range(3):
        imageio.imwrite(tmp_path / f"{number}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "3.png").write_bytes(b"broken")
    frames = iterate_frames(tmp_path)
    assert [next(frames).shape for _ in range(3)] == [(8, 8, 3)] * 3
    with pytest.raises(ValueError, match=r"3\.png cannot be read as a picture"):
        next(frames)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_frames(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(count):
        imageio.imwrite(folder / f"{number}.png", np.zeros((8, 8, 3), np.uint8))
    expected = {0: "holds no png or jpg frames", 1: "gives 1 frame; at least 2 are needed"}[count]
    with pytest.raises(ValueError, match=expected):
        read_video(folder)


def test_one_frame_of_a_file(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", moving_square(1))
    with pytest.raises(ValueError, match=r"one\.mp4 gives 1 frame; at least 2 are needed, because tracking"):
        read_video(tmp_path / "one.mp4")
    assert len(read_video(tmp_path / "one.mp4", min_frames=1).frames) == 1


def test_start_beyond_the_end(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_square())
    with pytest.raises(ValueError, match="gives 0 frames from start=9 with max_frames=None"):
        read_video(tmp_path / "clip.mp4", start=9)
    with pytest.raises(ValueError, match="start must be 0 or more"):
        read_video(tmp_path / "clip.mp4", start=-1)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("missing.mp4", None, "there is no file or folder"),
        ("empty.mp4", b"", "is not a video that can be read"),
        ("text.mp4", b"hello\n" * 500, "is not a video that can be read"),
        ("text.txt", b"hello\n" * 500, "is not a video that can be read"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nclip.mp4\n", "is not a video that can be read"),
    ],
)
def test_not_a_video(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        read_video(tmp_path / name)
    assert name in str(caught.value)
    assert "accepted are mp4, mov, webm, mkv, avi and gif files and folders" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["https://example.com/clip.mp4", "s3://clips/clip.mp4", "file:///clip.mp4"])
def test_addresses_are_no_files(address: str) -> None:
    for read in (read_video, StreamedVideo, probe_video):
        with pytest.raises(ValueError, match=f"{address} is an address, .* download it first"):
            read(address)


def test_a_picture_and_a_sound_are_no_videos(tmp_path: Path) -> None:
    imageio.imwrite(tmp_path / "photo.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="is a single picture, one frame"):
        read_video(tmp_path / "photo.png")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="holds no moving picture"):
        read_video(tmp_path / "sound.mp4")


def test_truncated_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_video(tmp_path / "clip.mp4", rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8))
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "header.mp4").write_bytes(data[:200])
    with pytest.raises(ValueError, match="holds no moving picture"):
        read_video(tmp_path / "header.mp4")
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"half\.mp4 promises 12 frames and gives [1-9]; it seems to be cut off"):
        assert 1 <= len(read_video(tmp_path / "half.mp4").frames) <= 9


def test_damaged_frames_are_reported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_video(tmp_path / "clip.mp4", rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8))
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    middle = data.index(b"mdat") + 4 + len(data) // 2
    data[middle:-1] = bytes(len(data) - 1 - middle)
    (tmp_path / "damaged.mp4").write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.mp4 is damaged: frame [1-9]+ cannot be decoded"):
        read_video(tmp_path / "damaged.mp4")


def test_frames_of_different_sizes(tmp_path: Path) -> None:
    imageio.imwrite(tmp_path / "1.png", np.zeros((8, 8, 3), np.uint8))
    imageio.imwrite(tmp_path / "2.png", np.zeros((8, 10, 3), np.uint8))
    with pytest.raises(ValueError, match=r"2\.png has 8x10 pixels, the frames before it 8x8"):
        read_video(tmp_path)


def test_fit_size_keeps_the_shape_and_never_enlarges() -> None:
    assert fit_size(480, 720, 360) == (240, 360)
    assert fit_size(480, 720, 1000) == (480, 720)
    assert fit_size(2, 2000, 100) == (1, 100)
    with pytest.raises(ValueError, match="max_side=0"):
        fit_size(10, 10, 0)


def test_streamed_video_is_an_array_on_demand(video_path: Path) -> None:
    whole = read_video(video_path, max_side=24).frames
    streamed = StreamedVideo(video_path, max_side=24)
    assert streamed.shape == whole.shape
    assert streamed.dtype == np.uint8
    np.testing.assert_array_equal(streamed[0:2], whole[0:2])
    np.testing.assert_array_equal(streamed[3:9], whole[3:])
    np.testing.assert_array_equal(streamed[1:2], whole[1:2])
    np.testing.assert_array_equal(np.stack(list(streamed)), whole)
    assert streamed[4:4].shape == (0, *whole.shape[1:])
    part = StreamedVideo(video_path, start=1, max_frames=3, max_side=24)
    np.testing.assert_array_equal(part[1:3], whole[2:4])
    with pytest.raises(ValueError, match="slices of consecutive frames"):
        streamed[0]  # type: ignore[index]


def test_streamed_video_holds_few_frames(tmp_path: Path) -> None:
    """Reading 120 frames in pieces needs no more memory than a piece."""
    shape = (120, 128, 128, 3)
    write_video(tmp_path / "long.mp4", (np.full(shape[1:], index, np.uint8) for index in range(shape[0])))
    streamed = StreamedVideo(tmp_path / "long.mp4")
    tracemalloc.start()
    try:
        means = [streamed[start : start + 8].mean() for start in range(0, shape[0], 8)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.diff(means).min() > 0
    assert peak < 0.3 * np.prod(shape)


def test_streamed_video_refuses_what_read_video_refuses(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", moving_square(1))
    with pytest.raises(ValueError, match="gives 1 frame; at least 2 are needed"):
        StreamedVideo(tmp_path / "one.mp4")
    with pytest.raises(ValueError, match="start must be 0 or more"):
        StreamedVideo(tmp_path / "one.mp4", start=-1)
