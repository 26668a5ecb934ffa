"""Pictures of chosen layers, steps, points and words, in the report and as PNG and mp4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import load_backbone
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.analysis.sources import AnalysisVideo
from corrdit.cli import main
from corrdit.integrations.diffusers.analysis import analyze_generation
from corrdit.integrations.diffusers.analysis.generation import generation_arguments, generation_truth
from corrdit.integrations.diffusers.analysis.painting import drawn_pictures, write_pictures
from corrdit.integrations.diffusers.analysis.video_pictures import PictureChoice, generated_pictures, video_pictures
from corrdit.tracking.pseudo_truth import starting_points
from corrdit.video import read_video, write_video

SIZE = {"height": 64, "width": 64, "num_frames": 9}
OPTIONS = AnalysisOptions(steps=(0, 1), inference_steps=2, per_head=False)


@pytest.fixture(scope="module")
def tracks() -> tuple[np.ndarray, np.ndarray]:
    grid = starting_points("scene", 64, 64)[:, 1:]
    return np.repeat(grid[None], 9, 0) + np.arange(9, dtype=np.float32)[:, None, None], np.ones((9, 100), bool)


def test_maps_of_a_generated_video_are_those_of_its_own_denoising(tiny_folder, tracks):
    backbone = load_backbone(tiny_folder)
    kept = {}
    made = analyze_generation(
        backbone,
        "a dog runs",
        tracks=tracks,
        options=OPTIONS,
        seed=42,
        call=SIZE,
        on_reading=lambda step, layer, name, reading: kept.__setitem__((step, layer, name), reading),
    )
    truth = generation_truth(backbone, tracks, (64, 64))
    choice = PictureChoice(points=((10.0, 20.0), (50.0, 40.0)), words=("dog", "runs"))
    found = generated_pictures(
        backbone,
        "a dog runs",
        truth,
        seed=42,
        call=generation_arguments(backbone, "a dog runs", OPTIONS, SIZE),
        timesteps={0: 999.0, 1: 499.0},
        layers=[0, 2],
        options=OPTIONS,
        choice=choice,
    )
    assert [(each.step, each.layer) for each in found] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for each in found:
        reading = kept[each.step, each.layer, "attention"]
        assert torch.equal(each.reading.positions[0], reading.positions[0])
        assert np.array_equal(each.encoded.frames, made.video)
        assert each.words == ("dog", "runs")
        assert each.attention.rows.shape == (2, 3, 4, 4)
        assert each.text.shape == (2, 3, 4, 4)
        assert each.marks[0].tolist() == [[10.0, 20.0], [50.0, 40.0]]
        assert np.isnan(each.marks[1:]).all()
    # The second word is the third token, whichever is drawn first.
    other = generated_pictures(
        backbone,
        "a dog runs",
        truth,
        seed=42,
        call=generation_arguments(backbone, "a dog runs", OPTIONS, SIZE),
        timesteps={1: 499.0},
        layers=[2],
        options=OPTIONS,
        choice=PictureChoice(words=("runs",)),
    )
    torch.testing.assert_close(other[0].text[0], found[3].text[1])
    assert len(other[0].marks[0]) == 3


def test_sheets_and_films_are_written(tiny_folder, moving_video, tmp_path):
    backbone = load_backbone(tiny_folder)
    video, xy, visible = moving_video
    options = AnalysisOptions(steps=(-1,), features=False, per_head=False)
    (found,) = video_pictures(
        backbone,
        AnalysisVideo(video, xy, visible, "a dog runs"),
        timesteps={49: 19.0},
        layers=[1],
        options=options,
        choice=PictureChoice(points=((12.0, 20.0),), words=("dog",)),
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "stale.png").write_bytes(b"")
    files = write_pictures(folder, drawn_pictures(found, name="a", head=None, films=True))
    names = {"attention_point1", "words", "matches", "truth"}
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "mp4")}
    expected |= {"components.png", "components_queries.mp4", "components_keys.mp4"}
    assert {file.name for file in files} == {file.name for file in folder.iterdir()} == expected
    for name, count in (("attention_point1", 5), ("words", 5), ("matches", 5), ("components_keys", 5)):
        assert read_video(folder / f"{name}.mp4").frames.shape == (count, 480, 480, 3)
    assert not any(drawn.films for drawn in drawn_pictures(found, name="a", head=None))


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"points": ((1.0,),)}, r"a point of pictures is \(x, y\)"),
        ({"points": ((1.0, float("nan")),)}, "a point's coordinate"),
    ],
)
def test_points_are_pairs_of_numbers(choice, message):
    with pytest.raises(ValueError, match=message):
        PictureChoice(**choice)


@pytest.mark.slow
def test_the_command_draws_what_is_chosen(tiny_folder, moving_video, tmp_path, capsys):
    video, xy, visible = moving_video
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "a.mp4", video, 8.0)
    np.savez(tmp_path / "videos" / "a.npz", video=video, xy=xy, visible=visible)
    given = ["analyze", "--videos", tmp_path / "videos", "--output", tmp_path / "out", "--model", tiny_folder]
    given += ["--steps", "0,1", "--inference-steps", "2", "--features", "false", "--per-head", "false"]

    def run(*further: str) -> int:
        return main([*map(str, given), *further])

    assert run("--picture-layers", "[0,2]", "--picture-steps", "[1]", "--picture-points", "[[20,30]]") == 0
    places = sorted(path.name for path in (tmp_path / "out" / "pictures" / "a.mp4").iterdir())
    assert places == ["step1_layer0", "step1_layer2"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "layer 0, timestep" in page
    assert "layer 2, timestep" in page
    capsys.readouterr()
    assert run("--picture-layers", "[7]") == 2
    assert "layer 7 is to be drawn, but the analysis read the layers 0, 1, 2" in capsys.readouterr().err
    assert run("--picture-points", "[[1]]") == 2
    assert "a point of pictures is (x, y)" in capsys.readouterr().err
