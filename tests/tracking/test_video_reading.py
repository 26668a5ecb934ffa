"""A video read once: the same answers as tracking it, no pass of whole frames for another question, a file of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pixel_backbone import PixelBackbone, moving_texture

from corrdit import PointTracker, TokenGrid, load_backbone, ops
from corrdit.array_files import read_safetensors
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.tracking.video_reading import VideoReading

VIDEO = moving_texture(9, (2, 1))
POINTS = [[0, 40.0, 30.0], [0, 21.3, 12.7], [5, 70.0, 33.0]]
WAYS = [
    {},
    {"crops": (0.5,), "crop_tokens": 4},
    {"noise": True, "frames_per_block": 3},
    {"schedule": "consecutive", "stride": 2},
    {"schedule": "chained"},
    {"visibility": "all", "path_spread": 0.0},
]


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("xy", "visible", "score"))


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_answers_are_those_of_tracking_and_cost_no_pass_again(options, tmp_path):
    backbone = PixelBackbone()
    tracker = PointTracker(backbone, **options)
    reading = tracker.read(VIDEO, frames=[0, 5])
    backbone.forwards.clear()
    answer = reading.track(POINTS)
    assert options.get("crops") or not backbone.forwards
    assert same(answer, tracker.track(VIDEO, POINTS))
    assert same(reading.track(POINTS[1:]), tracker.track(VIDEO, POINTS[1:]))
    reading.save(tmp_path / "video.reading")
    loaded = VideoReading.load(tmp_path / "video.reading", tracker)
    assert same(loaded.track(POINTS), answer)
    assert same(loaded.track([[3, 40.0, 30.0]]), tracker.track(VIDEO, [[3, 40.0, 30.0]]))  # a frame not read before


def test_frames_not_read_before_are_read_once():
    backbone = PixelBackbone()
    reading = PointTracker(backbone).read(VIDEO)
    assert backbone.forwards == [5, 5]
    reading.track(POINTS)
    assert len(backbone.forwards) == 4
    steps = []
    reading.track(POINTS, progress=lambda done, total: steps.append((done, total)))
    assert len(backbone.forwards) == 4
    assert steps == [(0, 0)]


def test_nothing_is_kept_of_a_video_that_is_tracked_only():
    tracker = PointTracker(PixelBackbone(), frames_per_block=3)
    reading = tracker._opened(VIDEO, keep=False)
    reading.track(POINTS)
    assert not reading._reader.held
    assert len(reading._reader.latents) <= 5


@pytest.mark.parametrize(
    "options", [{}, {"heads": "logits"}, {"bidirectional": False}, {"backend": "streaming"}], ids=str
)
def test_costs_are_cost_rows_of_the_same_queries_and_keys(options):
    """The embedded model, one chunk, a point at a token's centre and one between four."""
    backbone = load_backbone("embedded")
    clip = generate([7], WorldConfig(frames=5, height=48, width=64))[0]
    tracker = PointTracker(backbone, head_weights=(0.0, 1.0, 0.5, 0.0), **options)
    reading = tracker.read(clip.video, frames=[2])
    taken = {}

    def take(q, k, grid, key_mask):
        taken.update(q=q.clone(), k=k.clone(), grid=grid)
        return q.new_zeros(1)

    latents = backbone.encode_frames(clip.video, height=48, width=64)
    backbone.forward(latents, backbone.timestep(-1), {4: take})
    grid = taken["grid"]
    q, k = (taken[name][:, 1:3, grid.video_slice] for name in "qk")
    scale = tracker.options.temperature * q.shape[-1] ** -0.5
    given = {"heads": "probabilities", "head_weights": (1.0, 0.5), "scale": scale, **options}

    def rows(*tokens):
        return ops.cost_rows(q, k, grid.without_text(), torch.tensor(tokens), source=2, **given)[0]

    row, column = 5, 9
    centre = (2, (column + 0.5) * 4, (row + 0.5) * 4)
    torch.testing.assert_close(reading.costs(centre), rows(row * 16 + column)[0], rtol=1e-5, atol=1e-6)
    around = rows(row * 16 + column, row * 16 + column + 1, (row + 1) * 16 + column, (row + 1) * 16 + column + 1)
    between = (around * torch.tensor([0.375, 0.125, 0.375, 0.125])[:, None, None, None]).sum(0)
    torch.testing.assert_close(reading.costs((2, centre[1] + 1, centre[2] + 2)), between, rtol=1e-5, atol=1e-6)


