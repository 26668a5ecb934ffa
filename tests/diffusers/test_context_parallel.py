"""Reading models whose tokens diffusers' context parallelism spreads over processes, in two of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corrdit.integrations.diffusers.captures import capture

PROCESS = Path(__file__).with_name("parallel_process.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("diffusers.hooks.tensor_parallel") is None, reason="of diffusers 0.42"
)
EQUAL = (
    "wan-early",
    "wan-uneven",
    "wan-ring",
    "wan-cross",
    "wan-pipeline",
    "wan-by-hand",
    "wan-compiled",
    "wan-tracked",
    "ltx",
    "ltx-early",
    "ltx-ring",
    "ltx-cross",
    "ltx2",
    "ltx2-ring",
)
REFUSED = {
    "keep-graph": "keep_graph=True cannot be had under context parallelism",
    "compute": 'on_skip="compute" runs the model without the hooks round it',
    "joint": "HunyuanVideoTransformer3DModel runs under context parallelism and has its text among the tokens",
    "guidance": "this model cannot be guided: the transformer runs under context parallelism",
    "transfer": "under context parallelism",
}


def run_in_two_processes(folder: Path, *names: str) -> list[dict[str, str]]:
    """What each process found in each case."""
    meeting = folder / "meeting"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROCESS), str(rank), str(meeting), *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [dict(line.split(": ", 1) for line in out.splitlines()) for out, _ in outputs]


def test_two_processes_read_what_one_does_and_notice_that_they_ask_for_different_things(tmp_path: Path) -> None:
    for found in run_in_two_processes(tmp_path, "wan", "other-settings"):
        assert found["wan"] == "equal"
        assert "layers is {'0': ['operation'], '1': ['operation']} in process 0" in found["other-settings"]


@pytest.mark.slow
def test_families_and_ways_to_run_them(tmp_path: Path) -> None:
    for found in run_in_two_processes(tmp_path, *EQUAL):
        assert found == dict.fromkeys(EQUAL, "equal")


@pytest.mark.slow
def test_what_cannot_be_had_is_refused_by_name(tmp_path: Path) -> None:
    for found in run_in_two_processes(tmp_path, *REFUSED):
        for name, message in REFUSED.items():
            assert message in found[name], name


@pytest.mark.parametrize(("attribute", "package"), [("_cp_config", "cache-dit"), ("_is_parallelized", "ParaAttention")])
@pytest.mark.parametrize("place", ["transformer", "processor"])
def test_parallelism_of_other_packages_is_refused_by_name(attribute, package, place, pipeline, scores) -> None:
    transformer: torch.nn.Module = pipeline("wan").transformer
    setattr(transformer if place == "transformer" else transformer.blocks[1].attn1.processor, attribute, True)
    with (
        pytest.raises(ValueError, match=f"{package}'s own parallelism"),
        capture(transformer, layers=0, operation=scores),
    ):
        pass
