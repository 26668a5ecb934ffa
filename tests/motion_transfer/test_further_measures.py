"""Measures of motion beside DiTFlow's: tracking of windows, diagonals, words, regions."""

import itertools

import pytest
import torch

from corrdit import TokenGrid, motion
from corrdit.grid import CrossGrid

GRID = TokenGrid(4, 6, 8)


def keys(seed=0, grid=GRID):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, grid.tokens, 5, generator=generator, dtype=torch.float64)


def test_rectangular_tiles_are_matched_by_their_means():
    grid = TokenGrid(2, 6, 8)
    marks = torch.nn.functional.one_hot(torch.arange(8), 8).float().unflatten(0, (2, 4))
    marks = marks.repeat_interleave(3, 0).repeat_interleave(2, 1)
    tokens = torch.stack([marks, marks.roll((3, 2), dims=(0, 1))]).reshape(1, 1, grid.tokens, 8)
    centers = motion.coarse_centers(tokens, tokens, grid, (3, 2))
    assert centers[0, 0, 1, 1, 3].tolist() == [5, 4]
    with pytest.raises(ValueError, match="larger than a frame"):
        motion.coarse_centers(tokens, tokens, grid, (7, 2))
    with pytest.raises(ValueError, match="single token"):
        motion.coarse_centers(tokens, tokens, grid, (1, 1))


@pytest.mark.parametrize("inside", [False, True])
def test_tracking_follows_the_windows_of_each_tile(inside):
    k = keys()
    pairs = [(i, j) for i, j in GRID.frame_pairs() if 0 <= j - i <= 3]
    generator = torch.Generator().manual_seed(1)
    center = torch.rand(1, len(pairs), 6, 8, 2, generator=generator) * torch.tensor([9.0, 7.0]) - 1
    region = None
    if inside:
        region = torch.zeros(4, 6, 8, dtype=torch.bool)
        region[:, :, :4] = True
    loss = motion.tracking_loss(k, GRID, center, pairs, window=1, tile=(3, 4), region=region)
    maps = k[0].unflatten(1, (4, 6, 8))
    distances = []
    for frame in range(4):
        for row in (1, 4):
            for column in (2, 6):
                if region is not None and not region[frame, row, column]:
                    continue
                held = []
                for index, (i, j) in enumerate(pairs):
                    if i == frame and j > i:
                        x, y = center[0, index, row, column].round().long().tolist()
                        x, y = min(max(x, 1), 6), min(max(y, 1), 4)
                        held.append(maps[:, j, y - 1 : y + 2, x - 1 : x + 2].mean((1, 2)).flatten())
                distances += [(after - before).norm() for before, after in itertools.pairwise(held)]
    torch.testing.assert_close(loss, torch.stack(distances).mean())


def test_nothing_to_track():
    center = torch.zeros(1, 2, 6, 8, 2)
    with pytest.raises(ValueError, match="no frame is compared with two later ones"):
        motion.tracking_loss(keys(), GRID, center, [(0, 0), (0, 1)], window=1, tile=2)


def test_steady_diagonals_are_smooth():
    distance = torch.arange(5)[:, None] - torch.arange(5)
    steady = (-distance.abs().double()).softmax(-1)
    steady = (steady[1, 0] ** distance.abs().double()).expand(1, 2, 6, 5, 5)
    assert float(motion.diagonal_roughness(steady)) == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 2, 6, 5, 5, generator=generator, dtype=torch.float64)
    by_place = []
    for place in range(6):
        found = [
            (rough[0, :, place, i + 1, j + 1] - rough[0, :, place, i, j]).square().mean()
            for i in range(4)
            for j in range(4)
            if i != j
        ]
        by_place.append(torch.stack(found).mean())
    by_place = torch.stack(by_place)
    torch.testing.assert_close(motion.diagonal_roughness(rough), by_place.square().mean().sqrt())
    region = torch.zeros(5, 2, 3, dtype=torch.bool)
    region[2, 1, 1] = True
    torch.testing.assert_close(motion.diagonal_roughness(rough, region=region), by_place[4])
    with pytest.raises(ValueError, match="at least three frames"):
        motion.diagonal_roughness(rough[..., :2, :2])


