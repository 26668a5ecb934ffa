"""Corrupted frames: the strengths are what they are called, stronger is worse, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from corrdit.data import Corruption
from corrdit.data.corruptions import BLUR, NOISE

GREY = np.full((2, 64, 64, 3), 128, np.uint8)


def texture() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize("kind", ["blur", "noise", "jpeg"])
def test_stronger_is_worse_and_repeatable(kind):
    video = texture()
    errors = []
    for strength in range(1, 6):
        made = Corruption(kind, strength).applied(video)
        assert made.shape == video.shape
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, Corruption.from_text(f"{kind}:{strength}").applied(video))
        errors.append(np.abs(made.astype(float) - video).mean())
    assert errors == sorted(errors)
    assert 0 < errors[0] < errors[4]


def test_noise_and_blur_have_their_deviation():
    noisy = Corruption("noise", 2).applied(GREY)
    assert abs((noisy / 255).std() - NOISE[1]) < 0.005
    assert not np.array_equal(noisy[0], noisy[1])
    edge = np.zeros((1, 64, 64, 3), np.uint8)
    edge[:, :, 32:] = 255
    slope = np.diff(Corruption("blur", 3).applied(edge)[0, 32, :, 0].astype(float))
    place = np.arange(63) - 31
    deviation = np.sqrt((slope * place**2).sum() / slope.sum() - ((slope * place).sum() / slope.sum()) ** 2)
    assert abs(deviation - BLUR[2]) < 0.3


@pytest.mark.parametrize("text", ["blur", "blur:0", "blur:6", "fog:2", "blur:1.5", "", 3])
def test_other_texts_are_named(text):
    with pytest.raises(ValueError, match="corruption must be KIND:STRENGTH"):
        Corruption.from_text(text)
