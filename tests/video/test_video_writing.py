"""Written videos play anywhere, and are whole or not there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from corrdit.video import VideoWriter, read_video, write_video

COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [128, 64, 200], [255, 255, 255], [0, 0, 0], [200, 120, 80]],
    np.uint8,
)


def colour_bars(frames: int = 3, height: int = 64) -> np.ndarray:
    return np.broadcast_to(np.repeat(COLOURS, 16, axis=0), (frames, height, 128, 3)).copy()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".gif", ""])
def test_colours_survive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bars{suffix}"
    write_video(path, colour_bars(), fps=10)
    read = read_video(path)
    assert read.frames.shape == (3, 64, 128, 3)
    assert read.fps == (24 if suffix == "" else 10)
    tolerance = 0 if suffix == "" else 4
    assert np.abs(read.frames[1, 32, 8::16].astype(int) - COLOURS).max() <= tolerance
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_mp4_is_what_players_expect(tmp_path: Path) -> None:
    write_video(tmp_path / "bars.mp4", colour_bars(), fps=29.97)
    with av.open(str(tmp_path / "bars.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(29.97, abs=0.01)
    head = (tmp_path / "bars.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat"), "starts to play before it is loaded whole"


@pytest.mark.parametrize("height, width", [(33, 48), (32, 49), (33, 49)])
def test_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    frames = np.zeros((3, height, width, 3), np.uint8)
    frames[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)
    write_video(tmp_path / "odd.mp4", frames)
    read = read_video(tmp_path / "odd.mp4").frames
    assert read.shape[1:3] == (height + height % 2, width + width % 2)
    assert np.abs(read[:, :height, :width].astype(int) - frames).mean() < 4
    write_video(tmp_path / "odd.gif", frames)
    assert read_video(tmp_path / "odd.gif").frames.shape == frames.shape


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_a_failure(tmp_path: Path, suffix: str, failure: type[BaseException]) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield from colour_bars(2)
        raise failure

    with pytest.raises(failure):
        write_video(tmp_path / f"bars{suffix}", frames())
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "bars.mp4"
    write_video(path, colour_bars(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="frame 1 is"), VideoWriter(path) as writer:
        list(map(writer.write, [colour_bars()[0], colour_bars(1, 32)[0]]))
    assert path.read_bytes() == before
    write_video(path, colour_bars(2))
    assert len(read_video(path).frames) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_bad_frames_and_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"accepted endings are \.mp4, \.mov and \.gif"):
        write_video(tmp_path / "bars.wmv", colour_bars())
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "bars.mp4", colour_bars(), fps=0)
    with pytest.raises(ValueError, match="no frames were given"):
        write_video(tmp_path / "bars.mp4", [])
    with pytest.raises(ValueError, match=r"float64 \[64, 128, 3\]; accepted is uint8"):
        write_video(tmp_path / "bars.mp4", colour_bars() / 255.0)
    with pytest.raises(ValueError, match="frame 1 is"):
        write_video(tmp_path / "bars.mp4", [colour_bars()[0], colour_bars(1, 32)[0]])
    with pytest.raises(ValueError, match="does not exist"):
        write_video(tmp_path / "nowhere" / "bars.mp4", colour_bars())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write_video(tmp_path / "full", colour_bars())
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["keep.txt"]


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs to be root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
def test_full_disk(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 128, 128, 3), dtype=np.uint8)
    with tiny_disk(tmp_path / "disk", "200k") as disk:
        with pytest.raises(OSError, match="No space left"):
            write_video(disk / f"noise{suffix}", noise)
        assert list(disk.iterdir()) == []


ON_ONE_CORE = """
import os, sys
import numpy as np
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from corrdit.video import write_video
rng = np.random.default_rng(0)
write_video(sys.argv[1], rng.integers(0, 255, (8, 240, 320, 3), dtype=np.uint8))
"""


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".gif"])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 240, 320, 3), dtype=np.uint8)
    for name in ("one", "two"):
        write_video(tmp_path / f"{name}{suffix}", frames)
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    if hasattr(os, "sched_setaffinity"):
        # As in a process whose memory is not fresh: the C library fills what it hands out.
        environment = {**os.environ, "MALLOC_PERTURB_": "1"}
        command = [sys.executable, "-c", ON_ONE_CORE, str(tmp_path / f"core{suffix}")]
        subprocess.run(command, check=True, timeout=120, env=environment)
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"core{suffix}").read_bytes()


def test_the_number_of_cores_does_not_matter(tmp_path: Path) -> None:
    """The encoder writes the number of its threads into the file, which must not be that of the machine's cores."""
    write_video(tmp_path / "bars.mp4", np.zeros((3, 240, 320, 3), np.uint8))
    assert b" threads=1 " in (tmp_path / "bars.mp4").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ""])
def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("n" * (250 - len(suffix)) + suffix)
    write_video(path, colour_bars(2))
    assert len(read_video(path).frames) == 2
    assert list(tmp_path.iterdir()) == [path]
    path = tmp_path / ("ü" * 120 + suffix)
    write_video(path, colour_bars(2))
    assert len(read_video(path).frames) == 2


@pytest.mark.parametrize("suffix", [".mp4", ""])
def test_a_broken_link_is_named(tmp_path: Path, suffix: str) -> None:
    link = tmp_path / f"link{suffix}"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"link{suffix} is a link to .*nowhere, which does not exist"):
        write_video(link, colour_bars(2))
    assert link.is_symlink()
    (tmp_path / "folder").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"folder is a link to .*gone, which does not exist"):
        write_video(tmp_path / "folder" / f"bars{suffix}", colour_bars(2))
