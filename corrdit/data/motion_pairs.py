"""Tables of reference videos and prompts for motion transfer: CSV files, and DiTFlow's own of DAVIS.

DiTFlow's table is `supp/assets/prompts.js` of its project page (github.com/ditflow/ditflow.github.io): by DAVIS video
the prompts `easy`, `medium` and `hard`, which its paper (arXiv 2412.07776, section 5) calls Caption, Subject and Scene,
and `frame_range` [start, end, step], whose end is not in it.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np

from corrdit.arguments import nearest, whole_number
from corrdit.files import refuse_address
from corrdit.video.info import FRAME_SUFFIXES, VIDEO_SUFFIXES

KINDS = ("caption", "subject", "scene")
"""DiTFlow's prompts: what the reference shows, another subject in its scene, and another subject in another scene."""
COLUMNS = ("video", "prompt", *KINDS, "start", "end", "step", "region", "seed", "name")
_RELEASED_KINDS = {"easy": "caption", "medium": "subject", "hard": "scene"}
_RELEASED_RANGE = "frame_range"


class Pair(TypedDict):
    """A reference video and what the new one shows.

    Of the video the frames from `start` up to `end`, which is not one of them (None for the last), every `step`-th.
    `kind` is one of `KINDS`, or "" for a prompt of its own. `region` is where the motion is wanted: the path of a mask,
    the numbers of a box as JSON, or "" for everywhere.
    """

    name: str
    video: str
    prompt: str
    seed: int
    kind: str
    start: int
    end: int | None
    step: int
    region: str


WHOLE_VIDEO = {"kind": "", "start": 0, "end": None, "step": 1, "region": ""}
"""What a pair says that is of all frames of its video, and of all of them."""

Fields = Mapping[str, object]
"""A row of a table, by column."""


def read_pairs(
    path: str | os.PathLike[str], videos: str | os.PathLike[str] | None = None, *, stride: int | None = None
) -> list[Pair]:
    """Pairs of reference videos and prompts from a table.

    Args:
        path: a CSV file whose first line names its columns: `video`, with `prompt` or some of `caption`, `subject` and
            `scene`, and perhaps `start`, `end`, `step`, `region`, `seed` and `name`. A row gives a pair for each
            prompt. A region is the path of a mask, from the table's folder on, or a box as `--region` takes it. Or
            DiTFlow's `prompts.js`, or the same as JSON.
        videos: folder in which the videos are (files, or folders of pictures as in DAVIS, with or without a suffix in
            the table), all of them; None for the table's own, where a video that is missing is found out when it is
            read.
        stride: every so many-th frame, for a table that does not say so itself.

    Returns:
        The pairs, names those of the table (the row's number in a CSV file without), with `-caption` and so on behind
        them where a row has several prompts.

    Raises:
        ValueError: no such file; columns that are missing or not known; a field that is empty or no number; frames
            that are none; a video that is not there; a name that is there twice or no name of a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; give a CSV file with the columns video and prompt, or DiTFlow's prompts.js"
        )
    rows = _released_rows(path) if path.suffix.lower() in (".js", ".json") else _csv_rows(path)
    folder = Path(os.path.abspath(path.parent if videos is None else videos))
    if videos is not None and not folder.is_dir():
        raise ValueError(f"{videos} is no folder; give the folder of the videos")
    if stride is not None:
        whole_number("stride", stride, 1)
        for where, row in rows:
            if row.get("step"):
                raise ValueError(f"{where}: the table has a step of {row['step']}; leave stride out")
        rows = [(where, {**row, "step": str(stride)}) for where, row in rows]
    own = Path(os.path.abspath(path.parent))
    rows = [(where, {**row, "region": _region(row, where, own)}) for where, row in rows]
    pairs = [pair for where, row in rows for pair in _pairs(row, where, folder, must_exist=videos is not None)]
    if not pairs:
        raise ValueError(f"{path} lists no pairs")
    names = [pair["name"] for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has the name {twice[0]!r} more than once; each pair needs a name of its own")
    return pairs


def chosen_frames(frames: np.ndarray, pair: Pair) -> np.ndarray:
    """The frames of a pair's video that are its reference.

    Args:
        frames: all of the video, `[T, H, W, 3]`.
        pair: that says which.

    Raises:
        ValueError: a video with fewer frames.
    """
    if pair["end"] is not None and pair["end"] > len(frames):
        raise ValueError(
            f"the frames {pair['start']} to {pair['end']} are wanted, but {pair['video']} has {len(frames)} frames"
        )
    return frames[pair["start"] : pair["end"] : pair["step"]]


def _csv_rows(path: Path) -> list[tuple[str, Fields]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        given = [column.strip() for column in table.fieldnames or ()]
        table.fieldnames = given
        prompts = [column for column in ("prompt", *KINDS) if column in given]
        # The set of `corrdit world` names its videos.
        missing = [] if "video" in given or "name" in given else ["video"]
        missing += [] if prompts else ["prompt"]
        if missing:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; its first line must name the columns video "
                f"and prompt (or some of {', '.join(KINDS)}), it has {', '.join(given) or 'nothing'}"
            )
        unknown = [column for column in given if column not in COLUMNS]
        if unknown:
            raise ValueError(
                f"{path} has the column {unknown[0]!r}, which means nothing here{nearest(unknown[0], COLUMNS)}; there "
                f"are {', '.join(COLUMNS)}"
            )
        if "prompt" in prompts and len(prompts) > 1:
            raise ValueError(
                f"{path} has the columns prompt and {prompts[1]}; a row has one prompt or one of each kind"
            )
        rows: list[tuple[str, Fields]] = []
        for number, row in enumerate(table):
            if None in row:
                raise ValueError(f"{path}, row {number + 1}: more fields than the first line names columns")
            fields = {"name": f"{number:04d}", **{column: value for column, value in row.items() if value}}
            rows.append((f"{path}, row {number + 1}", {"video": fields["name"], **fields, "prompts": prompts}))
        return rows


def _released_rows(path: Path) -> list[tuple[str, Fields]]:
    """DiTFlow's table, an object of JavaScript whose values are texts."""
    text = path.read_text(encoding="utf-8-sig")
    body = re.sub(r"^\s*(?:export\s+)?(?:const|let|var)\s+\w+\s*=", "", text).strip().rstrip(";")
    try:
        table = json.loads(body) if path.suffix.lower() == ".json" else ast.literal_eval(body)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} is not a table as DiTFlow's prompts.js: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise ValueError(f"{path} is not a table as DiTFlow's prompts.js, with an object for each video")
    rows: list[tuple[str, Fields]] = []
    for video, row in table.items():
        where = f"{path}, {video}"
        unknown = [key for key in row if key not in (*_RELEASED_KINDS, *KINDS, _RELEASED_RANGE)]
        if unknown:
            known = (*_RELEASED_KINDS, _RELEASED_RANGE)
            raise ValueError(f"{where}: {unknown[0]!r} means nothing here; there are {', '.join(known)}")
        fields: dict[str, object] = {_RELEASED_KINDS.get(key, key): value for key, value in row.items()}
        span = fields.pop(_RELEASED_RANGE, None)
        if span is not None:
            numbers = re.fullmatch(r"\s*\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]\s*", str(span))
            if numbers is None:
                raise ValueError(f"{where}: {_RELEASED_RANGE} must be [start, end, step], got {span!r}")
            fields |= dict(zip(("start", "end", "step"), numbers.groups(), strict=True))
        prompts = [kind for kind in KINDS if kind in fields]
        if not prompts:
            raise ValueError(f"{where}: there is no prompt; give {', '.join(_RELEASED_KINDS)}")
        rows.append((where, {"name": str(video), "video": str(video), **fields, "prompts": prompts}))
    return rows


