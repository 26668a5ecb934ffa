"""The pages: Python runs as it stands, commands exist, links lead somewhere, tables are those of their files."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import shlex

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
PYTHON = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)
BLOCKS = [code for _, code in PYTHON.findall(README)]
COMMANDS = re.compile(r"^(?:\.venv/bin/)?corrdit (.+)$", re.MULTILINE)


def page_name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


def shell_lines(page: pathlib.Path) -> list[str]:
    """Calls of `corrdit` in the page's blocks without a language."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in COMMANDS.findall(block)]


def run_blocks(blocks: list[str], name: str) -> dict[str, object]:
    """Runs Python from top to bottom in one namespace, beside a reader's own video; here a generated one."""
    from corrdit.integrations.embedded.world import demo_clip
    from corrdit.video import write_video

    video, _ = demo_clip(0)
    write_video("my_video.mp4", video[:6, :80, :120], 8)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


def test_few_blocks_are_not_run_and_each_says_why():
    skipped = [
        (page.name, reason.strip())
        for page in PAGES
        for reason in re.findall(r"<!-- not run:([^>]*)-->", page.read_text(encoding="utf-8"))
    ]
    assert len(skipped) <= 5
    assert all(len(reason.split()) > 3 for _, reason in skipped)


def test_readme_shows_python():
    assert len(BLOCKS) >= 2


def test_readme_is_for_use_and_short():
    assert len(README.split()) <= 1500


def test_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run_blocks(BLOCKS, "README.md")
    assert namespace["tracks"].xy.shape == (6, 2, 2)
    assert namespace["flow"].shape[-1] == 2
    assert namespace["q"].grad.abs().sum() > 0


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=page_name)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    blocks = [code for skipped, code in PYTHON.findall(page.read_text(encoding="utf-8")) if not skipped]
    monkeypatch.chdir(tmp_path)
    if blocks:
        run_blocks(blocks, page.name)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\s-]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if shell_lines(page)], ids=page_name)
def test_commands_of_a_page_are_accepted(page, tmp_path, monkeypatch):
    """Each is parsed with its options and their values; nothing runs."""
    from jsonargparse import ArgumentParser

    from corrdit.cli import COMMANDS as known

    monkeypatch.chdir(tmp_path)
    for line in shell_lines(page):
        command, *words = shlex.split(line, comments=True)
        assert command in known, line
        if command == "evaluate" and "--config" in words:  # names a file of the package, which the command looks up
            place = words.index("--config")
            del words[place : place + 2]
        parser = ArgumentParser(exit_on_error=False)
        importlib.import_module(f"corrdit.cli.{command}").add_arguments(parser)
        parser.parse_args(words)


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in named)


def test_no_page_installs_from_an_index():
    for page in PAGES:
        assert not re.search(r"pip install [^\n]*\bcorrdit\b", page.read_text(encoding="utf-8")), page


