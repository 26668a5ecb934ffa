"""Queries and keys of several layers, timesteps and heads made one cost."""

from __future__ import annotations

import pytest
import torch

from corrdit import PointTracker, TokenGrid, load_backbone, ops
from corrdit.tracking.readings import Reading, cost_rows, matches_back, read_tokens

GRID = TokenGrid(frames=3, height=3, width=4, text_tokens=2)
TOKENS = torch.tensor([1, 7])


class DrawnBackbone:
    """Every layer and timestep has queries and keys of its own, text tokens among them."""

    layers, heads = 4, 3

    def __init__(self) -> None:
        self.asked: list[tuple[float, tuple[int, ...]]] = []

    def drawn(self, layer: int, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(int(1000 * layer + timestep))
        return tuple(torch.randn(1, 3, GRID.tokens, 8, generator=generator) for _ in range(2))

    def add_noise(self, latents, noise, timestep):
        return latents + noise

    def forward(self, latents, timestep, operations):
        self.asked.append((timestep, tuple(operations)))
        return {layer: operation(*self.drawn(layer, timestep), GRID, None) for layer, operation in operations.items()}


def rows(reading: Reading) -> torch.Tensor:
    pair = read_tokens(DrawnBackbone(), torch.zeros(3, 1, 3, 4), reading, (3, 4))
    return cost_rows(pair, reading, TOKENS, source=1)[0]


def expected(parts, weights, **options) -> torch.Tensor:
    """From heads side by side, with text."""
    q, k = (torch.cat([part[which] for part in parts], 1) for which in (0, 1))
    return ops.cost_rows(q, k, GRID, TOKENS, source=1, head_weights=weights, backend="reference", **options)[0]


def test_chosen_heads_of_two_layers_add_up_their_products():
    weights = (0.0, 1.0, 0.5, 2.0, 0.0, 0.0)
    reading = Reading((1, 3), (50.0,), heads="logits", head_weights=weights, temperature=3.0)
    parts = [DrawnBackbone().drawn(layer, 50.0) for layer in (1, 3)]
    wanted = expected(parts, weights, heads="logits", scale=3.0 * 8**-0.5)
    torch.testing.assert_close(rows(reading)[0], wanted)


def test_timesteps_are_fused_with_a_forward_pass_each():
    reading = Reading((2,), (50.0, 300.0), heads="probabilities")
    parts = [DrawnBackbone().drawn(2, timestep) for timestep in (50.0, 300.0)]
    torch.testing.assert_close(rows(reading)[0], expected(parts, None, heads="probabilities"))
    backbone = DrawnBackbone()
    read_tokens(backbone, torch.zeros(3, 1, 3, 4), reading, (3, 4))
    assert backbone.asked == [(50.0, (2,)), (300.0, (2,))]


def test_joined_channels_are_the_released_fusion():
    """DiffTrack's code concatenates channels, so that the products of a head add up over the layers."""
    reading = Reading((0, 1), (50.0,), heads="probabilities", fusion="channels")
    q, k = (torch.cat([DrawnBackbone().drawn(layer, 50.0)[which] for layer in (0, 1)], 3) for which in (0, 1))
    wanted = ops.cost_rows(q, k, GRID, TOKENS, source=1, heads="probabilities", scale=8**-0.5, backend="reference")[0]
    torch.testing.assert_close(rows(reading)[0], wanted)


def test_votes_keep_the_heads_apart_and_small_weights_leave_heads_out():
    reading = Reading((2,), (50.0,), head_weights=(1.0, 0.0, 1.0), combine="median")
    got = rows(reading)
    q, k = DrawnBackbone().drawn(2, 50.0)
    wanted = ops.cost_rows(q[:, [0, 2]], k[:, [0, 2]], GRID, TOKENS, source=1, heads="none", backend="reference")[0]
    torch.testing.assert_close(got, wanted)


def test_matches_back_lead_from_every_frame_to_the_source():
    reading = Reading((2,), (50.0,))
    pair = read_tokens(DrawnBackbone(), torch.zeros(3, 1, 3, 4), reading, (3, 4))
    back = matches_back(pair, reading, source=1)[0]
    q, k = DrawnBackbone().drawn(2, 50.0)
    wanted = ops.match(q, k, GRID, source=2, targets=[1], backend="reference").xy[0, 0]
    torch.testing.assert_close(back[2], wanted)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading((1,), (50.0,), head_weights=(1.0, 1.0)), "2 weights, but the layer has 3 heads"),
        (Reading((1, 2), (50.0,), head_weights=(0.0,) * 6), "all zero"),
        (Reading((1, 2), (50.0,), head_weights=(1.0, -1.0, 0.0)), "negative"),
        (Reading((1, 2), (50.0,), head_weights=(1.0, 0, 0, 0, 1.0, 0), fusion="channels"), "for one layer"),
    ],
)
def test_bad_weights_are_named(reading, message):
    with pytest.raises(ValueError, match=message):
        rows(reading)


def test_another_token_grid_is_named():
    with pytest.raises(ValueError, match="grid of 3 x 4 tokens a frame, expected"):
        read_tokens(DrawnBackbone(), torch.zeros(3, 1, 3, 4), Reading((1,), (50.0,)), (4, 4))


def test_keys_with_keys_are_cosines_of_the_channels_that_are_left():
    reading = Reading((2,), (50.0,), matched="keys", channels_out=(0, 3, 5), bidirectional=False)
    _, k = DrawnBackbone().drawn(2, 50.0)
    k = torch.nn.functional.normalize(k[:, :, GRID.video_slice][..., [1, 2, 4, 6, 7]], dim=-1)
    source, frames = k[0, :, 12:24][:, TOKENS], k[0].unflatten(1, (3, 12))
    cosines = torch.einsum("hpd,hfsd->hpfs", source, frames)
    torch.testing.assert_close(rows(reading)[0].flatten(2), cosines.softmax(-1).mean(0))


@pytest.mark.parametrize("channels", [(8,), tuple(range(8)), (-1,)])
def test_channels_that_a_head_does_not_have_are_named(channels):
    with pytest.raises(ValueError, match="channels_out must be some of the channels 0 to 7"):
        rows(Reading((1,), (50.0,), channels_out=channels))


def test_a_memory_budget_of_small_frames_is_kept_by_streaming():
    video = torch.zeros(3, 32, 32, 3, dtype=torch.uint8).numpy()
    backbone = load_backbone("embedded")
    plain, kept = (PointTracker(backbone, memory_budget=most).track(video, [(0, 9.0, 9.0)]) for most in (None, 10**8))
    torch.testing.assert_close(torch.as_tensor(kept.xy), torch.as_tensor(plain.xy), atol=1e-2, rtol=0)
