"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import importlib
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_shows_python():
    assert len(BLOCKS) >= 2


def test_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from corrdit.integrations.embedded.world import demo_clip
    from corrdit.video import write_video

    monkeypatch.chdir(tmp_path)
    # The reader's own video; here a generated one.
    video, _ = demo_clip(0)
    write_video("my_video.mp4", video[:6, :80, :120], 8)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["tracks"].xy.shape == (6, 2, 2)
    assert namespace["flow"].shape[-1] == 2
    assert namespace["q"].grad.abs().sum() > 0


def test_relative_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#\s]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_tables_are_those_of_the_result_files(tmp_path, monkeypatch):
    """Every marked table, and a figure changed by hand is found and put right."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("readme_tables")
    results = ROOT / "benchmarks" / "results"
    assert {name for _, name, _ in tables.MARKED.findall(README)} == set(tables.TABLES)
    assert tables.filled(README, results) == (README, [])
    page = tmp_path / "README.md"
    page.write_text(README.replace("| standing still | 21.4 |", "| standing still | 12.4 |"), encoding="utf-8")
    words = ["--page", str(page), "--results", str(results)]
    assert tables.main([*words, "--check"]) == 1
    assert tables.main(words) == 0
    assert page.read_text(encoding="utf-8") == README
