"""DiffTrack's released sets, which hold prompts and tracks but no videos: generated again, scored, exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from corrdit import capture, load_backbone
from corrdit.analysis import analysis_options, difftrack_items, prompt_items, regenerated_items
from corrdit.analysis.results import read_results
from corrdit.cli import main
from corrdit.integrations.diffusers.analysis import analyze_generation
from corrdit.tracking.baselines import nearest_patches
from corrdit.tracking.pseudo_truth import starting_grid_of, starting_points
from corrdit.video import read_video

SIZE = {"height": 64, "width": 64}
CALL = '{"height": 64, "width": 64}'


@pytest.fixture
def released_set(tmp_path) -> Path:
    """Two videos as released: `prompt.txt`, tracks near the starting grid and visibility; no videos."""
    folder = tmp_path / "set"
    for name in ("tracks", "visibility"):
        (folder / name).mkdir(parents=True)
    (folder / "prompt.txt").write_text("a dog runs\na boat drifts\n", encoding="utf-8")
    random = np.random.default_rng(0)
    grid = starting_points("scene", 64, 64)[:, 1:]
    for number in range(2):
        moved = grid + np.linspace(0, 8, 9)[:, None, None] * random.uniform(-1, 1, (100, 2))
        moved[0] += random.uniform(-0.3, 0.3, (100, 2))
        visible = random.random((9, 100)) < 0.8
        np.save(folder / "tracks" / f"{number:03}.npy", moved[None].astype(np.float32))
        np.save(folder / "visibility" / f"{number:03}.npy", visible[None])
    return folder


def analyze(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


@pytest.mark.slow
def test_a_released_set_is_generated_again_with_one_seed_and_a_stopped_run_goes_on(
    released_set, tiny_folder, tmp_path, capsys
):
    output = tmp_path / "out"
    given = ["--difftrack", released_set, "--output", output, "--model", tiny_folder, "--pipeline", CALL]
    given += ["--protocol", "published", "--steps", "0,1", "--inference-steps", 2, "--pictures", 0]
    given += ["--per-head", "false"]
    assert analyze(*given) == 0
    assert "2 videos analysed, 0 could not be" in capsys.readouterr().out
    dataset = output / "dataset"
    assert (dataset / "prompt.txt").read_text(encoding="utf-8") == "a dog runs\na boat drifts\n"
    for name in ("000", "001"):
        for kind in ("tracks", "visibility"):
            there, here = (np.load(folder / kind / f"{name}.npy") for folder in (released_set, dataset))
            assert np.array_equal(there, here)
    # Both are what the pipeline makes with seed 42, as the released code's.
    backbone = load_backbone(tiny_folder)
    made = backbone.pipe(
        "a boat drifts",
        num_inference_steps=2,
        num_frames=9,
        **SIZE,
        output_type="np",
        generator=torch.Generator().manual_seed(42),
    )
    stored = read_video(dataset / "videos" / "001.mp4").frames
    assert np.abs(stored.astype(float) - made.frames[0] * 255).mean() < 8  # as far as mp4 keeps it
    assert {file.name for file in (output / "released").iterdir()} > {"000", "001", "total_qk_acc.csv"}
    assert (output / "released" / "001" / "confidence_score.xlsx").is_file()
    results = read_results(output)
    assert (results.settings["protocol"], results.settings["options"]["average"]) == ("published", "released")
    visible = np.load(released_set / "visibility" / "000.npy")
    assert results.tables["000"].cases[0, 0, 0] == visible.sum()
    # Killed before the second video: the first one stays, the second is made again as it was.
    first, second = (output / "videos" / name / "analysis.npz" for name in ("000", "001"))
    before, hits = first.stat().st_mtime_ns, results.tables["001"].hits
    second.unlink()
    assert analyze(*given) == 0
    assert "made again are 001" in capsys.readouterr().err
    assert first.stat().st_mtime_ns == before
    assert np.array_equal(read_results(output).tables["001"].hits, hits)
    capsys.readouterr()
    assert analyze(*given, "--seed", 1) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_figures_are_those_of_the_generation_itself(released_set, tiny_folder):
    backbone = load_backbone(tiny_folder)
    item = regenerated_items(released_set, call=SIZE)[1]
    assert (item.prompt, item.seed) == ("a boat drifts", 42)
    xy, visible = item.tracks()
    options = analysis_options("published", {"steps": (1,), "inference_steps": 2, "per_head": False})
    call = {**SIZE, "num_frames": 9}
    found = analyze_generation(backbone, item.prompt, tracks=(xy, visible), options=options, seed=42, call=call)
    grid = starting_points("scene", 64, 64)[:, 1:]
    # Points that never leave the grid they start from, of which the first frame counts too.
    near = np.linalg.norm(xy - grid, axis=-1) < 8
    assert found.table.hits[0, 0, -1, 0] == (near & visible).sum()
    assert np.array_equal(found.tracks.xy.numpy(), xy)
    short = {**SIZE, "num_frames": 17}
    with pytest.raises(ValueError, match="the video has 17 frames, its tracks have 9"):
        analyze_generation(backbone, item.prompt, tracks=(xy, visible), options=options, call=short)
    with pytest.raises(ValueError, match="a tracker, or the tracks of this video"):
        analyze_generation(backbone, item.prompt, options=options, call=call)


def released_figures(q, k, xy: np.ndarray, visible: np.ndarray) -> dict[str, float]:
    """By hand in the order of the released code, for one layer: q, k `[H, N, D]` of 64 x 64 pixels, 4 x 4 tokens."""
    side, stride, frames = 4, 16, 3
    text = q.shape[1] - 16 * frames
    grid = torch.from_numpy(starting_points("scene", 64, 64)[:, 1:]) / stride
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    first = weights[:, text : text + 16].unflatten(1, (side, side))
    rows = first[:, grid[:, 0].round().long().clip(0, 3), grid[:, 1].round().long().clip(0, 3)].mean(0)
    seen = torch.from_numpy(visible)
    latent_seen = torch.stack([seen[4 * f - 3 : 4 * f + 1].all(0) for f in range(1, frames)])
    peaks = torch.stack([rows[:, text + 16 * f : text + 16 * (f + 1)].amax(-1) for f in range(1, frames)])
    confidence = (peaks * latent_seen).sum(0) / latent_seen.sum(0).clip(1e-8)
    q, k = (part[:, text:].unflatten(1, (frames, 16)) for part in (q, k))
    tracks = [grid]
    for f in range(1, frames):
        forward = (q[:, 0] @ k[:, f].mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
        backward = (q[:, f] @ k[:, 0].mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
        best = ((forward + backward.T) / 2).softmax(-1).argmax(-1)
        places = torch.stack((best % side, best // side)).float().unflatten(1, (side, side))
        at = grid / (side - 64 / (64 * 16)) * 2 - 1
        tracks.append(
            torch.nn.functional.grid_sample(places[None], at[None, :, None], align_corners=True)[0, :, :, 0].T
        )
    stretched = torch.nn.functional.interpolate(torch.stack(tracks).permute(1, 2, 0), size=9, mode="linear")
    error = (stretched.permute(2, 0, 1) * stride - torch.from_numpy(xy)).norm(dim=-1)
    return {
        "accuracy": float(((error < 8) & seen).sum() / seen.sum()),
        "confidence": float(confidence.mean()),
        "confidence_text": float(rows[:, :text].amax(-1).mean()),
        "confidence_own": float(rows[:, text : text + 16].amax(-1).mean()),
        "attention_text": float(rows[seen[0], :text].sum(-1).mean()),
        "attention_own": float(rows[seen[0], text : text + 16].sum(-1).mean()),
        "attention_cross": float(rows[seen[0], text + 16 :].sum(-1).mean()),
    }


def test_the_published_protocol_by_hand(released_set, tiny_folder):
    """All figures of two layers at two steps, from queries and keys captured in a generation of one's own."""
    backbone = load_backbone(tiny_folder)
    xy, visible = regenerated_items(released_set)[0].tracks()
    options = analysis_options("published", {"inference_steps": 2, "per_head": False})
    call = {**SIZE, "num_frames": 9}
    table = analyze_generation(
        backbone, "a dog runs", tracks=(xy, visible), options=options, seed=42, call=call
    ).table.video_means()
    both = lambda q, k, grid, key_mask: torch.stack((q[0], k[0]))  # noqa: E731
    with capture(backbone.pipe, layers=[0, 1, 2], operation=both) as captured:
        generator = torch.Generator().manual_seed(42)
        backbone.pipe("a dog runs", num_inference_steps=2, **call, output_type="latent", generator=generator)
    for step in range(2):
        for layer in range(3):
            expected = released_figures(*captured[step, layer], xy, visible)
            found = {
                "accuracy": table.accuracy(8.0)[step, layer, 0],
                "confidence": table.confidence_score()[step, layer, 0],
                "confidence_text": table.confidence_score("text")[step, layer, 0],
                "confidence_own": table.confidence_score("own")[step, layer, 0],
                **{
                    f"attention_{part}": table.attention_score(part)[step, layer, 0]
                    for part in ("text", "own", "cross")
                },
            }
            assert found == pytest.approx(expected, rel=1e-4), (step, layer)


