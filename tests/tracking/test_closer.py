"""Crops looked at again, memory bounded by blocks, what is computed for a few points, and heads that vote."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pixel_backbone import STRIDE, PixelBackbone, moving_texture, shifting_texture

from corrdit import PointTracker, ops
from corrdit.tracking import TrackerOptions
from corrdit.tracking.chunks import frame_blocks
from corrdit.tracking.encoding import FrameStore


class ResizingBackbone(PixelBackbone):
    """Encodes frames of any size at the size asked for."""

    def encode_frames(self, video, *, height, width):
        frames = video.permute(0, 3, 1, 2).float() / 255
        return torch.nn.functional.interpolate(frames, (height, width), mode="bilinear", antialias=True)


def test_crops_find_positions_far_below_a_token():
    video = shifting_texture(6, 2.6)
    queries = [(0, 30.3, 20.0), (3, 50.0, 40.7), (5, 60.0, 3.0)]
    truth = torch.tensor([[[x + 2.6 * (t - frame), y] for frame, x, y in queries] for t in range(6)])
    quarter = {"height": 32, "width": 48}  # a token of the whole frame spans 8 pixels
    errors = {}
    for crops in ((), (0.5,), (0.5, 0.25)):
        tracks = PointTracker(ResizingBackbone(100.0), crops=crops, **quarter).track(video, queries)
        errors[crops] = (tracks.xy - truth).norm(dim=-1).median().item()
    assert errors[0.5,] < 0.7 * errors[()]
    assert errors[0.5, 0.25] < 0.4


def test_crops_at_the_border_lie_inside_the_frame_and_small_frames_are_taken_whole():
    video = moving_texture(3, (0, 0), size=(24, 32))
    queries = [(0, 0.0, 0.0), (0, 32.0, 24.0), (1, 31.0, 1.0), (0, 16.0, 12.0)]
    for tokens in (4, 8, 40):
        tracks = PointTracker(ResizingBackbone(), crops=(0.5,), crop_tokens=tokens).track(video, queries)
        torch.testing.assert_close(tracks.xy, torch.tensor(queries)[:, 1:].expand(3, -1, -1), atol=0.1, rtol=0)


def test_crops_cost_by_the_points_and_whole_frames_do_not():
    video = moving_texture(6, (1, 0))

    def passes(count: int, **options) -> tuple[int, int]:
        backbone = PixelBackbone()
        heard: list[tuple[int, int]] = []
        queries = [(0, 20.0 + 0.05 * point, 30.0) for point in range(count)]
        tracker = PointTracker(backbone, height=64, width=96, **options)
        tracker.track(video, queries, progress=lambda done, total: heard.append((done, total)))
        assert heard[-1] == (len(backbone.forwards), len(backbone.forwards))
        return len(backbone.forwards), heard[-1][1]

    assert passes(1) == passes(300) == (2, 2)
    few = passes(1, crops=(1.0,))
    many = passes(300, crops=(1.0,))
    assert few == (4, 4)
    together = [2**14 // (frames * 64) for frames in (4, 3)]
    assert many[0] == 2 + sum(-(-300 // batch) for batch in together)


def test_only_the_rows_of_tokens_round_the_points_are_computed(monkeypatch):
    asked = []
    whole = ops.cost_rows
    monkeypatch.setattr(
        ops,
        "cost_rows",
        lambda q, k, grid, tokens, **rest: asked.append(len(tokens)) or whole(q, k, grid, tokens, **rest),
    )
    video = moving_texture(3, (STRIDE, 0))
    PointTracker(PixelBackbone()).track(video, [(0, 31.0, 21.0)])
    PointTracker(PixelBackbone()).track(video, [(0, 31.0, 21.0), (0, 61.0, 41.0)])
    assert asked == [4, 8]


@pytest.mark.parametrize("anchor", [0, 20, 39])
def test_long_videos_are_followed_in_blocks_of_bounded_memory(anchor):
    video = moving_texture(40, (STRIDE, 0), size=(32, 240))

    class Watched(np.ndarray):
        longest = 0

        def __getitem__(self, part):
            Watched.longest = max(Watched.longest, part.stop - part.start)
            return np.asarray(self)[part]

    tracker = PointTracker(PixelBackbone(), frames_per_block=8)
    x = 14.0 + STRIDE * anchor
    tracks = tracker.track(video.view(Watched), [(anchor, x, 14.0)])
    expected = torch.tensor([[x + STRIDE * (t - anchor), 14.0] for t in range(40)])
    torch.testing.assert_close(tracks.xy[:, 0], expected, atol=0.1, rtol=0)
    assert Watched.longest <= 9


def test_blocks_cover_both_sides_nearest_first():
    assert frame_blocks(10, 4, 3) == [[5, 6, 7], [8, 9], [1, 2, 3], [0]]
    assert frame_blocks(10, 4, 9) == frame_blocks(10, 4, None) == [[0, 1, 2, 3, 5, 6, 7, 8, 9]]
    assert frame_blocks(3, 2, 1) == [[1], [0]]


def test_kept_frames_are_bounded_and_read_in_order():
    read = []

    class Video:
        def __getitem__(self, part):
            read.append((part.start, part.stop))
            return np.arange(part.start, part.stop)

    store = FrameStore(Video(), lambda part, _: part.float()[:, None], 5)
    store.load([0, 3, 4, 5])
    assert store.of([4, 0]).flatten().tolist() == [4.0, 0.0]
    store.load([0, 6, 7])
    assert len(store) == 5
    assert read == [(0, 1), (3, 6), (6, 8)]
    assert store.of([0]).item() == 0.0
    assert read[-1] == (6, 8), "the frame asked for in every chunk is kept"


def test_the_presets_options_for_the_tracker_count_only_where_no_layer_is_asked_for():
    backbone = PixelBackbone()
    own = TrackerOptions(layers=(0, 2), temperature=2.0, heads="logits")
    backbone.preset = replace(backbone.preset, tracking=own)
    assert PointTracker(backbone).layers == (0, 2)
    assert PointTracker(backbone, temperature=3.0).options.temperature == 3.0
    asked = PointTracker(backbone, layer=1)
    assert (asked.layers, asked.options.temperature) == ((1,), 1.0)
    published = PointTracker(backbone, preset="published")
    assert (published.layers, published.options.temperature) == ((1,), 1.0)


def test_the_median_over_heads_is_not_drawn_away_by_one_of_them():
    class ThreeHeads(PixelBackbone):
        heads = 3

        def forward(self, latents, timestep, operations):
            def wrapped(operation):
                def split(q, k, grid, key_mask):
                    wrong = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)) * 20
                    return operation(q.repeat(1, 3, 1, 1), torch.cat((k, wrong, k), 1), grid, key_mask)

                return split

            return super().forward(latents, timestep, {layer: wrapped(one) for layer, one in operations.items()})

    video = moving_texture(3, (STRIDE, 0))
    tracker = PointTracker(ThreeHeads(), combine="median", path_spread=0, visibility="all")
    tracks = tracker.track(video, [(0, 30.0, 20.0)])
    torch.testing.assert_close(tracks.xy[2, 0], torch.tensor([30.0 + 2 * STRIDE, 20.0]), atol=0.1, rtol=0)


def test_visibility_in_crops_goes_by_their_own_tolerance():
    video = moving_texture(7, (2 * STRIDE, 0))  # the point leaves the frame, so that matches do not lead back

    def seen(**tolerances):
        tracker = PointTracker(ResizingBackbone(), crops=(1.0,), height=64, width=96, **tolerances)
        return tracker.track(video, [(0, 80.0, 30.0)]).visible[4:]

    assert seen(tolerance=1e6, crop_tolerance=1e6).all()
    assert not seen(tolerance=1e6, crop_tolerance=1.0).any()
    assert not seen(tolerance=1.0, crop_tolerance=1e6).any()
