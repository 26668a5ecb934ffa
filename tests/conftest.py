"""Fixtures shared by all tests."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads one file of reference numbers computed with the papers' released code."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    return load
