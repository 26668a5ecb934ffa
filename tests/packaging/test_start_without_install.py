"""The source tree runs as it stands, without being installed."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_python_m_corrdit_runs_from_the_source_tree(tmp_path):
    # -S leaves site-packages, and with it an installed copy, off the path; the overview needs nothing from there.
    done = subprocess.run(
        [sys.executable, "-S", "-m", "corrdit", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("corrdit ")
