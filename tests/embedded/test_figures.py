"""The scripts that measure and draw the embedded model: whole way on a tiny run, and the direction of a sprite."""

from __future__ import annotations

import importlib
import json
import pathlib
import types
from collections.abc import Callable

import numpy as np
import pytest

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.training.recipe import export_checkpoint, load_recipe, newest_checkpoint, train

SCRIPTS = pathlib.Path(__file__).parents[2] / "benchmarks"
PNG = b"\x89PNG"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """Imports a script of benchmarks/ by name; the scripts import one another from their own folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of six steps with checkpoints after three and six, and its exported pipeline."""
    folder = tmp_path_factory.mktemp("run")
    train(load_recipe("smoke", steps=6), folder, checkpoint_every=3, progress=False)
    export_checkpoint(newest_checkpoint(folder), folder / "pipeline")
    return folder


def test_every_figure_is_made_from_a_run(
    run: pathlib.Path, script: Callable[[str], types.ModuleType], tmp_path: pathlib.Path
) -> None:
    emergence, figures = script("embedded_emergence"), script("embedded_figures")
    table = tmp_path / "embedded_emergence.json"
    words = ["--run", str(run), "--output", str(table), "--videos", "2", "--stretch", "2", "--every", "3"]
    emergence.main(words)
    found = json.loads(table.read_text())
    assert [row["step"] for row in found["checkpoints"]] == [3, 6]
    assert found["loss"]["steps"] == [1, 3, 5]
    pictures = tmp_path / "figures"
    arguments = ["--tables", str(tmp_path), "--output", str(pictures)]
    figures.main([*arguments, "--pipeline", str(run / "pipeline"), "--videos", "2", "--steps", "1"])
    names = {"layers_timesteps", "heads", "bars", "emergence", "loss", "samples"}
    assert {path.stem for path in pictures.glob("*.png")} == names
    made = {path.stem: path.read_bytes() for path in pictures.glob("*.png")}
    assert all(data.startswith(PNG) for data in made.values())
    (pictures / "loss.png").unlink()
    figures.main([*arguments, "--draw-only"])
    assert (pictures / "loss.png").read_bytes() == made["loss"]


