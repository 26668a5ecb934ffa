"""A folder of results, one for each item of a run, in which a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corrdit.array_files import content_digest
from corrdit.files import OutputFolder, file_digest, output_folder, read_json, remove_unfinished, write_json

SETTINGS_FILE = "settings.json"
FAILURE_FILE = "failed.json"
ON_BROKEN = ("report", "raise")
"""What becomes of an item that cannot be made: it is written down and the others go on, or the run stops."""
_MADE = "made"
_MOST_NAMES = 10

Keywords = Mapping[str, Any]
"""Arguments by name, which are checked by what takes them."""

Inputs = Mapping[str, str]
"""What a result was made from, by a word for each: digests of contents."""


def refuse_other_settings(
    output: str | os.PathLike[str], earlier: Mapping[str, object], now: Mapping[str, object], *, of: str = ""
) -> None:
    """Raises ValueError where a folder's results were made with other settings than those of now, and says which."""
    changed = [name for name in now if earlier.get(name) != now[name]]
    if changed:
        said = ", ".join(f"{name} {earlier.get(name)!r} (now {now[name]!r})" for name in changed)
        raise ValueError(
            f"{os.fspath(output)} holds results made with other settings{of}: {said}; give another output folder, or "
            "the same settings to go on"
        )


def refuse_other_record(file: Path, now: Mapping[str, object]) -> None:
    """For a folder of one result: it stays unless what its record says of how it was made is so now.

    Args:
        file: the record, in JSON; nothing is refused where there is none.
        now: how the result will be made; a record of an earlier version may know less.

    Raises:
        ValueError: the folder holds a result that was made otherwise, or a record that cannot be read.
    """
    try:
        earlier = read_json(file)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(
            f"{file} says nothing of the result it lies with ({error}); give another output folder, or remove it"
        ) from error
    plain = json.loads(json.dumps(now, default=str))
    refuse_other_settings(file.parent, earlier, {name: plain[name] for name in plain if name in earlier})


def check_on_broken(value: str) -> str:
    """The value; raises ValueError unless it is one of `ON_BROKEN`."""
    if value not in ON_BROKEN:
        raise ValueError(f"on_broken must be one of {', '.join(map(repr, ON_BROKEN))}, got {value!r}")
    return value


@dataclass(frozen=True)
class UnfinishedResult:
    """A result that is being written.

    Args:
        folder: hidden; what is in it becomes the item's result.
        facts: of the result, for its record; to be filled in.
    """

    folder: Path
    facts: dict[str, object] = field(default_factory=dict)


