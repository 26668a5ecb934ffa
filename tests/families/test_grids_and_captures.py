"""`TokenGrid.of` says before a generation what a capture finds in it, for every family; results by their places."""

from __future__ import annotations

import warnings

import pytest

from corrdit import TokenGrid, capture
from corrdit.testing import TINY_MODELS, tiny_generation, tiny_pipeline


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
def test_the_grid_of_a_generation(name):
    pipe, call = tiny_pipeline(name), tiny_generation(name, steps=2)
    seen = []
    with capture(pipe, layers=0, operation=lambda q, k, grid, key_mask: seen.append(grid) or q.sum()) as captured:
        pipe(**call)
    assert captured[-1, 0] is captured[1, 0]
    size = {key: call[key] for key in ("height", "width", "num_frames") if key in call}
    if len(size) < 3:
        pytest.skip(f"the call of tiny {name} does not say how large its video is")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the empty prompt of a pipeline without text encoder
        found = TokenGrid.of(pipe, **size)
    assert found.without_text() == seen[0].without_text()
    assert found.text_first == seen[0].text_first
    assert bool(found.text_tokens) == bool(seen[0].text_tokens)


def test_bad_input():
    pipe = tiny_pipeline("wan")
    with pytest.raises(ValueError, match=r"height must be a multiple of the 16 pixels .*, got 40"):
        TokenGrid.of(pipe, height=40, width=32, num_frames=9)
    # The pipeline itself makes 9 of them.
    with pytest.raises(ValueError, match=r"as it is, got 10; near it: 9, 13"):
        TokenGrid.of(pipe, height=32, width=32, num_frames=10)
    with pytest.raises(ValueError, match="needs a diffusers video pipeline or a backbone, got int"):
        TokenGrid.of(3, height=32, width=32, num_frames=9)


def test_results_counted_from_the_last():
    pipe = tiny_pipeline("wan")
    with capture(pipe, layers=[0, -1], steps=[0, -1], operation=lambda q, k, grid, key_mask: q.sum()) as captured:
        pipe(**tiny_generation("wan", steps=3))
    assert captured[-1, -1] is captured[2, 2]
    assert captured[-3, 0] is captured[0, 0]
    with pytest.raises(KeyError, match=r"no result for \(step, layer\) \(-2, 0\)"):
        captured[-2, 0]


def test_all_layers():
    pipe = tiny_pipeline("wan")
    with capture(pipe, layers="all", steps=[-1], operation=lambda q, k, grid, key_mask: q.sum()) as captured:
        pipe(**tiny_generation("wan", steps=2))
    assert list(captured) == [(1, layer) for layer in range(len(pipe.transformer.blocks))]
    with pytest.raises(ValueError, match="layers must be whole numbers or \"all\", got '45'"):
        capture(pipe, layers="45", operation=lambda q, k, grid, key_mask: q.sum())
