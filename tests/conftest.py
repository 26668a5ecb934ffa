"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton settles at its first import, which may be diffusers' in any test, whether it can interpret kernels, as
    # tests/kernels does. The variable goes at once: nothing else is to take the kernels for CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module", autouse=True)
def kept() -> None:
    """What is there before a file's tests stays: they, and Python itself, look for garbage in what is theirs alone."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Reads one file of reference numbers computed with the papers' released code."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(autouse=True)
def no_mode_left() -> Iterator[None]:
    """Every test leaves torch without a mode (fake tensors, a default device) that would be at work in the next."""
    before = modes()
    yield
    assert modes() == before, "a mode of torch was left on"


def modes() -> list[str]:
    """The modes that are on in this thread, the outermost first."""
    found = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    return [type(mode).__name__ for mode in found]


@pytest.fixture
def saved_model(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], pathlib.Path]:
    """Saves a tiny pipeline into a folder, and makes up for packages its pipeline is loaded with."""
    from corrdit.integrations.diffusers.testing.tiny_cosmos import NoSafetyChecker
    from corrdit.integrations.diffusers.testing.tiny_models import TINY_MODELS, tiny_pipeline

    def save(name: str) -> pathlib.Path:
        if name.startswith("consisid"):
            pytest.importorskip("cv2", reason="diffusers loads ConsisID beside OpenCV only")
        pipe = tiny_pipeline(name)
        if name.startswith("cosmos"):
            monkeypatch.setattr(f"{type(pipe).__module__}.CosmosSafetyChecker", NoSafetyChecker)
        folder = tmp_path / TINY_MODELS[name].pipeline
        pipe.save_pretrained(folder)
        return folder

    return save
