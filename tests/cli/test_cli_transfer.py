"""corrdit transfer on an embedded pipeline with random weights."""

import json
import re

import numpy as np
import pytest
import torch

from corrdit.cli import main
from corrdit.video import read_video, write_video
from corrdit.visualization import write_comparison_page

SHORT = ["--steps", "2", "--guided-share", "0.5", "--optimisation-steps", "2", "--blocks", "[1]"]
FILES = {
    "result.mp4",
    "reference.mp4",
    "flow.npz",
    "flow_1_colours.png",
    "flow_1_arrows.png",
    "flow_latents_colours.png",
    "flow_latents_arrows.png",
    "losses.png",
    "motion.safetensors",
    "metrics.json",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a small embedded pipeline of random weights."""
    from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer

    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build_pipeline(build_transformer(layers=2, heads=2, head_dim=16))
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Four frames of 16 x 16 that move right by four pixels each, at 8 a second."""
    path = tmp_path_factory.mktemp("reference") / "clip.mp4"
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(2, 0).repeat(2, 1)
    write_video(path, [np.roll(picture, 4 * frame, axis=1) for frame in range(4)], 8)
    return str(path)


def test_a_transfer_writes_all_of_its_files(model, reference, tmp_path, capsys):
    output = tmp_path / "made" / "out"
    status = main(["transfer", reference, "a red disc", "--model", model, "--output", str(output), *SHORT])
    assert status == 0
    assert {file.name for file in output.iterdir()} == FILES
    assert read_video(output / "result.mp4").frames.shape == (4, 16, 16, 3)
    with np.load(output / "flow.npz") as flow:
        assert flow["block_1"].shape == (4, 4, 4, 4, 2)
        # Four pixels to the right are one token.
        assert (flow["latents"][0, 1, :, :3] == [1, 0]).mean() > 0.9
    facts = json.loads((output / "metrics.json").read_text())
    assert np.shape(facts["losses"]) == (1, 2)
    assert -1 <= facts["motion_fidelity"] <= 1
    assert facts["settings"]["blocks"] == [1]
    assert "4 frames of 16 x 16" in capsys.readouterr().out
    assert [file.name for file in output.parent.iterdir()] == ["out"]

    again = tmp_path / "again"
    stored = ["--stored", str(output / "motion.safetensors"), "--metrics", "false", "--format", "gif"]
    assert main(["transfer", "none", "grass", "--model", model, "--output", str(again), *SHORT, *stored]) == 0
    assert {file.name for file in again.iterdir()} == {"result.gif", "metrics.json"}
    write_comparison_page(tmp_path / "page.html", [("a <red> disc", {"mine": output / "result.mp4"})])
    page = (tmp_path / "page.html").read_text()
    assert 'src="made/out/result.mp4"' in page
    assert "a &lt;red&gt; disc" in page


def test_a_reference_of_another_rate_is_resampled_and_said_so(model, reference, tmp_path, capsys):
    options = ["--fps", "16", "--method", "backbone", "--metrics", "false", "--format", "frames", *SHORT]
    assert main(["transfer", reference, "", "--model", model, "--output", str(tmp_path / "out"), *options]) == 0
    assert "4 frames at 8 a second are resampled to 8 at 16" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "result").iterdir())) == 8


def test_a_folder_of_frames_is_replaced_and_the_loss_stands_beside_the_progress(
    model, reference, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    options = ["--metrics", "false", "--format", "frames", "--learning-rate", "0.02", *SHORT, "--blocks", "1"]
    options += ["--guided-share", "1", "--gradient-interval", "2"]
    command = ["transfer", reference, "", "--model", model, "--output", str(tmp_path / "out"), *options]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert re.search(r"loss \d+\.\d{3}", printed.err)
    assert re.search(r"loss \d+\.\d{3} to \d+\.\d{3}", printed.out)
    assert "NaN" not in printed.err
    (tmp_path / "out" / "result" / "old.png").touch()
    assert main(command) == 0
    assert [file.name for file in sorted((tmp_path / "out" / "result").iterdir())] == [f"0000{i}.png" for i in range(4)]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *(FILES - {"result.mp4", "reference.mp4"}),
        "result",
        "reference",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_run_killed_while_it_measures_does_not_denoise_again(model, reference, tmp_path, capsys, monkeypatch):
    from corrdit.integrations.diffusers.motion_transfer import results_on_disk
    from corrdit.integrations.diffusers.motion_transfer.guided_run import GuidedRun

    output = tmp_path / "out"
    command = ["transfer", reference, "disc", "--model", model, "--output", str(output), *SHORT]

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results_on_disk, "fidelity_of", killed)
        assert main(command) == 130
    assert [file.name for file in tmp_path.iterdir()] == [".out.transfer-state.safetensors"]
    monkeypatch.setattr(GuidedRun, "_optimise", killed)
    assert main(command) == 0
    assert {file.name for file in output.iterdir()} == FILES
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "[7]"], "names layer 7, but .* has 2 attention layers"),
        (["--method", "magic"], "method must be one of ditflow"),
        (["--height", "16"], "--height and --width go together"),
        (["--height", "18", "--width", "16"], "height 18 is not a multiple of 4"),
        (["--stored", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (["--num-frames", "0"], "num_frames must be a whole number of at least 1"),
        (["--fps", "0"], "fps must be above 0"),
        (["--max-frames", "1"], "the reference has 1 frames, .* give at least 2 frames"),
        (["--negative-prompt", "disc " * 40], "the negative prompt has .* takes 24; shorten it"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(model, reference, tmp_path, capsys, arguments, message):
    output = tmp_path / "out"
    status = main(["transfer", reference, "disc", "--model", model, "--output", str(output), *SHORT, *arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert list(tmp_path.iterdir()) == []


def test_prompts_and_references_that_cannot_serve(model, reference, tmp_path):
    from corrdit import MotionTransfer, load_backbone

    transfer = MotionTransfer(load_backbone(model), block=1, steps=2)
    video = read_video(reference).frames
    with pytest.raises(ValueError, match="takes 24; shorten it"):
        transfer(video, "disc " * 40)
    with pytest.raises(ValueError, match="every frame of the reference is of one colour"):
        transfer(np.zeros_like(video), "disc")
    with pytest.raises(ValueError, match="give at least 2 frames"):
        transfer(video[:1], "disc")
    with pytest.raises(ValueError, match="give a reference video, stored motion"):
        transfer(None, "disc")
    with pytest.raises(ValueError, match="unknown settings blocs"):
        MotionTransfer(load_backbone(model), blocs=(1,))
    with pytest.warns(UserWarning, match="frames 2 of the reference are of one colour"):
        transfer.reference_motion(np.stack([*video[:2], np.zeros_like(video[0]), video[3]]))
    with pytest.warns(UserWarning, match="16 x 18 are resized to 16 x 16"):
        transfer.reference_motion(np.concatenate([video, video[:, :, :2]], axis=2))
    with pytest.warns(UserWarning, match="has 4 frames and 6 are wanted"):
        assert len(transfer.reference_motion(video, num_frames=6).frames) == 6
