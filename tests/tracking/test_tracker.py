"""The tracker on a backbone whose queries and keys are the pixels themselves, so that every answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pixel_backbone import STRIDE, PixelBackbone, moving_texture

from corrdit import PointTracker
from corrdit.integrations.diffusers import Preset, ReadingPreset
from corrdit.tracking.chunk_costs import ChunkCost, CostAccumulator
from corrdit.tracking.chunks import Chunk, anchored_chunks, chained_chunks, frame_blocks, last_visits
from corrdit.tracking.encoding import working_size
from corrdit.tracking.options import PRESETS, TrackerOptions
from corrdit.tracking.peaks import preferred_peaks, refined_peaks


def test_points_follow_a_texture_moving_by_whole_tokens_from_any_query_frame():
    video = moving_texture(7, (STRIDE, 0))
    queries = [(0, 30.0, 20.0), (3, 42.0, 33.0), (6, 70.0, 50.0)]
    tracks = PointTracker(PixelBackbone()).track(video, queries)
    assert tracks.xy.shape == (7, 3, 2)
    for point, (frame, x, y) in enumerate(queries):
        expected = torch.tensor([[x + STRIDE * (t - frame), y] for t in range(7)])
        torch.testing.assert_close(tracks.xy[:, point], expected, atol=0.05, rtol=0)
        assert bool(tracks.visible[:, point].all())
        assert tracks.xy[frame, point].tolist() == [x, y]
        assert tracks.score[frame, point] == 1


def test_a_point_that_leaves_the_frame_is_called_hidden():
    video = moving_texture(7, (2 * STRIDE, 0))
    tracks = PointTracker(PixelBackbone(), tolerance=1.0).track(video, [(0, 80.0, 30.0)])
    assert tracks.visible[:2, 0].all()
    assert not tracks.visible[4:, 0].any()
    assert PointTracker(PixelBackbone(), visibility="all").track(video, [(0, 80.0, 30.0)]).visible.all()


def test_border_points_of_a_still_video_stay_where_they_are():
    video = moving_texture(3, (0, 0))
    queries = [(0, 0.0, 0.0), (0, 96.0, 64.0), (0, 95.5, 1.0), (1, 2.0, 63.0)]
    tracks = PointTracker(PixelBackbone()).track(video, queries)
    expected = torch.tensor(queries)[:, 1:].expand(3, -1, -1)
    torch.testing.assert_close(tracks.xy, expected, atol=0.02, rtol=0)


def test_a_match_near_the_path_wins_over_an_equal_one_far_away():
    frame = moving_texture(1, (0, 0))[0]
    frame[:, 48:] = frame[:, :48]  # every place has a twin 48 pixels to the right
    video = np.stack([np.roll(frame, step, axis=1) for step in (0, 4, 8, 12, 16)])
    query = [(0, 70.0, 30.0)]
    near = PointTracker(PixelBackbone()).track(video, query)
    torch.testing.assert_close(near.xy[:, 0, 0], torch.tensor([70.0, 74.0, 78.0, 82.0, 86.0]), atol=0.1, rtol=0)
    alone = PointTracker(PixelBackbone(), path_spread=0).track(video, query)
    assert (alone.xy[1:, 0, 0] - near.xy[1:, 0, 0]).abs().max() > 40
    for anchor in (2, 4):
        back = PointTracker(PixelBackbone()).track(video, [(anchor, 70.0, 30.0)])
        expected = torch.tensor([70.0 + 4 * (frame - anchor) for frame in range(5)])
        torch.testing.assert_close(back.xy[:, 0, 0], expected, atol=0.1, rtol=0)


def test_a_much_better_match_far_away_is_taken():
    video = moving_texture(3, (0, 0))
    video[1:] = np.roll(video[1:], 40, axis=2)
    tracks = PointTracker(PixelBackbone()).track(video, [(0, 30.0, 30.0)])
    torch.testing.assert_close(tracks.xy[1, 0], torch.tensor([70.0, 30.0]), atol=0.1, rtol=0)


def test_the_video_may_be_larger_than_the_encoded_frames():
    class Halving(PixelBackbone):
        def encode_frames(self, video, *, height, width):
            assert video.shape[1:3] == (2 * height, 2 * width)
            return video[:, ::2, ::2].permute(0, 3, 1, 2).float() / 255

    video = moving_texture(4, (STRIDE, 0)).repeat(2, axis=1).repeat(2, axis=2)
    tracks = PointTracker(Halving(), tokens_per_frame=16 * 24).track(video, [(0, 60.0, 40.0)])
    torch.testing.assert_close(tracks.xy[3, 0], torch.tensor([60.0 + 3 * 2 * STRIDE, 40.0]), atol=0.1, rtol=0)


@pytest.mark.parametrize("schedule", ["spread", "interleaved", "consecutive", "chained"])
def test_every_schedule_tracks_every_frame(schedule):
    video = moving_texture(11, (STRIDE, 0), size=(48, 96))
    backbone = PixelBackbone()
    calls: list[tuple[int, int]] = []
    tracker = PointTracker(backbone, schedule=schedule, frames_per_chunk=4)
    tracks = tracker.track(video, [(2, 20.0, 22.0)], progress=lambda done, total: calls.append((done, total)))
    expected = torch.tensor([[20.0 + STRIDE * (t - 2), 22.0] for t in range(11)])
    torch.testing.assert_close(tracks.xy[:, 0], expected, atol=0.1, rtol=0)
    assert max(backbone.forwards) <= 4
    assert calls[0][0] == 0
    assert calls[-1] == (len(backbone.forwards), len(backbone.forwards))


def test_noise_follows_the_seed():
    video = moving_texture(3, (STRIDE, 0))
    query = [(0, 30.0, 20.0)]
    scores = [
        PointTracker(PixelBackbone(), noise=noise, seed=seed).track(video, query).score[1, 0].item()
        for noise, seed in ((False, 0), (True, 0), (True, 0), (True, 1))
    ]
    assert scores[1] == scores[2]
    assert len(set(scores)) == 3


def test_published_preset_reads_whole_token_matches_in_the_released_geometry():
    backbone = PixelBackbone()
    tracker = PointTracker(backbone, preset="published", resize_first=None)
    video = moving_texture(14, (0, 0))
    tracks = tracker.track(video, [(0, 40.0, 24.0)])
    assert backbone.forwards[0] == 13
    # The match of a still token is itself, so the map is read at column x / 4 / (24 - 24 / 64) * 23 and row
    # y / 4 / (16 - 24 / 64) * 15, and token t is taken for pixel 4 t.
    expected = torch.tensor([40 / (24 - 24 / 64) * 23, 24 / (16 - 24 / 64) * 15])
    torch.testing.assert_close(tracks.xy[5, 0], expected, atol=1e-3, rtol=0)
    assert tracks.visible.all()
    assert PRESETS["published"].resize_first == (256, 256)


def test_averaging_and_first_chunk_differ_only_where_chunks_overlap():
    video = np.concatenate([moving_texture(6, (3, 1)), moving_texture(6, (2, -1), seed=1)])
    query = [(0, 30.0, 20.0)]
    options = {"schedule": "consecutive", "stride": 2, "frames_per_chunk": 5}
    averaged = PointTracker(PixelBackbone(), **options).track(video, query)
    first = PointTracker(PixelBackbone(), average_overlap=False, **options).track(video, query)
    torch.testing.assert_close(averaged.score, first.score)  # this backbone's maps do not depend on the chunk
    torch.testing.assert_close(averaged.xy, first.xy, atol=1e-4, rtol=0)


class ChunkDependentBackbone(PixelBackbone):
    """Its n-th forward pass has its own sharpness, so that two chunks disagree about a frame they share."""

    def forward(self, latents, timestep, operations):
        self.sharpness = 20.0 * (len(self.forwards) + 1)
        return super().forward(latents, timestep, operations)


def test_overlaps_average_costs_not_positions():
    video = moving_texture(4, (3, 1))
    query = [(0, 30.0, 20.0)]
    options = {"schedule": "consecutive", "stride": 1, "frames_per_chunk": 3, "refine": 0}
    averaged = PointTracker(ChunkDependentBackbone(), **options).track(video, query)
    first = PointTracker(ChunkDependentBackbone(), average_overlap=False, **options).track(video, query)
    assert averaged.score[1, 0] == first.score[1, 0]  # frame 1 is in the first chunk only
    assert averaged.score[2, 0] > first.score[2, 0]  # frame 2 is in a second, sharper one too


def test_released_schedule_for_fifty_frames():
    chunks = anchored_chunks(frame_blocks(50, 0, None)[0], 0, frames_per_chunk=13, schedule="interleaved")
    assert [chunk.targets[0] for chunk in chunks] == [1, 2, 3, 4, 5]
    assert chunks[0].targets == tuple(range(1, 46, 4))
    assert chunks[4].targets == tuple(range(5, 50, 4))


@pytest.mark.parametrize("frames", [2, 3, 12, 13, 14, 24, 25, 50, 300])
@pytest.mark.parametrize("schedule", ["spread", "interleaved", "consecutive"])
def test_chunks_cover_the_video_within_their_size(frames, schedule):
    for anchor in {0, frames // 2, frames - 1}:
        chunks = anchored_chunks(frame_blocks(frames, anchor, None)[0], anchor, schedule=schedule)
        covered = {frame for chunk in chunks for frame in chunk.targets}
        assert covered == set(range(frames)) - {anchor}
        assert all(len(chunk.frames) <= 13 and chunk.source == anchor for chunk in chunks)
        if schedule == "spread":
            assert len(chunks) == -(-(frames - 1) // 12)


def test_chained_chunks_start_where_the_one_before_ended():
    chunks = chained_chunks(12, 4, frames_per_chunk=4)
    assert [(chunk.source, chunk.targets) for chunk in chunks] == [
        (4, (5, 6, 7)), (7, (8, 9, 10)), (10, (11,)), (4, (3, 2, 1)), (1, (0,)),
    ]  # fmt: skip


def test_refined_peak_is_the_weighted_mean_clipped_at_the_border():
    cost = torch.zeros(3, 4, 5)
    cost[0, 1, 2], cost[0, 1, 3] = 0.6, 0.2
    cost[1, 0, 0], cost[1, 3, 4] = 0.5, 0.4
    xy, score = refined_peaks(cost, 1)
    torch.testing.assert_close(xy, torch.tensor([[2.25, 1.0], [0.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(score, torch.tensor([0.6, 0.5, 0.0]))
    assert refined_peaks(cost, 0)[0][0].tolist() == [2.0, 1.0]


def test_a_refinement_beyond_the_frame_takes_the_frame():
    cost = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(1))
    for far in (8, 10**9):
        for wanted, found in zip(refined_peaks(cost, 7), refined_peaks(cost, far), strict=True):
            assert torch.equal(wanted, found)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "queries must have shape"),
        (np.zeros((0, 3)), "no point"),
        ([(0, 1.0)], "shape"),
        ([(0, float("nan"), 1.0)], "finite"),
        ([(9, 1.0, 1.0)], "frame must be a whole number from 0 to 2"),
        ([(0.5, 1.0, 1.0)], "frame must be a whole number"),
        ([(0, 97.0, 1.0)], "x must be from 0 to 96"),
        ([(0, 1.0, -1.0)], "y must be from 0 to 64"),
        ("corner", "must be numbers"),
    ],
)
def test_bad_queries_are_named(queries, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(PixelBackbone()).track(moving_texture(3, (0, 0)), queries)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (moving_texture(1, (0, 0)), "at least two"),
        (np.zeros((3, 8, 8), np.uint8), "frames, height, width, 3"),
        (np.full((3, 8, 8, 3), 255, np.float32), "must be uint8"),
        (np.zeros((3, 8, 8, 3), np.int64), "must be uint8"),
    ],
)
def test_bad_videos_are_named(video, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(PixelBackbone()).track(video, [(0, 1.0, 1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer must be from 0 to 2"),
        ({"preset": "best"}, "preset must be one of"),
        ({"speed": 1}, "unknown tracker option 'speed'"),
        ({"schedule": "random"}, "schedule must be one of"),
        ({"geometry": "released"}, "give refine=0"),
        ({"frames_per_chunk": 1}, "frames_per_chunk"),
        ({"height": 64}, "go together"),
        ({"height": 64, "width": 96, "tokens_per_frame": 9}, "drop tokens_per_frame"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"heads": "none"}, "heads must be one of"),
        ({"path_spread": -1.0}, "path_spread must be a distance"),
        ({"crop_tolerance": -1.0}, "crop_tolerance must be a distance"),
        ({"layer": 1, "layers": [1, 2]}, "layer and layers were both given"),
        ({"step": -1, "steps": [-1]}, "step and steps were both given"),
        ({"layers": [1, 3]}, "layer must be from 0 to 2"),
        ({"crops": [0.5, 2]}, "crops must be scales"),
        ({"crop_tokens": 1}, "crop_tokens"),
        ({"temperature": 0}, "temperature must be"),
        ({"low_pass": -0.5}, "low_pass must be"),
        ({"combine": "mean"}, "combine must be one of"),
        ({"fusion": "sum"}, "fusion must be one of"),
        ({"frames_per_block": 0}, "frames_per_block"),
        ({"preset": "published", "crops": [0.5]}, "takes the costs of whole frames"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(PixelBackbone(), **options)


@pytest.mark.parametrize(("height", "width"), [(480, 720), (720, 480), (64, 96), (30, 1000), (3, 3), (1080, 1920)])
def test_working_size_keeps_shape_and_limit(height, width):
    rows, columns = working_size(height, width, (4, 4), 1350)
    assert rows % 4 == 0
    assert columns % 4 == 0
    assert rows * columns <= 1350 * 16
    assert rows <= -(-height // 4) * 4
    assert columns <= -(-width // 4) * 4
    if min(height, width) > 30:
        assert abs(rows / columns / (height / width) - 1) < 0.06
    if (height, width) == (480, 720):
        assert (rows, columns) == (120, 180)


def test_an_encoded_size_must_be_whole_tokens():
    with pytest.raises(ValueError, match="no whole number of tokens"):
        PointTracker(PixelBackbone(), height=62, width=96).track(moving_texture(3, (0, 0)), [(0, 1.0, 1.0)])


def test_heads_of_weight_zero_are_left_out_and_wrong_counts_named():
    video = moving_texture(3, (STRIDE, 0))
    assert PointTracker(PixelBackbone(), head_weights=[1.0]).track(video, [(0, 30.0, 20.0)]).frames == 3
    with pytest.raises(ValueError, match="2 weights, but the layer has 1 heads"):
        PointTracker(PixelBackbone(), head_weights=[1.0, 0.0]).track(video, [(0, 30.0, 20.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_weights": (1.0, 0.0)}, "2 weights, but the layer has 1 heads"),
        ({"height": 33, "width": 40}, "no whole number of tokens"),
        ({"stride": 2}, 'stride is for schedule="consecutive"'),
        ({"schedule": "consecutive", "stride": 0}, "stride must be a whole number of at least 1"),
        ({"memory_budget": -5}, "memory_budget must be a whole number of at least 1"),
        ({"resize_first": (0, 5)}, "height of resize_first must be a whole number of at least 1"),
        ({"resize_first": (5,)}, r"resize_first must be \(height, width\)"),
    ],
)
def test_what_no_video_could_be_tracked_with_is_refused_before_any(options, message):
    """Otherwise an evaluation would call every video of a set broken."""
    with pytest.raises(ValueError, match=message):
        PointTracker(PixelBackbone(), **options)


class ShortSchedule(PixelBackbone):
    def timestep(self, step, inference_steps):
        if step >= inference_steps:
            raise ValueError(f"step {step} is outside")
        return super().timestep(step, inference_steps)


@pytest.mark.parametrize("options", [{"step": 50}, {"steps": [-1, 50]}])
def test_a_step_outside_the_schedule_is_refused_before_any_video(options):
    with pytest.raises(ValueError, match="step 50 is outside"):
        PointTracker(ShortSchedule(), **options)


def test_frames_that_three_chunks_hold_have_the_mean_of_their_costs():
    chunks = [Chunk(0, (1, 2)), Chunk(0, (2, 3)), Chunk(0, (2, 4))]
    accumulator = CostAccumulator(last_visits(chunks), average=True)
    given = {}
    for index, (chunk, value) in enumerate(zip(chunks, (1.0, 2.0, 6.0), strict=True)):
        cost = ChunkCost(torch.tensor([5]), torch.full((1, 1, 3, 2, 2), value), None)
        given.update({frame: part.rows.unique().tolist() for frame, part in accumulator.add(index, chunk, cost)})
    assert given == {1: [1.0], 2: [3.0], 3: [2.0], 4: [6.0]}


@pytest.mark.parametrize(("near", "place"), [(0.04, 1.0), (0.01, 18.0)])
def test_a_jump_needs_a_match_fifty_times_better_than_the_one_on_the_path(near, place):
    cost = torch.zeros(1, 3, 20)
    cost[0, 1, 1], cost[0, 1, 18] = near, 0.9
    xy, score = preferred_peaks(cost, torch.tensor([[1.0, 1.0]]), spread=2.0, refine=0)
    assert xy.tolist() == [[place, 1.0]]
    assert score.item() == pytest.approx(near if place == 1.0 else 0.9)


class TwoHeads(PixelBackbone):
    """Its second head matches nothing."""

    heads = 2

    def forward(self, latents, timestep, operations):
        def wrapped(operation):
            def split(q, k, grid, key_mask):
                wrong = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)) * 20
                return operation(q.repeat(1, 2, 1, 1), torch.cat((k, wrong), 1), grid, key_mask)

            return split

        return super().forward(latents, timestep, {layer: wrapped(one) for layer, one in operations.items()})


@pytest.mark.parametrize("chosen", [{"head_weights": (0.0, 1.0)}, {"head": 1}])
def test_the_presets_weights_of_heads_are_for_its_own_layer(chosen):
    video, query = moving_texture(3, (STRIDE, 0)), [(0, 30.0, 20.0)]
    backbone = TwoHeads()
    backbone.preset = Preset(ReadingPreset(1, frames_per_chunk=5, **chosen))

    def tracked(**options):
        return PointTracker(backbone, **options).track(video, query).score

    second, mean = tracked(head_weights=(0.0, 1.0)), tracked(head_weights=())
    assert not torch.equal(second, mean)
    for layer in (None, 1):
        assert torch.equal(tracked(layer=layer), second)
    for others in ({"layer": 0}, {"layers": (0,)}, {"layers": (2, 1)}):
        assert torch.equal(tracked(**others), tracked(**others, head_weights=()))


def test_a_size_takes_the_place_of_a_presets_limit_of_tokens_and_a_limit_that_of_a_size():
    backbone = TwoHeads()
    backbone.preset = Preset(ReadingPreset(1, frames_per_chunk=5), tracking=TrackerOptions(tokens_per_frame=24))
    sized = PointTracker(backbone, height=64, width=96).options
    assert (sized.height, sized.width, sized.tokens_per_frame) == (64, 96, None)
    assert PointTracker(backbone).options.tokens_per_frame == 24
    backbone.preset = Preset(ReadingPreset(1, frames_per_chunk=5), tracking=TrackerOptions(height=64, width=96))
    limited = PointTracker(backbone, tokens_per_frame=24).options
    assert (limited.height, limited.width, limited.tokens_per_frame) == (None, None, 24)
