"""The table of the kernels' machine code by several versions of triton."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corrdit.benchmark.shapes import SHAPES

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.delitem(sys.modules, "kernels_two_tritons", raising=False)
    import kernels_two_tritons

    return kernels_two_tritons


def row(triton: str, head_dim: int, registers: int) -> dict[str, Any]:
    return {"triton": triton, "op": "match", "heads": "logits", "variant": "plain", "dtype": "float16",
            "head_dim": head_dim, "arch": 90, "registers": registers}  # fmt: skip


def test_rows_of_each_version_replace_those_of_an_older_commit(script, tmp_path, monkeypatch):
    calls = []

    def compile_kernels(command: list[str], *, env: dict[str, str], **options: Any) -> None:
        calls.append((command, env["PYTHONPATH"].split(":")[0]))
        part = Path(command[command.index("--output") + 1])
        version = part.stem.removeprefix("kernels-")
        part.write_text(json.dumps({"commit": "new", "rows": [row(version, 64, 100), row(version, 64, 101)]}))

    monkeypatch.setattr(subprocess, "run", compile_kernels)
    monkeypatch.setattr(script, "facts", dict)
    other = tmp_path / "another"
    (other / "triton-0.1.dist-info").mkdir(parents=True)
    (other / "triton-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 0.1\n")
    output = tmp_path / "rows.json"
    output.write_text(json.dumps({"rows": [{"commit": "old", **row("0.1", head_dim, 9)} for head_dim in (64, 128)]}))
    given = ["--triton", str(other), "--parts", str(tmp_path / "parts"), "--output", str(output), "--arch", "90"]
    assert script.main(given) == 0
    assert [command[-2:] for command, _ in calls] == [["--arch", "90"]] * 2
    assert [first for _, first in calls[:2]] == [str(SCRIPTS.parent), str(other)]
    assert script.main(given) == 0
    held = json.loads(output.read_text())["rows"]
    assert [(one["commit"], one["head_dim"], one["registers"]) for one in held if one["triton"] == "0.1"] == [
        ("new", 64, 100), ("new", 64, 101), ("old", 128, 9),
    ]  # fmt: skip  # in the places of the old ones
    assert len(held) == 5


def test_tiles_and_waves_of_averaged_logits_are_filled_at_every_published_shape(script):
    assert len(script.PUBLISHED) == 6
    for name in script.PUBLISHED:
        assert script.shape_use(SHAPES[name])["product"] >= 0.92, name
    # 17,550 rows in 138 tiles, 1,350 keys in 5 tiles of 256 and one of 128; 1,794 programs in 14 waves of 132.
    share = 17550 * 1350 / (138 * 128 * 1408) * 1794 / (14 * 132)
    assert script.shape_use(SHAPES["cogvideox-5b"])["product"] == pytest.approx(share, abs=1e-4)
