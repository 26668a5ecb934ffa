"""Checks of single arguments: what passes comes back as a plain value, what does not is named."""

import numpy as np
import pytest
import torch

from corrdit import arguments


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_any_library_pass(value):
    assert arguments.whole_number("span", value, 3) == 3


@pytest.mark.parametrize("value", [2, True, 3.0, "3", None, torch.tensor(3.0), torch.tensor([3, 3])])
def test_what_is_no_whole_number_is_named(value):
    with pytest.raises(ValueError, match="span must be a whole number of at least 3, got"):
        arguments.whole_number("span", value, 3)


def test_finite_numbers_and_their_limits():
    assert arguments.finite_number("share", np.float32(0.5), above=0, most=1) == 0.5
    for value, message in (("1", "must be a number"), (True, "must be a number"), (float("nan"), "must be finite and")):
        with pytest.raises(ValueError, match=f"share {message}"):
            arguments.finite_number("share", value, least=0)
    for value in (0, -1.0, 1.5, float("inf")):
        with pytest.raises(ValueError, match="share must be finite and above 0 and at most 1, got"):
            arguments.finite_number("share", value, above=0, most=1)


def test_flags_words_and_lists():
    assert arguments.flag("refine", 1) is True
    assert arguments.choice("mode", "first", ("first", "strided")) == "first"
    assert arguments.entries("frames", (frame for frame in (1, 2))) == [1, 2]
    with pytest.raises(ValueError, match="refine must be True or False, got 'no'"):
        arguments.flag("refine", "no")
    with pytest.raises(ValueError, match="mode must be one of first, strided, got 'last'"):
        arguments.choice("mode", "last", ("first", "strided"))
    for value in (3, torch.tensor(3)):
        with pytest.raises(ValueError, match="frames must be a list, got"):
            arguments.entries("frames", value)
