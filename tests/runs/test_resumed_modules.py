"""Every module that writes a result for each sample goes on only with what was made alike."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from corrdit import files
from corrdit.analysis.results import read_results
from corrdit.analysis.sources import folder_items
from corrdit.cli import main
from corrdit.data import write_tapvid
from corrdit.data.restricted_pickle import load_arrays
from corrdit.evaluation import EvaluationResults, write_tables
from corrdit.integrations.diffusers import backbone_of
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.integrations.embedded.world.clips import as_tapvid, sample_queries
from corrdit.integrations.lightning import (
    AnalysisDataModule,
    AnalysisModule,
    EvaluationModule,
    GenerationModule,
    PromptDataModule,
    TapVidDataModule,
    TrackingModule,
    TransferDataModule,
    TransferModule,
    VideoDataModule,
)
from corrdit.video import write_video

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no text encoder"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Total length of .DataLoader. across ranks is zero"),
]
NAMES = ("a", "b")


def frames(seed: int, size: int = 32) -> list[np.ndarray]:
    picture = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return [np.roll(picture, 4 * frame, axis=1) for frame in range(3)]


@pytest.fixture
def predict() -> Callable[..., list[dict]]:
    def run(module, data) -> list[dict]:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        return trainer.predict(module, data) or []

    return run


def embedded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build_pipeline(build_transformer(layers=2, heads=2, head_dim=16, frames=4, size=32))
    pipe.set_progress_bar_config(disable=True)
    return backbone_of(pipe, name="tiny")


class Kind:
    """One kind of run over two samples in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "out"
        for seed, name in enumerate(NAMES):
            write_video(root / "videos" / f"{name}.mp4", frames(seed), 8)
        self.backbone = self.loaded()

    def loaded(self):
        return embedded()

    def replace_input(self) -> None:
        write_video(self.root / "videos" / "a.mp4", frames(7), 8)


class Track(Kind):
    result, record = "a.mp4/tracks.npz", ".records/a.mp4.json"

    def loaded(self):
        return tiny_backbone("cogvideox-rotary")

    def run(self):
        module = TrackingModule(
            self.backbone, output=self.output, queries=2, pictures=False, options={"backend": "reference"}
        )
        return module, VideoDataModule(self.root / "videos", output=self.output)


class Analyze(Track):
    result, record = "videos/a.mp4/analysis.npz", ".records/a.mp4.json"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        clip = generate([3], WorldConfig(9, 48, 64))[0]
        truth = clip.tracks(np.stack([np.zeros(9), *(8.0 * np.indices((3, 3)).reshape(2, -1) + 8)], axis=1))
        for name in NAMES:
            write_video(root / "videos" / f"{name}.mp4", list(clip.video), 8)
            np.savez(root / "videos" / f"{name}.npz", xy=truth.xy, visible=truth.visible)

    def replace_input(self) -> None:
        with np.load(self.root / "videos" / "a.npz") as earlier:
            np.savez(self.root / "videos" / "a.npz", xy=earlier["xy"] + 1, visible=earlier["visible"])

    def run(self):
        options = {"steps": (-1,), "layers": (0,), "per_head": False, "features": False}
        module = AnalysisModule(self.backbone, output=self.output, options=options)
        return module, AnalysisDataModule(folder_items(self.root / "videos"), output=self.output)


class Transfer(Kind):
    result, record = "0000/result.mp4", "0000/pair.json"

    def run(self):
        table = self.root / "pairs.csv"
        table.write_text("video,prompt\nvideos/a.mp4,a disc\nvideos/b.mp4,a star\n")
        settings = {"steps": 2, "guided_share": 0.5, "optimisation_steps": 1, "blocks": (1,)}
        module = TransferModule(self.backbone, output=self.output, settings=settings, measure=False)
        return module, TransferDataModule(table, output=self.output)


class Generate(Kind):
    result, record = "0000/video.mp4", "0000/generation.json"

    def run(self):
        call = {"num_frames": 4, "num_inference_steps": 1}
        module = GenerationModule(self.backbone, output=self.output, call=call)
        return module, PromptDataModule(["a disc", "a star"], output=self.output)