def test_tracks_are_begun_from_the_released_grid():
    grid = starting_points("object", 480, 720)[:, 1:]
    beside = grid + np.float32([0.5, -1.5])
    seen = np.ones(400, dtype=bool)
    assert np.array_equal(starting_grid_of(beside, seen, 480, 720), grid)
    beside[7] += 60
    assert starting_grid_of(beside, seen, 480, 720) is None
    seen[7] = False
    assert np.array_equal(starting_grid_of(beside, seen, 480, 720), grid)
    assert starting_grid_of(grid[:9], seen[:9], 480, 720) is None


def test_processes_share_the_videos_of_a_released_set(released_set, tiny_folder, tmp_path):
    pytest.importorskip("lightning")
    import lightning

    from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule

    output = tmp_path / "out"
    items = regenerated_items(released_set, call=SIZE)
    data = AnalysisDataModule(items, output=output)
    options = {"steps": (1,), "inference_steps": 2, "per_head": False, "features": False}
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    module = AnalysisModule(load_backbone(tiny_folder), output=output, protocol="published", options=options)
    trainer.predict(module, data, return_predictions=False)
    assert list(read_results(output).tables) == ["000", "001"]
    assert AnalysisDataModule(items, output=output).left() == []


@pytest.mark.slow
def test_image_models_are_given_the_images_of_the_set(released_set, tiny_image_folder, tmp_path, capsys):
    (released_set / "image").mkdir()
    for number in range(2):
        pixels = np.full((64, 64, 3), 60 + 100 * number, np.uint8)
        Image.fromarray(pixels).save(released_set / "image" / f"{number:03}.png")
    items = regenerated_items(released_set, call=SIZE)
    assert [item.image.name for item in items] == ["000.png", "001.png"]
    output = tmp_path / "out"
    given = ["--difftrack", released_set, "--output", output, "--model", tiny_image_folder, "--pipeline", CALL]
    given += ["--steps=-1", "--inference-steps", 2, "--pictures", 0, "--layers", "0", "--features", "false"]
    assert analyze(*given) == 0
    (released_set / "image" / "001.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert analyze(*given) == 2
    err = capsys.readouterr().err
    assert "other image than before" in err
    assert "001.png is not a picture that can be read" in err


def test_prompts_may_share_a_seed_and_have_images_of_their_own(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8)).save(images / f"{number:03}.png")
    prompts = ["one", "two"]
    made = prompt_items(prompts, tracker=nearest_patches, seed=7, same_seed=True, images=images)
    assert [(item.seed, item.image.name) for item in made] == [(7, "000.png"), (7, "001.png")]
    counted = prompt_items(prompts, tracker=nearest_patches, seed=7, images=images / "000.png")
    assert [(item.seed, item.image.name) for item in counted] == [(7, "000.png"), (8, "000.png")]
    (images / "001.png").unlink()
    with pytest.raises(ValueError, match=r"there is no image .*001\.png"):
        prompt_items(prompts, tracker=nearest_patches, images=images)


def test_a_set_with_videos_is_read_and_one_without_prompts_is_refused(released_set, tmp_path, capsys):
    (released_set / "prompt.txt").unlink()
    with pytest.raises(ValueError, match=r"neither videos nor a prompt\.txt"):
        regenerated_items(released_set)
    assert analyze("--difftrack", released_set, "--output", tmp_path / "out") == 2
    assert "neither videos nor a prompt.txt" in capsys.readouterr().err
    (released_set / "videos").mkdir()
    shutil.copy(Path(__file__), released_set / "videos" / "000.mp4")  # no video, but there
    assert analyze("--difftrack", released_set, "--output", tmp_path / "out", "--pipeline", CALL) == 2
    assert "--pipeline is for videos that are generated" in capsys.readouterr().err
    assert [item.name for item in difftrack_items(released_set)] == ["000", "001"]