class ResultFolder:
    """Results of a run: settings for all of them, and for each item files with a record, or the reason why not.

    `settings.json` says how the results are made, the model's weights included; a run with others is refused. The
    record of an item is written last, after its files; it holds facts about the result, and digests of what it was
    made from, of its files and of itself. So an item is done only while all of its files are as they were written and
    its inputs as they were read. Everything is written beside and renamed, so a run may be killed at any time. Runs
    that begin in one folder at the same time agree on its settings by a lock.

    Args:
        path: the folder; made when a run begins.
        what: the kind of run, for messages.
        record: where the record of an item is, within the folder, with `{name}` for its name.
        failure: where it is said why an item has no result.
        results: where the files of an item are.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        what: str = "a run",
        record: str = ".records/{name}.json",
        failure: str = f"{{name}}/{FAILURE_FILE}",
        results: str = "{name}",
    ) -> None:
        self.path, self.what = output_folder(path), what
        self._record, self._failure, self._results = record, failure, results

    def settings(self) -> dict[str, object]:
        """How the results were made; empty where no run has begun.

        Raises:
            ValueError: `settings.json` is damaged, or not such a file.
        """
        file = self.path / SETTINGS_FILE
        try:
            return read_json(file)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(
                f"{file} is not a settings file, not a file of {self.what} ({error}); give another output "
                "folder, or remove it with the results"
            ) from error

    def check_settings(self, settings: Mapping[str, object]) -> None:
        """Raises ValueError where the folder holds results that were made with other settings, or nobody knows how."""
        if earlier := self._known_settings():
            refuse_other_settings(self.path, earlier, json.loads(json.dumps(settings, default=str)))

    def begin(
        self,
        settings: Mapping[str, object],
        *,
        joined: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None,
    ) -> None:
        """Make the folder, write down how its results are made, and clear up after runs that were killed.

        Args:
            settings: what must be the same for a run to go on.
            joined: of settings that may grow: gives what to write from those that are there (or refuses them).

        Raises:
            ValueError: the folder holds results that were made otherwise.
        """
        if joined is None:
            self.check_settings(settings)
        else:
            joined(self._known_settings())
        self.path.mkdir(parents=True, exist_ok=True)
        with _locked(self.path):
            if joined is None:
                self.check_settings(settings)
            else:
                settings = joined(self._known_settings())
            write_json(self.path / SETTINGS_FILE, json.loads(json.dumps(settings, default=str)))
        for folder, _, _ in os.walk(self.path):
            remove_unfinished(Path(folder))

    def record_file(self, name: str) -> Path:
        """Where the record of an item is or will be."""
        return self._inside(self._record, name)

    def failure_file(self, name: str) -> Path:
        """Where it is or would be said why an item has no result."""
        return self._inside(self._failure, name)

    def files_of(self, name: str) -> Path:
        """The folder of an item's files."""
        return self._inside(self._results, name)

    def record(self, name: str) -> dict[str, object] | None:
        """Facts about the result of an item, or None where there is none yet.

        Raises:
            ValueError: the record is damaged, or was changed by hand.
        """
        contents = self._contents(name)
        return None if contents is None else contents[0]

    def unmade(self, name: str, inputs: Inputs | Callable[[], Inputs] | None = None) -> str | None:
        """Why an item has to be made: "" where it has not been made yet, what is wrong where it has, None if nothing.

        Args:
            name: of the item.
            inputs: digests of what it is made from, or a function that gives them; None does not compare them.
        """
        try:
            contents = self._contents(name)
        except ValueError as error:
            return str(error)
        if contents is None:
            return ""
        _, read, files = contents
        for file, digest in files.items():
            path = self.path / file
            if not path.is_file():
                return f"{file} is gone"
            if file_digest(path) != digest:
                return f"{file} is damaged"
        if inputs is not None:
            try:
                now = inputs() if callable(inputs) else inputs
            except FileNotFoundError:  # what was made from it stands
                return None
            changed = [word for word in (*now, *(read.keys() - now.keys())) if now.get(word) != read.get(word)]
            if changed:
                return f"other {' and '.join(changed)} than before"
        return None

    def left(self, items: Mapping[str, Inputs | Callable[[], Inputs] | None]) -> list[str]:
        """Names of the items that are to be made; warns of those that are made again.

        Args:
            items: names, with their inputs as `unmade` takes them.
        """
        reasons = {name: self.unmade(name, inputs) for name, inputs in items.items()}
        again = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
        if again:
            more = f" and {len(again) - _MOST_NAMES} more" if len(again) > _MOST_NAMES else ""
            warnings.warn(f"{self.path}: made again are {', '.join(again[:_MOST_NAMES])}{more}", stacklevel=2)
        return [name for name, reason in reasons.items() if reason is not None]

    @contextlib.contextmanager
    def result(self, name: str, inputs: Inputs, *, last: str | None = None) -> Iterator[UnfinishedResult]:
        """Make an item: files that are written into the hidden folder become its files, and the record follows.

        Args:
            name: of the item.
            inputs: digests of what it is made from.
            last: name of the file that gets its place after all others, where some are there already.
        """
        place = self.files_of(name)
        with OutputFolder(place, last=last) as hidden:
            result = UnfinishedResult(hidden)
            yield result
            written = [path for path in sorted(hidden.rglob("*")) if path.is_file()]
            files = {place / path.relative_to(hidden): file_digest(path) for path in written}
        self._finish(name, result.facts, inputs, files)

    def finish(
        self, name: str, facts: Mapping[str, object], inputs: Inputs | None = None, files: Iterable[Path] = ()
    ) -> None:
        """Write the record of an item whose files are in their places; an earlier failure is forgotten."""
        self._finish(name, facts, inputs or {}, {file: file_digest(file) for file in files})

    def fail(self, name: str, error: str, **facts: object) -> None:
        """Write down why an item has no result; what is left of an earlier one is none any more."""
        self.record_file(name).unlink(missing_ok=True)
        file = self.failure_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"name": name, **facts, "error": error})

    def failure(self, name: str) -> str | None:
        """Why an item has no result, or None."""
        file = self.failure_file(name)
        try:
            return str(read_json(file).get("error"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            return f"it failed, and {file} is damaged ({error})"

    def _known_settings(self) -> dict[str, object]:
        """Settings; raises ValueError where they are gone, but results that were made with them are not."""
        earlier = self.settings()
        record = None if earlier else next(self.path.glob(self._record.format(name="**/*")), None)
        if record is not None:
            raise ValueError(
                f"{self.path} holds results ({record.relative_to(self.path)}), but no {SETTINGS_FILE} that says how "
                "they were made; give another output folder, or remove them"
            )
        return earlier

    def _finish(self, name: str, facts: Mapping[str, object], inputs: Inputs, files: Mapping[Path, str]) -> None:
        made: dict[str, object] = {
            "inputs": dict(inputs),
            "files": {file.relative_to(self.path).as_posix(): digest for file, digest in files.items()},
        }
        plain: dict[str, object] = json.loads(json.dumps(facts, allow_nan=False, default=str))
        made["record"] = content_digest(plain, made)
        record = self.record_file(name)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {**plain, _MADE: made})
        self.failure_file(name).unlink(missing_ok=True)

    def _contents(self, name: str) -> tuple[dict[str, object], dict[str, str], dict[str, str]] | None:
        """Facts, digests of the inputs and digests of the files; None where there is no record."""
        file = self.record_file(name)
        try:
            facts = read_json(file)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{file.relative_to(self.path)} is damaged ({error})") from error
        made = facts.pop(_MADE, None)
        if not isinstance(made, dict) or made.pop("record", None) != content_digest(facts, made):
            raise ValueError(f"{file.relative_to(self.path)} is not as it was written")
        return facts, made["inputs"], made["files"]

    def _inside(self, place: str, name: str) -> Path:
        path = self.path / place.format(name=name)
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{name!r} cannot be the name of a result, for it leads out of {self.path}")
        return path


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else is in a block with the same folder; the lock goes with the process that holds it."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}); begin no two runs there at once", stacklevel=4)
        yield
    finally:
        os.close(descriptor)
