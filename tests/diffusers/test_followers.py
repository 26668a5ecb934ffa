"""Presets of trackers that followed DiffTrack: chosen by the shape of the model, refused for others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from corrdit import PointTracker, load_backbone
from corrdit.integrations.diffusers.backbones import followers
from corrdit.integrations.diffusers.backbones.followers import FOLLOWERS, Follower, follower_preset
from corrdit.integrations.diffusers.backbones.presets import PRESET_NAMES, Preset
from corrdit.testing import tiny_backbone


def shape(family: str, layers: int, heads: int) -> SimpleNamespace:
    return SimpleNamespace(family=family, layers=layers, heads=heads, preset=None)


def test_every_follower_has_a_name_that_is_accepted_and_a_source():
    assert set(FOLLOWERS) == set(PRESET_NAMES) - {"default", "published"}
    for rows in FOLLOWERS.values():
        for row in rows:
            assert "arXiv" in row.preset.source
            assert Preset.from_mapping(row.preset.described()).described() == row.preset.described()


def test_numbers_are_those_of_the_released_code():
    cogvideox, wan = shape("cogvideox", 30, 30), shape("wan", 30, 12)
    reading = follower_preset("ditracker", cogvideox).reading
    assert (reading.layer, reading.head, reading.step, reading.noise) == (17, 2, 49, False)
    heft = follower_preset("heft", cogvideox)
    assert (heft.reading.layer, heft.reading.head, heft.tracking.channels_out) == (15, 19, ())
    assert (heft.tracking.tolerance, heft.tracking.update) == (27 / 16, 0.1)
    heft = follower_preset("heft", wan)
    assert (heft.reading.layer, heft.reading.head, heft.reading.width) == (18, 1, 832)
    # 15 % of 44, 42 and 42 channels, rounded down.
    assert heft.tracking.channels_out == (*range(6), *range(44, 50), *range(86, 92))


def test_the_default_model_of_heft_is_cosmos():
    heft = follower_preset("heft", shape("cosmos", 28, 16))
    reading = heft.reading
    assert (reading.layer, reading.head, reading.step, reading.inference_steps) == (18, 6, 34, 35)
    assert (reading.height, reading.width, heft.tracking.tolerance, heft.tracking.update) == (704, 1280, 26 / 16, 0.05)
    assert heft.tracking.channels_out == (*range(4), *range(44, 48), *range(86, 90))


def test_another_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'heft' is for CogVideoX-2B \(30 layers of 30 heads\) and Wan2.1-T2V-1.3B"):
        load_backbone("embedded", preset="heft")


def test_a_model_of_the_shape_is_tracked_with_it(monkeypatch):
    """A tiny Wan stands for the large one: everything of the preset but layer, head, size and channels."""
    import numpy as np

    backbone = tiny_backbone("wan")
    full = follower_preset("heft", shape("wan", 30, 12))
    described = {**full.described(), "layer": 1, "head": 0, "height": 32, "width": 32}
    described["tracking"] = {**described["tracking"], "layers": (), "channels_out": (0, 1)}
    row = Follower("tiny", "wan", backbone.layers, backbone.heads, Preset.from_mapping(described))
    monkeypatch.setitem(followers.FOLLOWERS, "heft", (row,))
    backbone.preset = follower_preset("heft", backbone)
    tracker = PointTracker(backbone)
    assert tracker.options.matched == "keys"
    video = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    tracks = tracker.track(video, [[0, 10.0, 12.0]])
    assert tracks.xy.shape == (4, 1, 2)
