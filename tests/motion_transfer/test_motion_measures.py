"""Losses and measures of motion on tensors alone."""

import numpy as np
import pytest
import torch

from corrdit import TokenGrid, motion, ops


def test_released_flow_loss_leaves_out_vectors_whose_reference_is_zero():
    flow = torch.tensor([[1.0, 2.0], [5.0, 5.0], [0.0, 1.0]], requires_grad=True)
    reference = torch.tensor([[1, 0], [0, 0], [0, -1]])
    loss = motion.flow_loss(flow, reference)
    assert float(loss.detach()) == pytest.approx((0 + 4 + 0 + 4) / 4)
    (gradient,) = torch.autograd.grad(loss, flow)
    assert (gradient[1] == 0).all()
    paper = motion.flow_loss(flow.detach(), reference, variant="paper")
    assert float(paper) == pytest.approx(4 + 25 + 25 + 4)


def test_a_reference_without_motion_is_refused():
    with pytest.raises(ValueError, match="nothing in it moves"):
        motion.flow_loss(torch.ones(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="one shape"):
        motion.flow_loss(torch.ones(3, 2), torch.zeros(4, 2))


def test_smm_by_its_formula_and_as_released():
    target, reference = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64).unbind(0)
    mean, wanted = target.mean((-1, -2)), reference.mean((-1, -2))
    paper, released = 0.0, 0.0
    for i in range(3):
        for j in range(3):
            paper += float(((mean[j] - mean[i]) - (wanted[j] - wanted[i])).square().sum())
        cosine = torch.nn.functional.cosine_similarity(mean - wanted[i], wanted - wanted[i], dim=0)
        released += float(1 - cosine.mean()) / 3
    assert float(motion.smm_loss(target, reference)) == pytest.approx(paper)
    assert float(motion.smm_loss(target, reference, variant="released")) == pytest.approx(released)
    # Only change over time counts for the paper's loss, the released one sees the frames' own means too.
    assert float(motion.smm_loss(reference + 3, reference)) == pytest.approx(0, abs=1e-12)
    assert float(motion.smm_loss(reference + 3, reference, variant="released")) > 1e-3


def test_temporal_attention_follows_the_largest_weight_of_another_frame():
    grid = TokenGrid(3, 2, 2, text_tokens=2)
    q, k = torch.randn(2, 1, 2, grid.tokens, 8)
    attention = motion.temporal_attention(q, k, grid)
    assert attention.shape == (1, 2, 4, 3, 3)
    place, head = 3, 1
    rows = [grid.text_tokens + frame * 4 + place for frame in range(3)]
    logits = q[0, head, rows] @ k[0, head, rows].T / 8**0.5
    logits.fill_diagonal_(float("-inf"))
    torch.testing.assert_close(attention[0, head, place], logits.softmax(-1))
    other = attention.clone()
    other[..., 0, 1], other[..., 0, 2] = 0.9, 0.1
    followed = attention[..., 0, :].argmax(-1)
    first = torch.where(followed == 1, 0.9, 0.1) - attention[..., 0, :].amax(-1)
    loss = motion.temporal_attention_loss(other, attention)
    assert float(loss) == pytest.approx(float(first.square().sum() / (3 * first.numel())), rel=1e-5)


def test_nearest_latents_find_a_known_shift():
    frame = torch.randn(4, 6, 8)
    latents = torch.stack([frame, frame.roll(2, dims=-1), frame.roll(1, dims=-2)])
    flow = motion.latent_displacement(latents)
    assert (flow[0, 0] == 0).all()
    assert (flow[0, 1, :, :6] == torch.tensor([2, 0])).all()
    assert (flow[0, 2, :5] == torch.tensor([0, 1])).all()
    patches = motion.latent_displacement(latents, patch=2)
    assert (patches[0, 1, :, :3] == torch.tensor([1, 0])).all()


def test_coarse_centers_lie_at_the_match_of_the_tiles():
    grid = TokenGrid(2, 6, 8)
    marks = torch.nn.functional.one_hot(torch.arange(12), 12).float().unflatten(0, (3, 4))
    marks = marks.repeat_interleave(2, 0).repeat_interleave(2, 1)
    tokens = torch.stack([marks, marks.roll(2, dims=1)]).reshape(1, 1, grid.tokens, 12)
    centers = motion.coarse_centers(tokens, tokens, grid, 2)
    assert centers.shape == (1, 2, 2, 6, 8, 2)
    column, row = centers[0, 0, 1, 3, 4].tolist()
    assert (column, row) == (6, 3)
    flow = ops.soft_displacement(40 * tokens, tokens, grid, window=1, center=centers)
    assert flow.shape == (1, 2, 2, 6, 8, 2)


def test_motion_errors():
    truth = np.zeros((2, 3, 2))
    truth[:, :, 0] = np.arange(3) * 2
    assert motion.motion_error(truth, truth) == (0, 0)
    turned = np.stack([np.zeros_like(truth[..., 0]), truth[..., 0]], axis=-1)
    assert motion.motion_error(turned, truth).direction == pytest.approx(90)
    assert motion.motion_error(2 * truth, truth) == (0, pytest.approx(1))
    still = motion.motion_error(0 * truth, truth)
    assert still.direction == pytest.approx(90)
    assert still.speed == pytest.approx(1)
    assert motion.direction_agreement([[1, 0], [0, 3]], [2, 0]) == pytest.approx(0.75)
    assert motion.direction_agreement([[0, 0]], [1, 0]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no point of the truth moves"):
        motion.motion_error(truth, 0 * truth)
