"""Inputs and comparisons shared by the tests of the operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def standard_normal() -> Callable[..., Tensor]:
    """float32 inputs as the reference numbers were computed from: `(seed, *shape)`, times a factor."""

    def draw(seed: int, *shape: int, factor: float = 1.0) -> Tensor:
        values = np.random.default_rng(seed).standard_normal(tuple(int(n) for n in shape), dtype=np.float32)
        return torch.from_numpy(values) * factor

    return draw


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """Largest error over largest value, the measure the released numbers are exact in."""

    def check(result: Tensor, expected: Tensor | np.ndarray, tolerance: float) -> None:
        expected = torch.as_tensor(expected)
        assert result.shape == expected.shape
        result, expected = result.detach().double(), expected.detach().double()
        largest = float(expected.abs().max())
        error = float((result - expected).abs().max())
        assert error <= tolerance * max(largest, 1e-30), f"error {error:.3g} at largest value {largest:.3g}"

    return check