def _pairs(row: Fields, where: str, folder: Path, *, must_exist: bool) -> list[Pair]:
    prompts = row["prompts"]
    assert isinstance(prompts, list)
    start = _number(row, "start", where, 0, least=0)
    step = _number(row, "step", where, 1, least=1)
    end = _number(row, "end", where, None, least=1)
    if end is not None and (start is None or end <= start):
        raise ValueError(f"{where}: the frames {start} to {end} are none; end is not one of them")
    seed = _number(row, "seed", where, 0, least=0)
    assert start is not None
    assert step is not None
    assert seed is not None
    name = str(row["name"]).strip()
    if name.startswith(".") or Path(name).name != name:
        raise ValueError(f"{where}: {name!r} is no name of a folder")
    place = _found(str(row["video"]).strip(), where, folder, must_exist)
    pairs = []
    for kind in prompts:
        text = str(row.get(kind) or "").strip()
        if not text:
            raise ValueError(f"{where}: the column {kind} is empty")
        own = name if len(prompts) == 1 else f"{name}-{kind}"
        pairs.append(
            Pair(
                name=own, video=place, prompt=text, seed=seed, kind="" if kind == "prompt" else kind,
                start=start, end=end, step=step, region=str(row["region"]),
            )
        )  # fmt: skip
    return pairs


def _number(row: Fields, name: str, where: str, default: int | None, *, least: int) -> int | None:
    text = str(row.get(name, "")).strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{where}: {name} must be a whole number of at least {least}, got {text!r}")
    return int(text)


def _region(row: Fields, where: str, folder: Path) -> str:
    """A region as `Pair` has it."""
    text = str(row.get("region") or "").strip()
    if not text.startswith("["):
        refuse_address(Path(text))
        return os.path.abspath(folder / text) if text else ""
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise ValueError(
            f"{where}: region must be the path of a mask, or a box such as [0, 0, 0.5, 1], got {text!r}: {error}"
        ) from error


def _found(name: str, where: str, folder: Path, must_exist: bool) -> str:
    """Where a video is; absolute, so that a run that goes on from another folder finds its pairs again."""
    if not name:
        raise ValueError(f"{where}: the column video is empty")
    refuse_address(Path(name))
    place = folder / name
    candidates = [place, *(place.with_name(place.name + suffix) for suffix in VIDEO_SUFFIXES)]
    for candidate in candidates:
        pictures = candidate.is_dir() and any(file.suffix.lower() in FRAME_SUFFIXES for file in candidate.iterdir())
        if candidate.is_file() or pictures:
            return os.path.abspath(candidate)
    if must_exist:
        raise ValueError(f"{where}: {place} is no video and no folder of pictures; give the folder of the videos")
    return os.path.abspath(place)