def test_measured_checkpoints_are_kept(
    run: pathlib.Path,
    script: Callable[[str], types.ModuleType],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emergence = script("embedded_emergence")
    measured = []

    def record(checkpoint: pathlib.Path, step: int, videos: int) -> dict[str, object]:
        measured.append(step)
        return {"step": step, "videos": videos, "shares": {"50": {"query-key 0 mean": 0.5}}}

    monkeypatch.setattr(emergence, "measured", record)
    words = ["--run", str(run), "--output", str(tmp_path / "table.json"), "--every", "6"]
    emergence.main([*words, "--videos", "4"])
    emergence.main([*words, "--videos", "4"])
    assert measured == [3, 6]
    emergence.main([*words, "--videos", "5"])
    assert measured == [3, 6, 3, 6]
    with pytest.raises(FileNotFoundError, match=r"step-\*"):
        emergence.main(["--run", str(tmp_path), "--output", str(tmp_path / "none.json")])


def test_tables_say_what_was_read(script: Callable[[str], types.ModuleType]) -> None:
    drawings = script("embedded_drawings")
    shares = {f"query-key {layer} mean": 0.1 * layer + 0.01 for layer in range(3)}
    shares |= {f"query-key {layer} head {head}": 0.1 * head for layer in range(3) for head in range(2)}
    shares |= {f"{kind} output {layer}": 0.2 for kind in ("attention", "block") for layer in range(3)}
    readings = {time: {name: {"share": share} for name, share in shares.items()} for time in ("50", "300")}
    assert drawings.layers_of(readings) == 3
    assert drawings.heads_of(readings) == 2
    np.testing.assert_allclose(drawings.layer_table(readings, "query-key {} mean")[:, 1], [0.01, 0.11, 0.21])
    figure = drawings.draw_layers(readings, 4)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 3
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_tracker_finds_the_way_of_rendered_sprites(script: Callable[[str], types.ModuleType]) -> None:
    directions, tracker = script("embedded_directions"), script("sprite_direction")
    scenes = directions.prompted_scenes(10, directions.TUNING_SEED)
    videos = directions.videos_of(None, scenes, {"words": directions.RENDERED})
    for scene, video in zip(scenes, videos, strict=True):
        sprite = scene.sprites[0]
        assert directions.prompt_of(scene, "short") == directions.prompt_of(scene, "caption").split(" the camera")[0]
        motion = tracker.sprite_motion(video)
        truth = np.diff(sprite.center, axis=0).mean(0) * 32
        assert tracker.angle_to(motion.velocity, sprite.direction) < 30
        assert np.linalg.norm(motion.velocity - truth) < 1.5
        # Backwards in time it is the opposite direction.
        assert tracker.angle_to(tracker.sprite_motion(video[::-1]).velocity, sprite.direction) > 150


def test_tracker_finds_nothing_where_nothing_moves_apart(script: Callable[[str], types.ModuleType]) -> None:
    tracker = script("sprite_direction")
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    panned = np.stack([picture[2 * frame : 2 * frame + 32, 3 * frame : 3 * frame + 32] for frame in range(6)])
    motion = tracker.sprite_motion(panned)
    assert np.isnan(motion.velocity).all()
    assert tracker.angle_to(motion.velocity, "left") == 180
    assert tracker.angle_to(np.array([-2.0, 0.0]), "left") == pytest.approx(0)
    assert tracker.angle_to(np.array([0.0, 3.0]), "left") == pytest.approx(90)
    with pytest.raises(ValueError, match="two frames"):
        tracker.sprite_motion(panned[:1])


def test_directions_resume_and_share_the_work(
    run: pathlib.Path, script: Callable[[str], types.ModuleType], tmp_path: pathlib.Path
) -> None:
    directions = script("embedded_directions")
    output, shards = tmp_path / "directions.json", tmp_path / "shards"
    words = ["--output", str(output), "--shards", str(shards), "--pipeline", str(run / "pipeline")]
    words += ["--samples", "10", "--steps", "1", "--guidance", "2", "--tuning"]
    directions.main([*words, "--part", "0/2"])
    assert not output.exists()
    (first,) = shards.iterdir()
    written = first.stat().st_mtime_ns
    directions.main([*words, "--part", "1/2"])
    assert len(list(shards.iterdir())) == 2
    assert first.stat().st_mtime_ns == written
    rendered, generated = json.loads(output.read_text())["results"]
    assert rendered["within_45_degrees"]["share"] == 1.0
    assert generated["samples"] == 10
    assert generated["guidance"] == 2.0


def test_unmeasured_directions_count_as_wrong(script: Callable[[str], types.ModuleType]) -> None:
    directions = script("embedded_directions")
    rows = [
        {"direction": "left", "velocity": [-2.0, 0.5], "points": 40},
        {"direction": "up", "velocity": [2.0, 0.5], "points": 40},
        {"direction": "up", "velocity": None, "points": 2},
        {"direction": "left", "velocity": [-1.0, -0.9], "points": 40},
    ]
    found = directions.measured(rows)
    assert found["within_45_degrees"]["share"] == 0.5
    assert found["nothing_moves_apart"] == 1
    assert found["by_direction"]["up"] == {"samples": 2, "share": 0.0}


def test_shipped_tables_belong_to_the_shipped_weights(script: Callable[[str], types.ModuleType]) -> None:
    """Where a table says which weights it was measured with, they are the ones in the package."""
    digest = script("experiment").weights_digest(load_embedded_pipeline().transformer)
    for name in ("embedded_layers", "embedded_directions"):
        path = SCRIPTS / "results" / f"{name}.json"
        if path.is_file():
            assert json.loads(path.read_text(encoding="utf-8"))["weights"] == digest, name
