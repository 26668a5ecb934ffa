"""Training follows from the seed and the step: a resumed run is the run that was never interrupted."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

from corrdit.integrations.embedded import load_embedded_pipeline, read_preset
from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer
from corrdit.integrations.embedded.training.model_card import model_card
from corrdit.integrations.embedded.training.module import (
    EmbeddedTraining,
    GeneratedBatches,
    MaterialisedAttention,
    TrainingConfig,
)
from corrdit.integrations.embedded.training.muon import MuonWithAdamW, orthogonalised
from corrdit.integrations.embedded.training.recipe import (
    export_checkpoint,
    load_checkpoint,
    load_recipe,
    newest_checkpoint,
    train,
)
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS


def losses(output: pathlib.Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for path in sorted((output / "logs").glob("part_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            found |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    config = load_recipe("smoke", steps=6)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, checkpoint_every=3, progress=False)
    train(config, parts, checkpoint_every=3, progress=False, stop_after=3)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train(config, parts, progress=False)
    train(config, parts, checkpoint_every=3, progress=False, resume=True)
    assert sorted(losses(whole)) == list(range(6))
    assert losses(parts) == losses(whole)
    first, second = (load_checkpoint(newest_checkpoint(run)).state_dict() for run in (whole, parts))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, atol=0, rtol=0, msg=name)
    assert any((first[f"transformer{name[7:]}"] != first[name]).any() for name in first if name.startswith("average"))
    pipe = load_embedded_pipeline(export_checkpoint(newest_checkpoint(whole), tmp_path / "exported"))
    exported = dict(pipe.transformer.named_parameters())
    for name, weight in exported.items():
        torch.testing.assert_close(weight.data, first[f"average.{name}"].half().float(), atol=0, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_run_starts_from_given_weights_and_shows_photographs(tmp_path: pathlib.Path) -> None:
    """With a learning rate of zero the exported weights are those that were given."""
    trained = build_pipeline(build_transformer(layers=2, heads=2, head_dim=16))
    trained.save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "preset.json").write_text(json.dumps({"layer": 1, "step": -2}))
    (tmp_path / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "pictures" / "noise.png")
    smoke = dataclasses.replace(load_recipe("smoke", steps=2), pictures=1.0, bending=0.5, appearance=0.5)
    config = dataclasses.replace(smoke, learning_rate=0.0)
    given = {"start": tmp_path / "trained", "photographs": tmp_path / "pictures", "progress": False}
    train(config, tmp_path / "run", **given)
    pipe = load_embedded_pipeline(export_checkpoint(newest_checkpoint(tmp_path / "run"), tmp_path / "exported"))
    for name, weight in trained.transformer.named_parameters():
        torch.testing.assert_close(pipe.transformer.get_parameter(name).data, weight.half().float(), atol=0, rtol=0)
    assert read_preset(tmp_path / "exported") == {"layer": 1, "step": -2}
    with pytest.raises(ValueError, match="resume goes on with an earlier one; give one of them"):
        train(config, tmp_path / "run", resume=True, **given)
    Image.fromarray(noise[::-1]).save(tmp_path / "pictures" / "noise.png")
    with pytest.raises(ValueError, match=r"other settings: photographs '[0-9a-f]{16}' \(now '[0-9a-f]{16}'\)"):
        train(config, tmp_path / "run", resume=True, photographs=tmp_path / "pictures", progress=False)
    with pytest.raises(ValueError, match="no photographs were given; give Photographs"):
        train(config, tmp_path / "other", start=tmp_path / "trained", progress=False)
    with pytest.raises(ValueError, match="have 6 layers, 4 heads and head_dim 32, the recipe 2, 2 and 16"):
        train(config, tmp_path / "other", **{**given, "start": "embedded"})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ValueError, match="foreign holds a WanPipeline, not the embedded model"):
        train(config, tmp_path / "other", **{**given, "start": tmp_path / "foreign"})
    with pytest.raises(ValueError, match=r"pictures.* and the recipe shows none \(pictures: 0, videos: 1\)"):
        train(load_recipe("smoke"), tmp_path / "other", **given)
    assert not (tmp_path / "other").exists()


def test_recipes_of_varied_worlds_show_other_videos_from_the_same_seeds() -> None:
    plain = TrainingConfig(steps=10, batch_size=4, shapes=((2, 16, 16),))
    bending = dataclasses.replace(plain, bending=1.0)
    assert (GeneratedBatches(plain).batch(1)["video"] != GeneratedBatches(bending).batch(1)["video"]).any()
    unchanged = GeneratedBatches(dataclasses.replace(bending, videos=0.0)).batch(1)
    torch.testing.assert_close(unchanged["video"], GeneratedBatches(plain).batch(1)["video"], atol=0, rtol=0)
    with pytest.raises(ValueError, match="appearance must be a number from 0 to 1, got 2"):
        TrainingConfig(appearance=2.0)


def test_training_videos_are_never_held_out_and_processes_share_the_batch() -> None:
    config = TrainingConfig(steps=10, batch_size=4, shapes=((2, 16, 16), (3, 16, 24)))
    whole = GeneratedBatches(config).batch(3)
    parts = [GeneratedBatches(config, 0, rank, 2).batch(3) for rank in range(2)]
    assert whole["video"].shape == (4, 3, 3, 16, 24)
    torch.testing.assert_close(torch.cat([part["video"] for part in parts]), whole["video"], atol=0, rtol=0)
    assert parts[0]["prompts"] + parts[1]["prompts"] == whole["prompts"]
    module = EmbeddedTraining(TrainingConfig(batch_size=4, layers=1, heads=2, head_dim=16))
    noise = module._draw(3, whole["share"], (2,))[1]
    torch.testing.assert_close(module._draw(3, parts[1]["share"], (2,))[1], noise[2:], atol=0, rtol=0)
    with pytest.raises(ValueError, match="shared evenly"):
        GeneratedBatches(config, 0, 0, 3)
    with pytest.raises(ValueError, match="held-out"):
        TrainingConfig(seed=HELD_OUT_SEEDS // 100, steps=100, batch_size=1)


@pytest.mark.parametrize("scores", [2**19, 100, 1])
def test_materialised_attention_is_attention(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """In one block of rows, in blocks with a ragged last one, row by row."""
    monkeypatch.setattr("corrdit.integrations.embedded.training.module._CACHED_SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    with MaterialisedAttention():
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.03


def test_muon_steps_are_orthogonal_and_adamw_is_pytorchs() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 8), (8, 24), (16, 16)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
        assert singular.min() > 0.3
        assert singular.max() < 1.3
    start = torch.randn(5, 4, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = MuonWithAdamW([], [ours], 0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], 0.01, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(4):
        gradient = torch.randn(5, 4, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="matrices"):
        MuonWithAdamW([torch.nn.Parameter(torch.zeros(3))], [], 0.1)


def test_recipes() -> None:
    for name in ("cpu", "smoke"):
        assert load_recipe(name).steps > 1
    with pytest.raises(ValueError, match="no recipe 'nothing'"):
        load_recipe("nothing")
    with pytest.raises(ValueError, match=r"unknown entries \['rate'\]"):
        TrainingConfig.from_dict({"rate": 1})
    with pytest.raises(ValueError, match="divisible by 4"):
        TrainingConfig(shapes=((8, 30, 32),))
    with pytest.raises(ValueError, match="'adamw' or 'muon'"):
        TrainingConfig(optimizer="sgd")


def test_nothing_to_resume(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"step-\*"):
        newest_checkpoint(tmp_path)


def test_a_card_says_which_photographs_were_shown() -> None:
    plain = dataclasses.asdict(TrainingConfig())
    shown = {**plain, "videos": 0.75, "pictures": 0.8, "photographs": "abc"}
    assert "No recorded or collected data." in model_card(plain, 1, 1)
    text = " ".join(model_card(shown, 1, 1).split())
    assert "In 75% of the videos 80% of backgrounds and sprites are crops of the photographs" in text
    assert "digest abc" in text
