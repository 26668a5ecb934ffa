"""DiffTrack's harmonic mean and the motion features of MOFT against the released numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from corrdit.metrics import harmonic_mean
from corrdit.motion import moft_channels, moft_loss


def test_harmonic_mean_equals_the_released_one(golden):
    reference = golden("harmonic_mean")
    mean = harmonic_mean(reference["accuracy"], reference["confidence"], reference["attention"])
    assert mean.shape == reference["harmonic"].shape
    np.testing.assert_allclose(mean, reference["harmonic"], rtol=0, atol=1e-12)


def test_harmonic_mean_does_not_depend_on_units_and_takes_tables_of_any_origin():
    random = np.random.default_rng(1)
    tables = random.random((3, 4, 6))
    mean = harmonic_mean(*tables)
    np.testing.assert_allclose(harmonic_mean(tables[0] * 100, tables[1] - 5, tables[2]), mean, atol=1e-12)
    np.testing.assert_allclose(harmonic_mean(*(torch.from_numpy(table) for table in tables)), mean)
    assert mean.min() == 0
    assert mean.max() <= 1


@pytest.mark.parametrize(
    "tables, message",
    [
        ((np.eye(2), np.eye(2), np.eye(3)), "attention must have shape"),
        ((np.ones(4), np.ones(4), np.ones(4)), r"\[layers, steps\]"),
        ((np.eye(2), np.ones((2, 2)), np.eye(2)), "confidence is 1.0 everywhere"),
        ((np.eye(2), np.eye(2), np.eye(2) * np.nan), "attention holds"),
        ((np.eye(2), np.eye(2), np.eye(2).astype(str)), "attention must be real"),
    ],
)
def test_harmonic_mean_refuses(tables, message):
    with pytest.raises(ValueError, match=message):
        harmonic_mean(*tables)


def test_moft_equals_the_released_code(golden):
    reference = golden("moft")
    features, target = torch.from_numpy(reference["reference"]), torch.from_numpy(reference["target"])
    channels = moft_channels(features, float(reference["fraction"]))
    assert channels.tolist() == reference["channels"].tolist()
    assert math.isclose(moft_loss(target, features, channels).item(), float(reference["loss"]), rel_tol=1e-5)


def test_moft_finds_the_channel_that_moves():
    torch.manual_seed(0)
    features = torch.randn(1, 10, 4, 5).expand(6, -1, -1, -1) + 0.01 * torch.randn(6, 10, 4, 5)
    features[:, 7] += torch.arange(6.0)[:, None, None]
    assert moft_channels(features, 0.04).tolist() == [7]
    assert moft_channels(features, 1.0).tolist() == list(range(10))


def test_moft_loss_is_zero_for_the_same_motion_on_other_content_and_has_right_gradients():
    torch.manual_seed(0)
    reference = torch.randn(4, 6, 2, 3, dtype=torch.float64)
    target = (reference + torch.randn(1, 6, 2, 3, dtype=torch.float64)).requires_grad_()
    channels = torch.tensor([1, 4])
    assert abs(moft_loss(target, reference, channels).item()) < 1e-12
    assert math.isclose(moft_loss(-reference, reference, channels).item(), 2)
    assert torch.autograd.gradcheck(
        lambda features: moft_loss(features, reference, channels), torch.randn_like(target).requires_grad_()
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: moft_channels(f, 0), "fraction"),
        (lambda f: moft_channels(f, 1.5), "fraction"),
        (lambda f: moft_channels(f[:1], 0.5), "at least two frames"),
        (lambda f: moft_channels(f[0], 0.5), r"\[frames, channels, height, width\]"),
        (lambda f: moft_channels(torch.zeros_like(f), 0.5), "does not change over time"),
        (lambda f: moft_channels(f * torch.nan, 0.5), "NaN"),
        (lambda f: moft_loss(f, f[:3], torch.tensor([0])), "same shape"),
        (lambda f: moft_loss(f, f, torch.tensor([6])), "channels must be from 0 to 5"),
        (lambda f: moft_loss(f, f, torch.tensor([0.5])), "list of channel indices"),
        (lambda f: moft_loss(f, f, torch.tensor([], dtype=torch.int64)), "list of channel indices"),
    ],
)
def test_moft_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 6, 2, 3))
