"""Small models run fastest on one thread; and the plain computation that guidance is compared with."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def three_branches() -> ModuleType:
    """The helper file beside this one; test folders are no packages."""
    path = pathlib.Path(__file__).with_name("three_branches.py")
    spec = importlib.util.spec_from_file_location("three_branches", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