def test_the_attention_on_a_word_is_its_share_of_that_on_the_text():
    grid = TokenGrid(2, 2, 3, text_tokens=4, text_first=False)
    q, k = keys(1, grid), keys(2, grid)
    found = motion.word_attention(q, k, grid, (1, 2))
    weights = (q[:, :, :12] @ k[:, :, 12:].transpose(-1, -2) * 5**-0.5).softmax(-1)
    torch.testing.assert_close(found, weights[..., 1:3].sum(-1).mean(1).unflatten(1, (2, 2, 3)))
    mask = torch.ones(1, grid.tokens, dtype=torch.bool)
    mask[:, 14:] = False
    torch.testing.assert_close(motion.word_attention(q, k, grid, (0, 1), key_mask=mask), torch.ones_like(found))
    cross = CrossGrid(grid.frames, grid.height, grid.width, grid.text_tokens)
    apart = (q[:, :, grid.video_slice], k[:, :, grid.text_slice], cross)
    torch.testing.assert_close(motion.word_attention(*apart, (1, 2)), found)
    masked = motion.word_attention(*apart, (0, 1), key_mask=mask[:, grid.text_slice])
    torch.testing.assert_close(masked, torch.ones_like(found))
    with pytest.raises(ValueError, match="by cross-attention"):
        motion.word_attention(q, k, GRID, (0,))
    with pytest.raises(ValueError, match="positions from 0 to 3"):
        motion.word_attention(q, k, grid, (4,))


def test_a_box_moves_evenly_along_its_path():
    path = ((0.0, 0.0, 0.0, 0.25, 0.5), (1.0, 0.5, 0.0, 0.75, 0.5))
    boxes = motion.boxes_on_path(path, [0, 0.5, 1], 4, 8)
    assert [int(box.any(0).nonzero().min()) for box in boxes] == [0, 2, 4]
    assert boxes.flatten(1).sum(1).tolist() == [4, 4, 4]
    assert motion.boxes_on_path([(0, 0.4, 0.4, 0.41, 0.41)], [0.7], 4, 8).sum() == 1
    attention = boxes[None].double()
    assert float(motion.inside_loss(attention, boxes)) == 0
    assert float(motion.inside_loss(1 - attention, boxes)) == 1
    assert float(motion.inside_loss(torch.ones_like(attention), boxes)) == pytest.approx((1 - 4 / 32) ** 2)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([], "path is empty"),
        ([(0, 0.5, 0, 0.4, 1)], "left < right"),
        ([(0, 0, 0, 1, 1), (0, 0, 0, 1, 1)], "must ascend"),
        ([(0, 0, 0, 1)], "entries of"),
        ([(0, 0, 0, 1, 2)], "at most 1"),
    ],
    ids=["empty", "box", "times", "length", "share"],
)
def test_what_is_no_path(path, message):
    with pytest.raises(ValueError, match=message):
        motion.boxes_on_path(path, [0.0], 4, 4)


def test_a_region_counts_its_places_alone():
    generator = torch.Generator().manual_seed(0)
    target, reference = torch.randn(2, 4, 25, 3, 3, generator=generator, dtype=torch.float64)
    region = torch.zeros(4, 3, 3, dtype=torch.bool)
    region[:3, :2] = True
    inside = target[:3, :, :2].flatten(2)[..., None], reference[:3, :, :2].flatten(2)[..., None]
    torch.testing.assert_close(motion.smm_loss(target, reference, region=region), motion.smm_loss(*inside))
    everywhere = torch.ones_like(region)
    channels = motion.moft_channels(reference, 0.2)
    assert torch.equal(motion.moft_channels(reference, 0.2, region=everywhere), channels)
    torch.testing.assert_close(
        motion.moft_loss(target, reference, channels, region=everywhere),
        motion.moft_loss(target, reference, channels),
    )
    changed = target.clone()
    changed[:, :, 2] = 7  # outside in every frame, so that no mean over time inside changes
    for variant in ("paper", "released"):
        loss = [motion.smm_loss(video, reference, variant=variant, region=region) for video in (target, changed)]
        assert loss[0] == loss[1]
    assert motion.moft_loss(changed, reference, channels, region=region) == motion.moft_loss(
        target, reference, channels, region=region
    )
    with pytest.raises(ValueError, match=r"region must be bool \[4, 3, 3\]"):
        motion.smm_loss(target, reference, region=region[:3])
    with pytest.raises(ValueError, match="holds no place"):
        motion.smm_loss(target, reference, region=torch.zeros_like(region))
    region[1:] = False
    with pytest.raises(ValueError, match="fewer than two frames"):
        motion.smm_loss(target, reference, region=region)


def test_the_rows_of_a_region_are_those_of_its_tokens():
    generator = torch.Generator().manual_seed(0)
    target, reference = torch.rand(2, 1, 2, 6, 4, 4, generator=generator, dtype=torch.float64)
    region = torch.zeros(4, 2, 3, dtype=torch.bool)
    region[1, 1, 0] = region[3, 0, 2] = True
    followed = reference.argmax(-1, keepdim=True)
    squared = (target.gather(-1, followed) - reference.gather(-1, followed)).square()[..., 0]
    expected = torch.stack([squared[:, :, 3, 1], squared[:, :, 2, 3]]).mean()
    torch.testing.assert_close(motion.temporal_attention_loss(target, reference, region=region), expected)
