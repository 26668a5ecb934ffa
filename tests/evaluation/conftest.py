"""Small annotated videos of every layout, and trackers that need no model."""

from __future__ import annotations

import pathlib

import lightning
import numpy as np
import pytest

from corrdit.data import TapVidVideo, write_tapvid, write_tapvid_shards
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.integrations.embedded.world.clips import as_tapvid, sample_queries


def annotated(name: str, seed: int, *, frames: int = 5, size: tuple[int, int] = (32, 48), points: int = 8):
    clip = generate([seed], WorldConfig(frames, *size))[0]
    return as_tapvid(clip, sample_queries(clip, points), name)


def never_visible(name: str) -> TapVidVideo:
    return TapVidVideo(name, np.zeros((4, 24, 32, 3), np.uint8), np.zeros((3, 4, 2)), np.ones((3, 4), bool))


@pytest.fixture(scope="session")
def videos() -> list[TapVidVideo]:
    """Five videos of two sizes, one of them without a visible point, named like DAVIS's."""
    made = [annotated(name, seed) for seed, name in enumerate(("bear", "camel", "dog"))]
    return [*made, annotated("goat", 3, frames=7, size=(40, 32)), never_visible("night")]


@pytest.fixture(scope="session")
def davis(videos, tmp_path_factory) -> pathlib.Path:
    """One file, as TAP-Vid DAVIS."""
    path = tmp_path_factory.mktemp("davis") / "tapvid_davis.pkl"
    write_tapvid(path, videos)
    return path


@pytest.fixture(scope="session")
def kinetics(videos, tmp_path_factory) -> pathlib.Path:
    """The same videos in three shards of jpeg frames, as TAP-Vid Kinetics."""
    folder = tmp_path_factory.mktemp("kinetics")
    write_tapvid_shards(folder, videos, count=len(videos), shards=3)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    """Three videos that `corrdit world` wrote."""
    from corrdit.cli import main

    folder = tmp_path_factory.mktemp("world") / "videos"
    options = ["--videos", "3", "--seed", "7", "--num-frames", "5", "--size", "32x48", "--points", "8"]
    assert main(["world", "--output", str(folder), *options]) == 0
    return folder


@pytest.fixture
def trainer() -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
