"""Pairs of videos and prompts through Lightning."""

import json
import pathlib
import subprocess
import sys

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from corrdit.integrations.diffusers.motion_transfer import StoredMotion
from corrdit.integrations.lightning import TransferDataModule, TransferModule
from corrdit.integrations.lightning.transfer import read_pairs
from corrdit.video import read_video, write_video

SETTINGS = {"steps": 2, "guided_share": 0.5, "optimisation_steps": 1, "blocks": (1,)}


@pytest.fixture
def pairs(tmp_path):
    """A CSV file with three pairs, the last of which names a video that is not there; and a model."""
    from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_pipeline(build_transformer(layers=2, heads=2, head_dim=16)).save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        write_video(tmp_path / f"{name}.mp4", [np.roll(picture, 4 * frame, axis=1) for frame in range(3)], 8)
    table = tmp_path / "pairs.csv"
    table.write_text("video,prompt,seed\none.mp4,a red disc,3\ntwo.mp4,a star over sand,\nnone.mp4,grass,0\n")
    return table


def trainer():
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_pairs_are_transferred_once_and_broken_ones_reported(pairs, tmp_path):
    output, model = tmp_path / "out", str(tmp_path / "model")
    module = TransferModule(model, output=output, settings=SETTINGS)
    results = trainer().predict(module, TransferDataModule(pairs, output=output))
    assert [result["name"] for result in results] == ["0000", "0001", "0002"]
    assert "motion_fidelity" in results[0]
    assert "none.mp4" in results[2]["error"]
    assert json.loads((output / "0002" / "failed.json").read_text())["prompt"] == "grass"
    assert json.loads((output / "0000" / "pair.json").read_text())["seed"] == 3
    assert read_video(output / "0001" / "result.mp4").frames.shape == (3, 16, 16, 3)
    page = (output / "index.html").read_text()
    assert "0000/result.mp4" in page
    assert "a star over sand" in page

    write_video(tmp_path / "none.mp4", list(read_video(tmp_path / "one.mp4").frames), 8)
    first = (output / "0000" / "result.mp4").stat().st_mtime_ns
    again = TransferModule(model, output=output, settings=SETTINGS)
    results = trainer().predict(again, TransferDataModule(pairs, output=output))
    assert [result["name"] for result in results] == ["0002"]
    assert (output / "0000" / "result.mp4").stat().st_mtime_ns == first
    assert not (output / "0002" / "failed.json").exists()
    assert not [path for path in output.iterdir() if path.name.startswith(".")]

    other = TransferModule(model, output=output, settings={**SETTINGS, "temperature": 3.0})
    with pytest.raises(ValueError, match="made with other settings"):
        trainer().predict(other, TransferDataModule(pairs, output=output))
    pairs.write_text("video,prompt\none.mp4,another prompt\n")
    with pytest.raises(ValueError, match="result of another pair"):
        trainer().predict(again, TransferDataModule(pairs, output=output))


def test_a_column_says_where_the_motion_is_wanted(pairs, tmp_path):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:, :8] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    pairs.write_text('video,prompt,region\none.mp4,a disc,"[0, 0, 0.5, 1]"\none.mp4,a disc,left.png\none.mp4,a disc,\n')
    output, model = tmp_path / "out", str(tmp_path / "model")
    module = TransferModule(model, output=output, settings=SETTINGS, measure=False)
    trainer().predict(module, TransferDataModule(pairs, output=output))
    box, picture, whole = (StoredMotion.load(output / f"{row:04d}" / "motion.safetensors") for row in range(3))
    torch.testing.assert_close(picture.tensors, box.tensors, rtol=0, atol=0)
    outside = [motion.tensors[0]["latent"][..., -1] for motion in (whole, box)]
    assert float((outside[0] - outside[1]).abs().max()) > 1e-3, "only the whole transfer moves latents there"

    Image.fromarray(255 - mask).save(tmp_path / "left.png")
    data = TransferDataModule(pairs, output=output)
    with pytest.warns(UserWarning, match="0001 \\(other region than before\\)"):
        assert data.left() == ["0001"]
    pairs.write_text("video,prompt\none.mp4,a disc\n")
    with pytest.raises(ValueError, match="result of another pair \\(region"):
        TransferDataModule(pairs, output=output).left()


def test_a_table_is_the_same_from_every_folder(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_pairs("pairs.csv") == read_pairs(pairs)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert read_pairs("../pairs.csv") == read_pairs(pairs)


def test_pairs_are_resampled_and_their_prompts_measured(pairs, tmp_path, monkeypatch):
    from corrdit import motion

    monkeypatch.setattr(motion, "PromptSimilarity", lambda name, device: lambda video, prompt: len(video) + len(prompt))
    settings = {**SETTINGS, "method": "backbone"}
    module = TransferModule(
        str(tmp_path / "model"), output=tmp_path / "out", settings=settings, fps=16, measure=False, clip="tiny"
    )
    with pytest.warns(UserWarning, match="3 frames at 8 a second are resampled to 6 at 16"):
        (result,) = trainer().predict(module, TransferDataModule(read_pairs(pairs)[:1]))
    assert result["image_quality"] == 6 + len("a red disc")
    made = read_video(tmp_path / "out" / "0000" / "result.mp4")
    assert (len(made.frames), made.fps) == (6, 16)


def test_a_broken_pair_can_stop_the_run(pairs, tmp_path):
    module = TransferModule(str(tmp_path / "model"), output=tmp_path / "out", settings=SETTINGS, on_broken="raise")
    only = [pair for pair in read_pairs(pairs) if pair["name"] == "0002"]
    with pytest.raises(ValueError, match="pair 0002"):
        trainer().predict(module, TransferDataModule(only))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt\nx\n", "no column video"),
        ("clip,prompt\na.mp4,x\n", "no column video"),
        ("video,prompt\na.mp4,\n", "row 1: the column prompt is empty"),
        ("video,prompt,seed\na.mp4,x,one\n", "seed must be a whole number"),
        ("video,prompt,seed\na.mp4,x,\u00b2\n", "seed must be a whole number"),
        ("video,prompt,name\na.mp4,x,n\nb.mp4,y,n\n", "more than once"),
        ("video,prompt,name\na.mp4,x,../n\n", "no name of a folder"),
        ("video,prompt\n", "lists no pairs"),
    ],
)
def test_tables_that_cannot_serve(tmp_path, text, message):
    table = tmp_path / "pairs.csv"
    table.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(table)


@pytest.mark.slow
def test_two_processes_share_the_pairs(pairs, tmp_path):
    pairs.write_text("video,prompt\none.mp4,disc\ntwo.mp4,star\none.mp4,ring\n")
    script = pathlib.Path(__file__).with_name("transfer_process.py")
    output = tmp_path / "out"
    command = [sys.executable, str(script), str(pairs), str(tmp_path / "model"), str(output), "2"]
    subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    lines = sorted(pathlib.Path(f"{output}.names").read_text().split("\n")[:-1])
    assert sorted(line.split()[1] for line in lines) == ["0000", "0001", "0002"]
    assert {line.split()[0] for line in lines} == {"0", "1"}
    assert (output / "index.html").read_text().count("<video") == 6
