"""`corrdit train`: what is wrong is said before anything is trained or written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from corrdit.cli import main

pytest.importorskip("lightning")

from corrdit.integrations.embedded.training import recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume",), "train first, without --resume"),
        (("--export-only",), "train first, without --resume"),
        (("--checkpoint-every", "0"), "checkpoint_every must be a whole number of at least 1, got 0"),
        (("--threads", "0"), "threads must be a whole number of at least 1"),
        (("--processes", "3"), "batch_size 2 cannot be shared evenly by 3 processes"),
        (("--minutes", "-1"), "minutes must be more than 0"),
        (("--steps", "0"), "steps must be a whole number of at least 1, got 0"),
        (("--recipe", "nothing"), "no recipe 'nothing'"),
    ],
)
def test_bad_options_leave_no_folder(
    refused: Callable[..., str], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refused("train", "--recipe", "smoke", "--output", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_the_way_of_the_export_is_said_before_training(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "holds something else" in refused("train", "--recipe", "smoke", "--output", tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["pipeline", "thesis.txt"]


def test_an_output_that_is_a_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("", encoding="utf-8")
    assert "is a file; give a folder" in refused("train", "--recipe", "smoke", "--output", tmp_path / "run")


@pytest.mark.parametrize(("words", "status"), [((), 1), (("--minutes", "1"), 0)])
def test_a_run_that_stopped_early_says_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    status: int,
) -> None:
    def stopped(config: object, output: Path, **options: object) -> SimpleNamespace:
        return SimpleNamespace(trainer=SimpleNamespace(is_global_zero=True, global_step=3))

    monkeypatch.setattr(recipe, "train", stopped)
    monkeypatch.setattr(recipe, "newest_checkpoint", lambda output: output)
    monkeypatch.setattr(recipe, "export_checkpoint", lambda checkpoint, folder: folder)
    assert main(["train", "--recipe", "smoke", "--steps", "5", "--output", str(tmp_path), *words]) == status
    assert "stopped at step 3 of 5; --resume goes on" in capsys.readouterr().out
