"""The notebooks run from top to bottom and show what they have kept."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "docs" / "notebooks"
_SPEC = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(execute)


def test_there_are_two_and_they_are_small():
    assert [file.stem for file in execute.notebooks()] == ["own-pipeline", "track-points"]
    assert all(file.stat().st_size < 100_000 for file in execute.notebooks())


@pytest.mark.parametrize("file", execute.notebooks(), ids=lambda file: file.stem)
def test_a_notebook_shows_what_it_has_kept(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(file.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert any("assert" in "".join(cell["source"]) for cell in cells)
    for cell, outputs in zip(cells, execute.executed(notebook), strict=True):
        assert execute.texts(cell["outputs"]) == execute.texts(outputs), "".join(cell["source"])
        assert [set(output.get("data", ())) for output in cell["outputs"]] == [
            set(output.get("data", ())) for output in outputs
        ]
