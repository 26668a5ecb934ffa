"""A folder of results: bound to settings and contents, damaged ones made again, nothing half-written or left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from corrdit.files import OutputFolder, file_digest, remove_unfinished, written_beside
from corrdit.runs import ResultFolder

DEAD_PROCESS = "import os; print(os.getpid())"


def dead_process() -> int:
    return int(subprocess.run([sys.executable, "-c", DEAD_PROCESS], capture_output=True, check=True).stdout)


def made(folder: ResultFolder, name: str, text: str = "result", **inputs: str) -> None:
    with folder.result(name, inputs) as result:
        (result.folder / "out.txt").write_text(text)
        result.facts["length"] = len(text)


@pytest.fixture
def folder(tmp_path: Path) -> ResultFolder:
    results = ResultFolder(tmp_path / "out", what="a test")
    results.begin({"model": "one"})
    made(results, "a", video="1")
    return results


def test_a_result_is_done_while_files_and_inputs_are_the_same(folder: ResultFolder) -> None:
    assert folder.unmade("a", {"video": "1"}) is None
    assert folder.unmade("b", {"video": "1"}) == ""
    assert folder.record("a") == {"length": 6}
    assert folder.unmade("a", {"video": "2"}) == "other video than before"
    assert folder.unmade("a", {"video": "1", "tracks": "3"}) == "other tracks than before"
    assert folder.unmade("a", {}) == "other video than before"
    with pytest.warns(UserWarning, match=r"made again are a \(other video than before\)"):
        assert folder.left({"a": {"video": "2"}, "b": None}) == ["a", "b"]


def test_an_input_that_is_gone_leaves_what_was_made_from_it(folder: ResultFolder, tmp_path: Path) -> None:
    assert folder.unmade("a", lambda: {"video": file_digest(tmp_path / "gone.mp4")}) is None


@pytest.mark.parametrize("contents", [b"", b"resul", b"edited"])
def test_a_damaged_file_is_no_result(folder: ResultFolder, contents: bytes) -> None:
    (folder.files_of("a") / "out.txt").write_bytes(contents)
    assert folder.unmade("a") == "a/out.txt is damaged"
    made(folder, "a", video="1")
    assert folder.unmade("a", {"video": "1"}) is None


@pytest.mark.parametrize("contents", ["", "[]", '{"length": 1000}'])
def test_a_damaged_or_edited_record_is_no_result(folder: ResultFolder, contents: str) -> None:
    folder.record_file("a").write_text(contents)
    with pytest.raises(ValueError, match=r"a\.json is (damaged|not as it was written)"):
        folder.record("a")
    assert "a.json is " in str(folder.unmade("a"))


def test_a_fact_that_was_changed_is_found(folder: ResultFolder) -> None:
    contents = json.loads(folder.record_file("a").read_text())
    folder.record_file("a").write_text(json.dumps({**contents, "length": 1000}))
    assert folder.unmade("a") == ".records/a.json is not as it was written"


def test_a_failure_takes_the_place_of_a_result_and_the_other_way_round(folder: ResultFolder) -> None:
    folder.fail("a", "torn", prompt="grass")
    assert (folder.failure("a"), folder.unmade("a")) == ("torn", "")
    made(folder, "a")
    assert (folder.failure("a"), folder.unmade("a")) == (None, None)
    folder.failure_file("a").write_text("{")
    assert "is damaged" in str(folder.failure("a"))


@pytest.mark.parametrize("contents", ["[]", "{", "", "7"])
def test_settings_that_are_none_are_refused_in_words(folder: ResultFolder, contents: str) -> None:
    (folder.path / "settings.json").write_text(contents)
    with pytest.raises(ValueError, match=r"settings\.json is not a settings file, not a file of a test"):
        folder.begin({"model": "one"})


def test_other_settings_are_refused_with_what_changed(folder: ResultFolder) -> None:
    folder.begin({"model": "one"})
    with pytest.raises(ValueError, match=r"other settings: model 'one' \(now 'two'\), weights None \(now 'w'\)"):
        folder.begin({"model": "two", "weights": "w"})


def test_two_runs_that_begin_together_agree_on_settings(tmp_path: Path) -> None:
    """Each joins what it finds; without a lock the later one would write over the other's."""
    barrier = threading.Barrier(8)

    def begin(name: str) -> None:
        barrier.wait()
        results = ResultFolder(tmp_path / "out")
        results.begin({name: 1}, joined=lambda earlier: {**earlier, name: 1})

    threads = [threading.Thread(target=begin, args=(f"tracker {number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ResultFolder(tmp_path / "out").settings()) == 8


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b"])
def test_no_name_leads_out_of_the_folder(folder: ResultFolder, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        folder.fail(name, "torn")


def test_leftovers_of_dead_processes_go_when_the_next_run_begins(folder: ResultFolder) -> None:
    with written_beside(folder.path / "file"):
        (own,) = folder.path.glob(".file.*.part")
        dead = own.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-")
        (folder.path / "a" / dead).mkdir()
        (folder.path / "a" / dead / "out.txt").write_text("half")
        (folder.path / dead).write_text("half")
        (folder.path / "a" / ".part-old").mkdir()
        folder.begin({"model": "one"})
        assert own.exists(), "somebody is at work on it"
    assert sorted(path.name for path in folder.path.rglob("*part*")) == []
    assert folder.unmade("a") is None


def test_what_another_machine_has_under_way_is_left_alone_for_a_day(tmp_path: Path) -> None:
    other = tmp_path / ".a.012345-1-abcd.part"
    other.write_text("half")
    remove_unfinished(tmp_path)
    assert other.exists()
    os.utime(other, (0, 0))
    remove_unfinished(tmp_path)
    assert not other.exists()


def test_two_runs_into_one_new_folder_both_keep_their_work(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as first:
        (first / "one.txt").write_text("1")
        with OutputFolder(tmp_path / "out") as second:
            (second / "two.txt").write_text("2")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.txt", "two.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_of_a_killed_run_goes_when_the_next_one_begins(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as hidden:
        name = hidden.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-")
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.mp4").write_bytes(b"half")
        (tmp_path / name.replace(".out.", ".other.")).mkdir()
    with OutputFolder(tmp_path / "out"):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [name.replace(".out.", ".other."), "out"]


def test_a_whole_folder_is_replaced(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with OutputFolder(tmp_path / "out", whole=True) as folder:
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", [None, "{}"])
@pytest.mark.parametrize("joined", [None, lambda earlier: {"points": 4}], ids=["same", "joined"])
def test_results_whose_settings_are_gone_are_not_taken_for_others(tmp_path, left, joined):
    """They would be taken for those of any settings."""
    folder = ResultFolder(tmp_path / "run")
    folder.begin({"points": 3})
    folder.finish("clips/a.mp4", {})
    (tmp_path / "run" / "settings.json").unlink()
    if left is not None:
        (tmp_path / "run" / "settings.json").write_text(left)
    with pytest.raises(ValueError, match=r"run holds results .*a.mp4.json.*, but no settings.json that says how"):
        ResultFolder(tmp_path / "run").begin({"points": 4}, joined=joined)
    assert folder.record("clips/a.mp4") == {}


@pytest.mark.parametrize("name", ["v" * 250, "\u00e4" * 125])
def test_names_as_long_as_file_systems_take(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with OutputFolder(tmp_path / "folder" / name) as hidden, written_beside(hidden / name, "w") as file:
            file.write("all of it")
    assert (tmp_path / "folder" / name / name).read_text() == "all of it"
    results = ResultFolder(tmp_path / "out")
    results.begin({"model": "one"})
    made(results, name[:245] if len(name.encode()) == len(name) else name[:122])
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [name], "nothing hidden is left"


def test_what_a_killed_process_left_of_a_long_name_goes(tmp_path: Path) -> None:
    name = "v" * 250
    left = OutputFolder(tmp_path / name).__enter__()
    dead = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead_process()}-"))
    left.rename(dead)
    with OutputFolder(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("place", ["link", "link/results"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    message = f"{tmp_path / 'link'} is a link to {tmp_path / 'gone'}, which does not exist"
    with pytest.raises(ValueError, match=message), OutputFolder(tmp_path / place):
        pass
    with pytest.raises(ValueError, match=message):
        ResultFolder(tmp_path / place)
    with pytest.raises(ValueError, match=message), written_beside(tmp_path / place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("name", ["", "file"])
def test_what_is_no_folder_for_results_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    for make in (ResultFolder, OutputFolder):
        with pytest.raises(ValueError, match=r"the output folder is an empty name|the output folder .* is a file"):
            make(name and tmp_path / name)