def test_costs_of_a_video_of_several_chunks():
    tracker = PointTracker(PixelBackbone(), schedule="consecutive", stride=2)
    reading = tracker.read(VIDEO)
    maps = reading.costs((0, 42.0, 30.0))  # the centre of token (row 7, column 10)
    grid = TokenGrid(5, 16, 24)
    chunks = [chunk for block in tracker._blocks(9, 0) for chunk in block]
    wanted: dict[int, list[torch.Tensor]] = {}
    for chunk in chunks:
        pair = reading._reader.held[chunk].pair
        grid = pair.grid
        rows = ops.cost_rows(pair.q, pair.k, grid, torch.tensor([7 * 24 + 10]), source=0)[0, 0]
        for place, frame in enumerate(chunk.frames):
            wanted.setdefault(frame, []).append(rows[place])
    assert len(wanted[0]) == len(chunks) > 2
    for frame in range(9):
        torch.testing.assert_close(maps[frame], torch.stack(wanted[frame]).mean(0), rtol=1e-5, atol=1e-6)


def test_costs_of_a_chain_are_refused():
    reading = PointTracker(PixelBackbone(), schedule="chained").read(VIDEO)
    with pytest.raises(ValueError, match="chained"):
        reading.costs((0, 40.0, 30.0))


def test_a_file_is_bound_to_weights_and_options_of_reading(tmp_path):
    path = tmp_path / "video.reading"
    PointTracker(PixelBackbone()).read(VIDEO).save(path)
    with pytest.raises(ValueError, match=r"of the model .*pixels 60.0.*pixels 61.0"):
        VideoReading.load(path, PointTracker(PixelBackbone(61.0)))
    for options, named in (
        ({"layer": 2}, r"layers \[1\] \(now \[2\]\)"),
        ({"temperature": 2.0}, "temperature 1.0"),
        ({"crops": (0.5,)}, r"crops \[\] \(now \[0.5\]\)"),
        ({"height": 32, "width": 48}, r"encoded \[64, 96\]"),
    ):
        with pytest.raises(ValueError, match=named):
            VideoReading.load(path, PointTracker(PixelBackbone(), **options))
    other_following = PointTracker(PixelBackbone(), refine=0, tolerance=3.0, backend="streaming")
    assert same(VideoReading.load(path, other_following).track(POINTS), other_following.track(VIDEO, POINTS))


def test_other_files_are_refused(tmp_path):
    tracker = PointTracker(PixelBackbone())
    with pytest.raises(FileNotFoundError):
        VideoReading.load(tmp_path / "none", tracker)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        VideoReading.load(tmp_path / "text", tracker)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no reading"):
        VideoReading.load(tmp_path / "other", tracker)
    reading = tracker.read(VIDEO)
    reading.save(tmp_path / "whole")
    (tmp_path / "torn").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        VideoReading.load(tmp_path / "torn", tracker)


@pytest.mark.parametrize("left_out", ["latents", "chunk.0.q", "facts"])
def test_a_file_without_a_part_is_damaged(left_out, tmp_path):
    from safetensors.torch import save_file

    tracker = PointTracker(PixelBackbone())
    tracker.read(VIDEO).save(tmp_path / "whole")
    tensors, metadata = read_safetensors(tmp_path / "whole")
    tensors.pop(left_out, None)
    if left_out == "facts":
        metadata["facts"] = "{}"
    save_file(tensors, tmp_path / "part", metadata)
    with pytest.raises(ValueError, match="is damaged"):
        VideoReading.load(tmp_path / "part", tracker)


def test_frames_outside_the_video_are_named():
    with pytest.raises(ValueError, match="frame 9 is outside the video's 9 frames"):
        PointTracker(PixelBackbone()).read(VIDEO, frames=[9])


def test_readings_of_different_weights_of_one_model_are_told_apart(tmp_path):
    backbone = load_backbone("embedded")
    clip = generate([7], WorldConfig(frames=3, height=48, width=64))[0]
    PointTracker(backbone).read(clip.video).save(tmp_path / "reading")
    with torch.no_grad():
        backbone.transformer.patch_embed.proj.weight.add_(1e-3)
    with pytest.raises(ValueError, match="weights float32"):
        VideoReading.load(tmp_path / "reading", PointTracker(backbone))
    assert backbone.with_features().fingerprint() != backbone.fingerprint()
