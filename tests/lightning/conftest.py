"""Puts the modules of this folder's helpers where the tests find them."""

from __future__ import annotations

import importlib.util
import pathlib
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def held() -> ModuleType:
    """The module `held_models.py` beside this file; the repository is not on sys.path in tests."""
    path = pathlib.Path(__file__).with_name("held_models.py")
    spec = importlib.util.spec_from_file_location("held_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
