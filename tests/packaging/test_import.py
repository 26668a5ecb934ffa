"""`import corrdit` is light, works without the optional parts, and never brings in jax."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

HEAVY = ("torch", "triton", "diffusers", "lightning", "transformers", "matplotlib", "jax", "numpy", "rich", "imageio")


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light():
    assert run(f"import sys, corrdit; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


def test_the_host_and_the_first_words_of_a_command_load_no_diffusers():
    script = (
        "import sys, corrdit.integrations.diffusers\n"
        "from corrdit.cli import main\n"
        "assert main(['track', 'nowhere.mp4', '--output', 'out']) == 2\n"
        "print([name for name in ('diffusers', 'transformers', 'lightning') if name in sys.modules])"
    )
    assert run(script) == "[]"


def test_a_plan_is_the_first_to_load_diffusers():
    script = (
        "from corrdit.integrations.components import component_class\n"
        "print(component_class('diffusers', 'CogVideoXTransformer3DModel').__name__)"
    )
    assert run(script) == "CogVideoXTransformer3DModel"


def test_import_with_operations_takes_under_300_ms_beyond_torch():
    script = (
        "import time, torch; start = time.perf_counter(); import corrdit, corrdit.ops, corrdit.tracking; "
        "print(time.perf_counter() - start)"
    )
    assert min(float(run(script)) for _ in range(3)) < 0.3


BLOCKER = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize("blocked", [("triton",), ("diffusers",), ("lightning", "pytorch_lightning"), ("jax",)])
def test_works_where_an_optional_part_is_missing(blocked):
    script = BLOCKER.format(blocked=blocked) + (
        "import torch, corrdit\n"
        "from corrdit import TokenGrid, ops\n"
        "q = torch.randn(1, 2, 12, 4)\n"
        "print(list(ops.soft_displacement(q, q, TokenGrid(2, 2, 3)).shape))\n"
        "import corrdit.kernels, corrdit.integrations"
    )
    assert run(script) == "[1, 2, 2, 2, 3, 2]"


def test_missing_diffusers_is_named():
    script = BLOCKER.format(blocked=("diffusers",)) + (
        "import corrdit\ntry:\n    corrdit.load_backbone('embedded')\nexcept ImportError as error:\n    print(error)"
    )
    assert "diffusers" in run(script)


def test_jax_is_never_imported():
    root = pathlib.Path(__file__).parents[2]
    for folder in ("corrdit", "kernels", "integrations", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert "import jax" not in text, path
            assert "from jax" not in text, path
    script = (
        "import sys, corrdit.ops, corrdit.reference, corrdit.streaming, corrdit.tracking, corrdit.metrics\n"
        "import corrdit.integrations.diffusers, corrdit.integrations.lightning, corrdit.cli, corrdit.kernels\n"
        "from corrdit import capture, load_backbone\n"
        "print('jax' in sys.modules)"
    )
    assert run(script) == "False"