class Evaluate(Track):
    result, record = "videos/ours/a.npz", "videos/ours/a.json"

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        clips = [generate([seed], WorldConfig(5, 32, 48))[0] for seed in (3, 4)]
        videos = [as_tapvid(clip, sample_queries(clip, 4), name) for clip, name in zip(clips, NAMES, strict=True)]
        write_tapvid(root / "set.pkl", videos)

    def replace_input(self) -> None:
        contents = load_arrays(self.root / "set.pkl")
        contents["a"]["points"] = contents["a"]["points"] * 0.9
        (self.root / "set.pkl").write_bytes(pickle.dumps(contents))

    def run(self):
        options = {"backend": "reference", "height": 32, "width": 48, "layer": 0}
        module = EvaluationModule(self.backbone, output=self.output, trackers="ours", tracker_options=options)
        return module, TapVidDataModule(self.root / "set.pkl")


@pytest.fixture(params=[Track, Analyze, Transfer, Generate, Evaluate], ids=lambda kind: kind.__name__)
def kind(request, tmp_path: Path, predict) -> Kind:
    """A run that is finished."""
    (tmp_path / "videos").mkdir()
    found = request.param(tmp_path)
    assert len(predict(*found.run())) == 2
    return found


def test_a_finished_run_does_nothing_again(kind, predict):
    assert predict(*kind.run()) == []


def test_other_weights_are_refused(kind, predict):
    with torch.no_grad():
        next(kind.backbone.transformer.parameters()).add_(1e-2)
    with pytest.raises(ValueError, match=r"made with other settings.*: weights 'float32 \w+' \(now 'float32 \w+'\)"):
        predict(*kind.run())


@pytest.mark.parametrize(
    "damage", ["truncated", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gone", "edited"))]
)
def test_a_damaged_result_is_made_again_and_said(kind, predict, damage):
    file = kind.output / kind.result
    whole = file.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "edited": whole[:-9] + bytes(9), "gone": b""}[damage]
    file.write_bytes(damaged)
    if damage == "gone":
        file.unlink()
    with pytest.warns(UserWarning, match=f"again.*{kind.result} is (damaged|gone)"):
        (again,) = predict(*kind.run())
    assert again["name"] in kind.result
    assert file.read_bytes() != damaged
    assert predict(*kind.run()) == []


def test_an_edited_record_is_made_again(kind, predict):
    file = kind.output / kind.record
    contents = json.loads(file.read_text())
    file.write_text(json.dumps({**contents, "seconds": 1000}))
    with pytest.warns(UserWarning, match="again.*is not as it was written"):
        assert len(predict(*kind.run())) == 1
    assert json.loads(file.read_text()).get("seconds") != 1000
    assert predict(*kind.run()) == []


def test_a_replaced_input_is_read_again(kind, predict):
    if isinstance(kind, Generate):
        pytest.skip("prompts are compared by their words, see tests/guidance")
    before = (kind.output / kind.result).read_bytes()
    kind.replace_input()
    with pytest.warns(UserWarning, match="again.*other (video|tracks) than before"):
        assert len(predict(*kind.run())) == 1
    if not isinstance(kind, Analyze):
        assert (kind.output / kind.result).read_bytes() != before
    assert predict(*kind.run()) == []


@pytest.mark.parametrize("contents", ["[]", "{"])
def test_settings_that_are_none_are_refused_in_words(kind, predict, contents):
    (kind.output / "settings.json").write_text(contents)
    with pytest.raises(ValueError, match=r"settings\.json is not a settings file"):
        predict(*kind.run())


def test_what_dead_processes_left_goes(kind, predict):
    script = "import os; print(os.getpid())"
    number = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    left = f".0000.{files._MACHINE}-{number}-abcd.part"
    (kind.output / left).mkdir()
    (kind.output / left / "video.mp4").write_bytes(b"half")
    predict(*kind.run())
    assert not (kind.output / left).exists()


def test_a_truncated_pair_is_made_again(tmp_path, predict):
    (tmp_path / "videos").mkdir()
    kind = Transfer(tmp_path)
    predict(*kind.run())
    (kind.output / kind.record).write_text('{"name": "0000", "vid')
    with pytest.warns(UserWarning, match=r"0000/pair\.json is damaged"):
        (again,) = predict(*kind.run())
    assert again["name"] == "0000"


