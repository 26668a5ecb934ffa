"""Tables of pairs for motion transfer: DiTFlow's own, CSV files, and what is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from corrdit.data.motion_pairs import Pair, chosen_frames, read_pairs

RELEASED = """const prompts = {
    'bear': {
      'easy': 'A bear walking on the rocks',
      'medium': 'A giraffe walking on the rocks',
      'hard': 'A giraffe walking in the zoo',
      'frame_range': '[0, 72, 3]'
    },
    'bmx-trees': {
      'easy': "A kid's bike",
      'medium': 'Leopard running up a grassy hill',
      'hard': 'Leopard running up a snowy hill in a forest',
      'frame_range': '[4, 28, 1]'
    },
  };
"""


@pytest.fixture
def davis(tmp_path):
    """Folders of pictures, as DAVIS has them, and a file."""
    for name in ("bear", "bmx-trees"):
        (tmp_path / "davis" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "davis" / name / "00000.jpg")
    (tmp_path / "davis" / "clip.mp4").touch()
    return tmp_path / "davis"


def written(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", ["js", "json"])
def test_the_released_table_gives_three_pairs_a_video_with_its_frames(tmp_path, davis, suffix):
    import ast

    text = RELEASED
    if suffix == "json":
        text = json.dumps(ast.literal_eval(text.partition("=")[2].strip().rstrip(";")))
    pairs = read_pairs(written(tmp_path, text, f"prompts.{suffix}"), davis)
    assert [pair["name"] for pair in pairs] == [
        f"{video}-{kind}" for video in ("bear", "bmx-trees") for kind in ("caption", "subject", "scene")
    ]
    assert pairs[1] == {
        "name": "bear-subject", "video": str(davis / "bear"), "prompt": "A giraffe walking on the rocks", "seed": 0,
        "kind": "subject", "start": 0, "end": 72, "step": 3, "region": "",
    }  # fmt: skip
    assert pairs[3]["prompt"] == "A kid's bike"
    assert (pairs[5]["start"], pairs[5]["end"], pairs[5]["step"]) == (4, 28, 1)
    # 24 frames of each, as in the paper.
    assert {len(range(pair["start"], pair["end"], pair["step"])) for pair in pairs} == {24}


def test_csv_columns_are_all_read(tmp_path, davis):
    text = (
        "video,caption,scene,start,end,step,seed,name\nclip,a disc,over sand,2,20,3,5,first\nbear,a star,in snow,,,,,\n"
    )
    pairs = read_pairs(written(tmp_path, text), davis)
    assert [(pair["name"], pair["kind"], pair["prompt"]) for pair in pairs] == [
        ("first-caption", "caption", "a disc"),
        ("first-scene", "scene", "over sand"),
        ("0001-caption", "caption", "a star"),
        ("0001-scene", "scene", "in snow"),
    ]
    assert pairs[0]["video"] == str(davis / "clip.mp4")
    assert [pairs[0][key] for key in ("start", "end", "step", "seed")] == [2, 20, 3, 5]
    assert [pairs[2][key] for key in ("start", "end", "step", "seed")] == [0, None, 1, 0]
    (one,) = read_pairs(written(tmp_path, "video,prompt\nclip.mp4,a disc\n"), davis, stride=2)
    assert (one["name"], one["kind"], one["step"]) == ("0000", "", 2)


def test_frames_are_those_of_the_range():
    frames = np.arange(30)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    pair = Pair(name="a", video="a.mp4", prompt="", seed=0, kind="", start=4, end=28, step=3)
    assert chosen_frames(frames, pair)[:, 0, 0, 0].tolist() == list(range(4, 28, 3))
    assert len(chosen_frames(frames, {**pair, "end": None})) == 9
    with pytest.raises(ValueError, match=r"frames 4 to 31 are wanted, but a.mp4 has 30 frames"):
        chosen_frames(frames, {**pair, "end": 31})


@pytest.mark.parametrize(
    "text, message",
    [
        ("video,prompt,subjct\nclip,a,b\n", "has the column 'subjct', which means nothing here; did you mean subject"),
        ("video,prompt,scene\nclip,a,b\n", "has the columns prompt and scene"),
        ("video\nclip\n", "has no column prompt"),
        ("prompt\na\n", "has no column video"),
        ("video,prompt\n", "lists no pairs"),
        ("video,prompt\nclip,a,b\n", "row 1: more fields than"),
        ("video,prompt\nclip,\n", "row 1: the column prompt is empty"),
        ("video,caption,scene\nclip,a,\n", "row 1: the column scene is empty"),
        ("video,prompt,start\nclip,a,-1\n", "start must be a whole number of at least 0, got '-1'"),
        ("video,prompt,step\nclip,a,0\n", "step must be a whole number of at least 1, got '0'"),
        ("video,prompt,start,end\nclip,a,8,8\n", "the frames 8 to 8 are none"),
        ("video,prompt,name\nclip,a,../b\n", "is no name of a folder"),
        ("video,prompt,name\nclip,a,b\nclip,a,b\n", "has the name 'b' more than once"),
        ("video,prompt\nnone,a\n", "is no video and no folder of pictures"),
    ],
)
def test_tables_are_refused_by_name(tmp_path, davis, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path, text), davis)


@pytest.mark.parametrize(
    "text, message",
    [
        ("const prompts = {'bear': {'easy': 'a', 'hardest': 'b'}}", "bear: 'hardest' means nothing here"),
        ("const prompts = {'bear': {'frame_range': '[0, 72, 3]'}}", "bear: there is no prompt"),
        ("const prompts = {'bear': {'easy': 'a', 'frame_range': '[0, 72]'}}", r"must be \[start, end, step\]"),
        ("const prompts = {'bear': {'easy': 'a', 'frame_range': '[72, 8, 3]'}}", "the frames 72 to 8 are none"),
        ("const prompts = ['bear']", "with an object for each video"),
        ("const prompts = {'bear': open('x')}", "is not a table as DiTFlow's"),
    ],
)  # fmt: skip
def test_released_tables_are_refused_by_name(tmp_path, davis, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path, text, "prompts.js"), davis)


def test_a_stride_beside_the_tables_own_is_refused(tmp_path, davis):
    with pytest.raises(ValueError, match="the table has a step of 3; leave stride out"):
        read_pairs(written(tmp_path, RELEASED, "prompts.js"), davis, stride=2)
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1"):
        read_pairs(written(tmp_path, "video,prompt\nclip,a\n"), davis, stride=0)


def test_a_region_is_a_box_or_a_mask_beside_the_table(tmp_path, davis):
    text = 'video,prompt,region\nclip,a disc,"[0, 0, 0.5, 1]"\nbear,a star,masks/bear.png\nbear,grass,\n'
    regions = [pair["region"] for pair in read_pairs(written(tmp_path, text), davis)]
    assert regions == ["[0, 0, 0.5, 1]", str(tmp_path / "masks" / "bear.png"), ""]
    with pytest.raises(ValueError, match="row 1: region must be the path of a mask, or a box such as"):
        read_pairs(written(tmp_path, 'video,prompt,region\nclip,a disc,"[0, 0,"\n'), davis)
