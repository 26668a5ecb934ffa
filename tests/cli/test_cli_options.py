"""Wrong values on the command line: refused by the option's name, with status 2."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corrdit.cli import main
from corrdit.cli.frame_options import frame_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "[]"], "--steps [] names none"),
        (["--layers", "[]"], "--layers [] names none"),
        (["--layers", "45"], "--layers"),
        (["--layers", "[4.7]"], "--layers"),
        (["--layrs", "[4]"], "unrecognized arguments: --layrs [4]; did you mean --layers?"),
        (["--dtype", "float8"], "--dtype must be one of float32, bfloat16, float16, got 'float8'"),
        (["--device", "cuda"], "--device cuda is not usable here; accepted are cpu ("),
    ],
)
def test_wrong_values_are_refused_by_name(
    refused: Callable[..., str], drifting_tracker: Any, clip: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refused("track", clip, "--output", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_an_output_without_a_name_is_refused(
    clip: Path, drifting_tracker: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["track", str(clip)], ["train"], ["world"], ["bench"], ["kernels"], ["calibrate", "--analysis=a"]):
        assert main([*command, "--output="]) == 2
        assert "--output is an empty name; give that of a folder or file" in capsys.readouterr().err


def test_what_is_required_is_named_as_it_is_typed(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(clip)]) == 2
    example = "as in: corrdit track my_video.mp4 --output tracks\n"
    assert capsys.readouterr().err == f"corrdit track: --output DIR is required, {example}"
    assert main(["track"]) == 2
    assert capsys.readouterr().err == f"corrdit track: VIDEO, --output DIR are required, {example}"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"[: {", "parsing"),
        (b"- 1", "config"),
        (b"layrs: [1]", "Option 'layrs' is not accepted; did you mean --layers?"),
        (b"start: [1, 2]", "--start"),
        (b"\xff\xfe\x00", "decode"),
        (b"start: {a: 1}", "--start"),
        (b"a: &a [x]\nb: [" + b"*a, " * 30 + b"]", "30 YAML aliases"),
    ],
)
@pytest.mark.parametrize("command", ["track", "evaluate", "train"])
def test_wrong_configurations_are_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], contents: bytes, message: str, command: str
) -> None:
    file = tmp_path / "options.yaml"
    file.write_bytes(contents)
    assert main([command, "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    if command == "track":
        assert message in error


@pytest.mark.parametrize("given", [["--steps", "-1,-2"], ["--steps=-1,-2"], ["--steps", "[-1,-2]"]])
def test_lists_of_numbers_from_the_end(clip: Path, tmp_path: Path, drifting_tracker: Any, given: list[str]) -> None:
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), *given]) == 0
    assert tuple(drifting_tracker.asked["steps"]) == (-1, -2)


def test_short_names_of_precisions(clip: Path, tmp_path: Path, drifting_tracker: Any) -> None:
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--dtype", "bf16"]) == 0


def test_a_backend_that_cannot_run_here_is_bad_input(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", str(clip), "--output", str(tmp_path / "out"), "--backend", "triton"]) == 2
    assert 'backend="triton" cannot run' in capsys.readouterr().err


def test_earlier_names_work_with_one_warning_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = ["world", "--videos", "1", "--points", "2"]
    assert main([*world, "--num-frames", "2", "--size", "16x24", "--output", str(tmp_path / "new")]) == 0
    assert "warning" not in capsys.readouterr().err
    earlier = ["--frames", "2", "--height", "16", "--width", "24"]
    assert main([*world, *earlier, "--output", str(tmp_path / "old")]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "corrdit world: warning: --height is now --size HEIGHTxWIDTH; the old name goes in corrdit 0.3",
        "corrdit world: warning: --frames is now --num-frames; the old name goes in corrdit 0.3",
    ]
    assert (tmp_path / "old" / "0000.npz").read_bytes() == (tmp_path / "new" / "0000.npz").read_bytes()
    config = tmp_path / "world.yaml"
    config.write_text("size: [16, 24]\nframes: 2\n")
    assert main([*world, "--config", str(config), "--output", str(tmp_path / "told")]) == 0
    assert (tmp_path / "told" / "0000.npz").read_bytes() == (tmp_path / "new" / "0000.npz").read_bytes()


def test_sizes_are_height_by_width() -> None:
    assert frame_size("480x720") == frame_size([480, 720]) == (480, 720)
    for wrong in ("480", "480x", "-4x8", "480x720x3", "axb"):
        with pytest.raises(ArgumentTypeError, match="is not a size; accepted is HEIGHTxWIDTH in pixels"):
            frame_size(wrong)