def test_site_has_every_page_and_its_api_every_public_name():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w-]+\.md", str(site["nav"]))
    notebooks = sorted(f"{file.stem}.md" for file in (ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert sorted(listed) == sorted([*(page.name for page in (ROOT / "docs").glob("*.md")), *notebooks])
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    api = hooks.on_page_markdown((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    assert {"::: corrdit.ops.match.match", "::: corrdit.metrics.tapvid.tapvid"} <= set(api.splitlines())
    for module, name in re.findall(r"^::: ([\w.]+)\.(\w+)$", api, re.MULTILINE):
        assert hasattr(importlib.import_module(module), name)
    assert hooks.on_page_markdown("[one](notebooks/a-b.ipynb)") == "[one](notebooks/a-b.md)"
    page = hooks.notebook_page(ROOT / "docs" / "notebooks" / "track-points.ipynb")
    assert page.startswith("# Track points through a video")
    assert "<svg" in page
    assert page.count("```python") == 5
    outside = hooks.on_page_markdown("see [the card](../a/card.md), [`card.md`](../a/card.md) and [this](results.md)")
    assert outside == "see the card (`a/card.md`), `a/card.md` and [this](results.md)"


def test_changelog_lists_every_name_that_moved():
    import corrdit

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in corrdit.MOVED if f"`{name.replace(':', '.')}` -> `" not in text] == []


def test_tables_are_those_of_the_result_files(tmp_path, monkeypatch):
    """Every marked table, and a figure changed by hand is found and put right."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("result_tables")
    results = ROOT / "benchmarks" / "results"
    texts = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    assert {name for text in texts for _, name, _ in tables.MARKED.findall(text)} == set(tables.TABLES)
    for text in texts:
        assert tables.filled(text, results) == (text, [])
        page = tmp_path / "page.md"
        changed = tables.MARKED.sub(lambda table: re.sub(r"(?<=\d)(?= \|)|(?<=\d)(?= s \|)", "1", table[0]), text)
        page.write_text(changed, encoding="utf-8")
        words = ["--page", str(page), "--results", str(results)]
        assert tables.main([*words, "--check"]) == 1
        assert tables.main(words) == 0
        assert page.read_text(encoding="utf-8") == text


def test_run_times_behind_commands_are_those_of_their_file(tmp_path, monkeypatch):
    """Every command with a time is one that the script times, and a time changed by hand is put right."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables, timing = importlib.import_module("result_tables"), importlib.import_module("run_times")
    results = ROOT / "benchmarks" / "results"
    said = dict(re.findall(r"^(.+?) +# (\d+ (?:s|min))\b", README, re.MULTILINE))
    assert len(said) == 8
    assert said.keys() <= {task.shown for task in timing.TIMED.values()}
    rows = tables.read_json(results / tables.RUN_TIMES)["rows"]
    measured = {row["shown"]: row["seconds"] for row in rows.values() if tables.quiet(row)}
    assert all(said[command] == tables.duration(measured[command]) for command in said.keys() & measured.keys())
    (tmp_path / "run_times.json").write_text(
        json.dumps({"rows": {"demo": {**rows["demo"], "seconds": 95.0, "load_average": ["0.1", "0.1", "0.1"]}}})
    )
    page = "make demo  # 9 s, all of it\n"
    assert tables.filled(page, tmp_path) == ("make demo  # 2 min, all of it\n", ["run time of demo"])
    busy = {**rows["demo"], "load_average": ["9.0", "9.0", "9.0"]}
    (tmp_path / "run_times.json").write_text(json.dumps({"rows": {"demo": busy}}))
    assert tables.filled(page, tmp_path) == (page, [])
    assert "not known: load 9" in tables.made("run_times", tmp_path)


def test_tables_of_motion_transfer_are_made_of_a_file_that_is_half_filled(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("result_tables")
    figure = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 3}
    row = dict.fromkeys(("fidelity", "direction_error", "seconds", "adherence"), figure)
    region = dict.fromkeys(("inside", "outside", "outside_above_backbone"), figure)
    measured = {
        "main": {"backbone": row, "moft": {**row, "fidelity_above_backbone": figure}},
        "region": {"moft": region, "moft, in the mask": region, "smm": region},
    }
    result = {"weights": "abc", "commits_of_rows": ["1", "2"], "tables": measured}
    made = {name: make(result) for name, (_, make) in tables.TABLES.items() if name.startswith("transfer")}
    line = "| MOFT | 3 | 0.50 (0.25 to 0.75) | +0.50 (+0.25 to +0.75) | 0 (0 to 1) | 0.50 (0.25 to 0.75) | 0.5 |  |"
    assert line in made["transfer"]
    assert "Weights abc, commits 1, 2." in made["transfer"]
    shares = "| MOFT | 0.50 (0.25 to 0.75) | 0.50 (0.25 to 0.75) | 1.00 | +0.50 (+0.25 to +0.75) |"
    assert made.pop("transfer_region").splitlines()[2:] == [shares]
    assert {made[name] for name in made if name != "transfer"} == {"Not measured with these weights yet.\n"}
    assert tables.transfer({"tables": {}}).endswith("Of earlier weights than those shipped.\n")


def own_options(page: pathlib.Path) -> set[str]:
    """Options in the last column of the page's tables of flags."""
    rows = re.findall(r"^\| .*\| ([^|]*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {option for cell in rows for option in re.findall(r"--[a-z][a-z-]+", cell)}


@pytest.mark.parametrize("name", ["difftrack", "ditflow"])
def test_options_beside_released_flags_exist(name):
    from jsonargparse import ArgumentParser

    accepted: set[str] = set()
    for command in ("analyze", "evaluate", "generate", "transfer"):
        parser = ArgumentParser(exit_on_error=False)
        importlib.import_module(f"corrdit.cli.{command}").add_arguments(parser)
        accepted |= {option for action in parser._actions for option in action.option_strings}
    named = own_options(ROOT / "docs" / f"migrating-from-{name}.md")
    assert len(named) > 15
    assert named <= accepted, named - accepted
