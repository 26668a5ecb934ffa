"""The codec in tiles and slices, and its posterior sampled: by the tracker, by name and from the command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import PointTracker, load_backbone
from corrdit.integrations.diffusers.placement import Placement, place
from corrdit.testing import tiny_backbone
from corrdit.tracking.options import TrackerOptions

VIDEO = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
QUERIES = np.array([[0, 20.0, 20.0], [0, 40.0, 50.0]], np.float32)


@pytest.mark.filterwarnings("ignore:.*no text encoder")
def test_the_tracker_samples_every_frame_by_itself():
    backbone = tiny_backbone("cogvideox-rotary")
    asked = []
    encode = backbone.encode_frames

    def watched(video, **options):
        asked.append(options["posterior_seeds"])
        return encode(video, **options)

    backbone.encode_frames = watched
    given = {"posterior": "sample", "crops": (), "height": 64, "width": 64, "layer": 1}
    tracks = PointTracker(backbone, **given, seed=3).track(VIDEO, QUERIES)
    (seeds,) = asked
    assert seeds == [2**40 + 3 * 1_000_003 + frame for frame in range(5)]
    again = PointTracker(backbone, **given, seed=3, frames_per_block=2, frames_per_chunk=2).track(VIDEO, QUERIES)
    assert [
        seed for part in asked[1:] for seed in part
    ] == seeds  # whatever is encoded together, a frame keeps its seed
    assert tracks.xy.shape == again.xy.shape
    with pytest.raises(ValueError, match='posterior="sample" is for whole frames'):
        TrackerOptions(posterior="sample", crops=(0.5,))


def test_seeds_are_one_for_each_frame():
    backbone = tiny_backbone("cogvideox-rotary")
    with pytest.raises(ValueError, match="2 posterior_seeds were given for 5 frames"):
        backbone.encode_frames(VIDEO, posterior_seeds=[1, 2])
    mode, drawn = backbone.encode_frames(VIDEO), backbone.encode_frames(VIDEO, posterior_seeds=[7] * 5)
    assert not torch.allclose(mode, drawn, atol=1e-3)
    one = backbone.encode_frames(VIDEO[2:3], posterior_seeds=[7])
    torch.testing.assert_close(one[0], drawn[2], atol=1e-4, rtol=1e-4)


def test_a_codec_without_a_spread_has_one_sample():
    backbone = load_backbone("embedded")
    assert torch.equal(backbone.encode_frames(VIDEO, posterior_seeds=[7] * 5), backbone.encode_frames(VIDEO))


def test_a_tiled_codec():
    plain = tiny_backbone("cogvideox-rotary")
    assert not plain.pipe.vae.use_tiling
    tiled, parts = tiny_backbone("cogvideox-rotary"), Placement(codec_tiling=True, codec_slicing=True)
    place(tiled.pipe, parts, torch.device("cpu"))
    assert tiled.pipe.vae.use_tiling
    assert tiled.pipe.vae.use_slicing
    large = np.tile(VIDEO[:1], (1, 2, 2, 1))
    tiled.pipe.vae.tile_sample_min_height = tiled.pipe.vae.tile_sample_min_width = 96
    tiled.pipe.vae.tile_latent_min_height = tiled.pipe.vae.tile_latent_min_width = 12
    whole, parts = plain.encode_frames(large), tiled.encode_frames(large)
    assert whole.shape == parts.shape
    assert 0 < (whole - parts).abs().mean() < whole.std()
    tiled.pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear"):
        place(tiled.pipe, Placement(codec_tiling=True), torch.device("cpu"))