def test_an_edited_figure_is_in_no_mean(tmp_path, predict):
    (tmp_path / "videos").mkdir()
    kind = Evaluate(tmp_path)
    predict(*kind.run())
    expected = json.loads((kind.output / "table.json").read_text())
    contents = json.loads((kind.output / kind.record).read_text())
    contents["figures"]["average_jaccard"] = 1000
    (kind.output / kind.record).write_text(json.dumps(contents))
    (summary,) = write_tables(kind.output)
    assert summary.videos == 1
    assert "is not as it was written; evaluate it again" in summary.broken["a"]
    with pytest.warns(UserWarning, match="evaluated again"):
        predict(*kind.run())
    assert json.loads((kind.output / "table.json").read_text()) == expected


def test_trackers_that_join_are_compared_on_the_same_annotation(tmp_path, predict):
    (tmp_path / "videos").mkdir()
    kind = Evaluate(tmp_path)
    predict(*kind.run())
    kind.replace_input()
    _, data = kind.run()
    predict(EvaluationModule(output=kind.output, trackers="still"), data)
    rows = {row["tracker"]: row for row in json.loads((kind.output / "table.json").read_text())["trackers"]}
    assert (rows["still"]["videos"], rows["ours"]["videos"]) == (2, 1)
    assert "other video than before" in rows["ours"]["broken_videos"]["a"]


def test_a_transfer_that_was_stopped_begins_anew_where_its_video_was_replaced(tmp_path, predict, monkeypatch):
    (tmp_path / "videos").mkdir()
    kind = Transfer(tmp_path)
    module, data = kind.run()
    monkeypatch.setattr(module.results, "result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        predict(module, data)
    assert list(kind.output.glob(".0000.*.transfer-state.safetensors"))
    kind.replace_input()
    assert [result.get("error") for result in predict(*kind.run())] == [None, None]
    assert not list(kind.output.glob(".*"))


def test_words_of_earlier_versions_still_work(tmp_path):
    for old, new in (("skip", "report"), ("stop", "raise")):
        with pytest.warns(DeprecationWarning, match=f"on_broken='{old}' is now '{new}'"):
            assert EvaluationModule(output=tmp_path, on_broken=old).on_broken == new


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_precision_is_a_type_or_its_name(tmp_path, dtype):
    for module in (TrackingModule, AnalysisModule, GenerationModule, TransferModule, EvaluationModule):
        assert module(output=tmp_path, dtype=dtype, placement="offload").model_dtype == "bfloat16"
        with pytest.raises(ValueError, match="placement must be one of"):
            module(output=tmp_path, placement="moon")


def test_the_command_that_analyses_refuses_other_weights_and_takes_what_changed(tmp_path, capsys, monkeypatch):
    from corrdit.integrations.diffusers.backbones import loading

    (tmp_path / "videos").mkdir()
    kind = Analyze(tmp_path)
    monkeypatch.setattr(loading, "load_backbone", lambda name, **options: kind.backbone)
    given = ["analyze", "--videos", str(tmp_path / "videos"), "--output", str(kind.output), "--steps=-1", "--layers"]
    given += ["0", "--pictures", "0", "--per-head", "false"]
    assert main(given) == 0
    before = read_results(kind.output).tables["a.mp4"]
    kind.replace_input()
    capsys.readouterr()
    assert main(given) == 0
    assert "made again are a.mp4 (other tracks than before)" in capsys.readouterr().err
    assert not np.array_equal(read_results(kind.output).tables["a.mp4"].hits, before.hits)
    with torch.no_grad():
        next(kind.backbone.transformer.parameters()).add_(1e-2)
    assert main(given) == 2
    assert "made with other settings: weights" in capsys.readouterr().err


def test_a_folder_read_with_results_in_it_keeps_them(tmp_path):
    results = EvaluationResults(tmp_path)
    results.write_record("still", "ant", {"video": "ant", "figures": None}, inputs={"video": "1"})
    assert results.is_done(["still"], "ant", {"video": "1"})
    assert not results.is_done(["still"], "ant", {"video": "2"})
    assert os.listdir(tmp_path) == ["videos"]
