"""Training refuses what it cannot use before anything is written, and destroys nothing that is not its own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from corrdit.integrations.embedded.pipeline import build_transformer
from corrdit.integrations.embedded.training.module import TrainingConfig
from corrdit.integrations.embedded.training.recipe import (
    export_checkpoint,
    load_checkpoint,
    load_recipe,
    newest_checkpoint,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = TrainingConfig(
    steps=2, batch_size=2, shapes=((2, 16, 16),), layers=1, heads=2, head_dim=16, precision="32-true", warmup=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A finished run of two steps, not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    train(TINY, folder, progress=False)
    return folder


@pytest.fixture
def run(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the run."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"steps": "many"}, "steps must be a whole number of at least 1, got 'many'"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"layers": 0}, "layers must be a whole number of at least 1"),
        ({"layers": None}, "layers must be a whole number"),
        ({"shapes": 5}, "shapes must be a list"),
        ({"shapes": []}, "shapes must be a list of at least one"),
        ({"shapes": [8, 32, 32]}, "got 8 in it"),
        ({"shapes": [[2, 4, 16]]}, "height of the shape .* at least 8, got 4"),
        ({"shapes": [[0, 16, 16]]}, "frames of the shape"),
        ({"head_dim": 24}, "head_dim must be divisible by 16 for rotary positions, got 24"),
        ({"positions": "learned"}, "'rotary' or 'absolute'"),
        ({"precision": "foo"}, "precision must be one of bf16-mixed"),
        ({"slowing_share": 0}, "slowing_share must be a number from 0.001 to 1, got 0"),
        ({"average_decay": 2}, "average_decay must be a number from 0 to 1"),
        ({"empty_prompts": 3}, "empty_prompts"),
        ({"learning_rate": -1}, "learning_rate must be a number of at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate .* got 'fast'"),
        ({"clip": True}, "clip"),
    ],
)
def test_entries_of_a_recipe_are_checked(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_dict(entries)


def test_numbers_as_yaml_writers_write_them(tmp_path: pathlib.Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-3\nclip: 1\nsteps: 5\n", encoding="utf-8")  # PyYAML reads 1e-3 as text
    config = load_recipe(str(recipe))
    assert (config.learning_rate, config.clip, config.steps) == (1e-3, 1.0, 5)


@pytest.mark.parametrize("contents", [b"a: [1", b"\xff\xfe\x00bad", b""])
def test_a_file_that_is_no_recipe(tmp_path: pathlib.Path, contents: bytes) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(contents)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(str(recipe))


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_every": 0},
        {"threads": 0},
        {"processes": 0},
        {"processes": 3},
        {"minutes": -1.0},
        {"minutes": float("nan")},
        {"stop_after": 0},
    ],
)
def test_arguments_of_a_run_are_checked_before_anything_is_written(
    tmp_path: pathlib.Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        train(TINY, tmp_path / "run", progress=False, **arguments)
    assert not any(tmp_path.iterdir())


def test_every_piece_of_a_run_has_all_of_its_time(run: pathlib.Path) -> None:
    config = dataclasses.replace(TINY, steps=10_000)
    for _ in range(2):
        before = int(newest_checkpoint(run).stem.removeprefix("step-"))
        train(config, run, resume=True, minutes=0.002, checkpoint_every=100_000, progress=False)
        assert before < int(newest_checkpoint(run).stem.removeprefix("step-")) < 10_000


def test_resuming_with_another_recipe_is_refused(run: pathlib.Path) -> None:
    for changed in ({"empty_prompts": 0.5}, {"learning_rate": 1e-4}, {"seed": 3}, {"layers": 2}):
        with pytest.raises(ValueError, match=f"other settings: {next(iter(changed))} .* the same settings to go on"):
            train(dataclasses.replace(TINY, **changed), run, resume=True, progress=False)
    with pytest.raises(ValueError, match="has 2 steps, more than the recipe's 1"):
        train(dataclasses.replace(TINY, steps=1), run, resume=True, progress=False)
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["part_0"]


def test_a_finished_run_resumes_to_itself_and_more_steps_go_on(run: pathlib.Path) -> None:
    before = newest_checkpoint(run).read_bytes()
    train(TINY, run, resume=True, checkpoint_every=2, progress=False)
    assert newest_checkpoint(run).read_bytes() == before
    module = train(dataclasses.replace(TINY, steps=3), run, resume=True, progress=False)
    assert module.trainer.global_step == 3
    assert newest_checkpoint(run).name == "step-3.ckpt"


class Command:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("exit 1",)


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def foreign(path: pathlib.Path) -> None:
    torch.save({"state_dict": {}}, path)


def program(path: pathlib.Path) -> None:
    torch.save({"state_dict": Command()}, path)


def other_recipe(path: pathlib.Path) -> None:
    torch.save(torch.load(path, weights_only=True) | {"hyper_parameters": {"lr": 1}}, path)


def fewer_weights(path: pathlib.Path) -> None:
    state = torch.load(path, weights_only=True)
    state["state_dict"].popitem()
    torch.save(state, path)


@pytest.mark.parametrize("damage", [cut, emptied, foreign, program, other_recipe, fewer_weights])
def test_damaged_and_foreign_checkpoints_are_named(run: pathlib.Path, damage: Callable[[pathlib.Path], None]) -> None:
    checkpoint = newest_checkpoint(run)
    damage(checkpoint)
    message = r"step-2\.ckpt is damaged or no checkpoint .* remove it to take the one before"
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(TINY, steps=3), run, resume=True, progress=False)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, run / "pipeline")
    assert not (run / "pipeline").exists()
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["part_0"]


def test_other_names_beside_checkpoints_do_not_matter(run: pathlib.Path) -> None:
    (run / "checkpoints" / "step-best.ckpt").write_bytes(b"")
    assert newest_checkpoint(run).name == "step-2.ckpt"


def test_an_export_replaces_pipelines_only(run: pathlib.Path) -> None:
    folder = run / "pipeline"
    folder.mkdir()
    export_checkpoint(newest_checkpoint(run), folder)
    export_checkpoint(newest_checkpoint(run), folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match="holds something else"):
        export_checkpoint(newest_checkpoint(run), folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_weights_that_are_not_finite_are_not_exported(run: pathlib.Path) -> None:
    checkpoint = newest_checkpoint(run)
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["average.proj_out.bias"].fill_(1e6)  # finite, but not in float16
    torch.save(state, checkpoint)
    assert load_checkpoint(checkpoint).average.proj_out.bias.isfinite().all()
    with pytest.raises(ValueError, match="not finite in float16: the run diverged"):
        export_checkpoint(checkpoint, run / "pipeline")
    assert not (run / "pipeline").exists()


def test_transformers_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="heads must be a whole number"):
        build_transformer(heads=0)
    with pytest.raises(ValueError, match=r"heads \* head_dim must be divisible by 16 for absolute positions, got 24"):
        build_transformer(heads=3, head_dim=8, positions="absolute")
    with pytest.raises(ValueError, match="size must be divisible by 4"):
        build_transformer(size=30)
