"""`corrdit world`: a folder holds one set of videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from corrdit.cli import main
from corrdit.data import TapVidSet
from corrdit.integrations.embedded import world
from corrdit.integrations.embedded.world import Clip, WorldConfig, clips

SMALL = ("--num-frames", "2", "--size", "33x47", "--points", "3")


def test_a_smaller_set_is_not_written_over_a_larger_one(refused: Callable[..., str], tmp_path: Path) -> None:
    """The videos of the larger one would stay, and both would be read as one set."""
    output = ("world", "--output", str(tmp_path / "world"), *SMALL)
    assert main([*output, "--videos", "2", "--tapvid"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "world").iterdir()}
    assert sorted(before) == ["0000.mp4", "0000.npz", "0001.mp4", "0001.npz", "prompts.csv", "world.pkl"]
    assert "0001.mp4, which this call would leave" in refused(*output, "--videos", "1", "--seed", "3", "--tapvid")
    assert "world.pkl, which this call would leave" in refused(*output, "--videos", "2", "--seed", "3")
    assert "other settings: seed 0 (now 3); give" in refused(*output, "--videos", "3", "--seed", "3", "--tapvid")
    assert "width 47 (now 48)" in refused(*output, "--videos", "3", "--tapvid", "--size", "33x48")
    assert {path.name: path.read_bytes() for path in (tmp_path / "world").iterdir()} == before
    assert main([*output, "--videos", "3", "--tapvid"]) == 0
    assert len(TapVidSet(tmp_path / "world").index()) == 3
    (tmp_path / "world" / "0000.npz").write_bytes(before["0000.npz"][:200])
    assert main([*output, "--videos", "3", "--tapvid"]) == 0
    assert (tmp_path / "world" / "0000.npz").read_bytes() == before["0000.npz"]


def test_a_set_that_another_call_finished_meanwhile_is_not_replaced(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("world", "--output", str(tmp_path / "world"), *SMALL, "--videos", "1")
    drawn = clips.generate

    def slow(seeds: list[int], config: WorldConfig) -> list[Clip]:
        if not (tmp_path / "world").exists():
            monkeypatch.setattr(world, "generate", drawn)
            assert main([*output, "--seed", "5"]) == 0
            capsys.readouterr()
        return drawn(seeds, config)

    monkeypatch.setattr(world, "generate", slow)
    assert "other settings: seed 5 (now 6)" in refused(*output, "--seed", "6")
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert main([*output, "--seed", "5"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--videos", "0"), "--videos 0 was given; accepted is 1 or more"),
        (("--size", "4x16"), "height of a generated video must be a whole number of at least 8, got 4"),
        (("--num-frames", "2.5"), "frames"),
        (("--seed", "-1"), "--seed -1 was given"),
    ],
)
def test_bad_options_leave_no_folder(
    refused: Callable[..., str], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused("world", "--output", tmp_path / "world", *options)
    assert not (tmp_path / "world").exists()
