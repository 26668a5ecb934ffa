"""Configurations of published checkpoints: shapes, sizes and tokens that follow from them, without any weights."""

from __future__ import annotations

import importlib.util
import inspect
import re

import diffusers
import pytest
import torch

from corrdit.integrations.diffusers.backbones.followers import follower_preset
from corrdit.integrations.diffusers.backbones.published_checkpoints import (
    CHECKPOINTS,
    UNKNOWN_CHECKPOINTS,
    checkpoint_of,
)
from corrdit.integrations.diffusers.backbones.table import BACKBONES
from corrdit.integrations.diffusers.planning.configured_model import UNKNOWN, configured_model
from corrdit.integrations.diffusers.planning.plan import plan

EXPECTED = {
    "cogvideox-2b": (30, 30, 64, 1.69, (13, 30, 45, 226)),
    "cogvideox-5b": (42, 48, 64, 5.57, (13, 30, 45, 226)),
    "cogvideox-5b-i2v": (42, 48, 64, 5.57, (13, 30, 45, 226)),
    "cogvideox-1.5-5b": (42, 48, 64, 5.57, (11, 48, 85, 224)),
    "cogvideox-1.5-5b-i2v": (42, 48, 64, 5.57, (11, 48, 85, 224)),
    "hunyuanvideo": (60, 24, 128, 12.82, (16, 34, 60, 256)),
    "hunyuanvideo-i2v": (60, 24, 128, 12.82, (33, 45, 80, 256)),
    "hunyuanvideo-i2v-33ch": (60, 24, 128, 12.81, (33, 45, 80, 256)),
    "hunyuanvideo-1.5-480p": (54, 16, 128, 8.33, (31, 30, 53, 1985)),
    "hunyuanvideo-1.5-480p-i2v": (54, 16, 128, 8.33, (31, 30, 53, 1985)),
    "hunyuanvideo-1.5-720p": (54, 16, 128, 8.33, (31, 45, 80, 1985)),
    "hunyuanvideo-1.5-720p-i2v": (54, 16, 128, 8.33, (31, 45, 80, 1985)),
    "wan-2.1-1.3b": (30, 12, 128, 1.42, (21, 30, 52, 0)),
    "wan-2.1-14b": (40, 40, 128, 14.29, (21, 30, 52, 0)),
    "wan-2.1-i2v-480p": (40, 40, 128, 16.39, (21, 30, 52, 0)),
    "wan-2.1-i2v-720p": (40, 40, 128, 16.39, (21, 45, 80, 0)),
    "wan-2.1-flf2v-720p": (40, 40, 128, 16.40, (21, 45, 80, 0)),
    "wan-2.1-vace-1.3b": (30, 12, 128, 2.15, (21, 30, 52, 0)),
    "wan-2.1-vace-14b": (40, 40, 128, 17.34, (21, 30, 52, 0)),
    "wan-2.2-t2v-a14b": (40, 40, 128, 14.29, (21, 30, 52, 0)),
    "wan-2.2-i2v-a14b": (40, 40, 128, 14.29, (21, 30, 52, 0)),
    "wan-2.2-ti2v-5b": (30, 24, 128, 5.00, (31, 22, 40, 0)),
    "wan-2.2-animate-14b": (40, 40, 128, 17.27, (20, 45, 80, 0)),
    "anyflow-1.3b": (30, 12, 128, 1.42, (21, 30, 52, 0)),
    "anyflow-14b": (40, 40, 128, 14.32, (21, 30, 52, 0)),
    "skyreels-v2-t2v-540p": (40, 40, 128, 14.29, (25, 34, 60, 0)),
    "skyreels-v2-t2v-720p": (40, 40, 128, 14.29, (31, 45, 80, 0)),
    "skyreels-v2-i2v-1.3b": (30, 12, 128, 1.56, (25, 34, 60, 0)),
    "skyreels-v2-i2v-540p": (40, 40, 128, 16.39, (25, 34, 60, 0)),
    "ltx-video": (28, 32, 64, 1.92, (21, 16, 22, 0)),
    "ltx-2": (48, 32, 128, 18.88, (9, 8, 12, 0)),
    "mochi": (48, 24, 128, 10.03, (15, 30, 53, 256)),
    "allegro": (32, 24, 96, 2.77, (22, 45, 80, 0)),
    "kandinsky-5-lite-i2v": (32, 28, 64, 2.01, (31, 32, 48, 0)),
    "kandinsky-5-pro": (60, 32, 128, 19.31, (31, 32, 48, 0)),
    "cosmos-1-7b": (28, 32, 128, 7.24, (16, 44, 80, 0)),
    "cosmos-1-7b-v2w": (28, 32, 128, 7.24, (16, 44, 80, 0)),
    "cosmos-1-14b": (36, 40, 128, 14.27, (16, 44, 80, 0)),
    "cosmos-1-14b-v2w": (36, 40, 128, 14.27, (16, 44, 80, 0)),
    "cosmos-predict2-2b": (28, 16, 128, 1.96, (24, 44, 80, 0)),
    "cosmos-predict2-14b": (36, 40, 128, 14.27, (24, 44, 80, 0)),
    "cosmos-predict2.5-2b": (28, 16, 128, 2.06, (24, 44, 80, 0)),
    "cosmos-predict2.5-14b": (36, 40, 128, 14.37, (24, 44, 80, 0)),
}
"""Attention layers, heads, channels of a head, billions of parameters of the transformer, and the token grid (frames,
rows, columns, text) at the size it was made for."""
IN_THE_NAME = {
    "cogvideox-2b": 1.69, "cogvideox-5b": 5.57, "hunyuanvideo": 12.8, "hunyuanvideo-1.5-720p": 8.3,
    "wan-2.1-1.3b": 1.4, "wan-2.1-14b": 14.3, "wan-2.2-ti2v-5b": 5.0, "ltx-2": 19, "mochi": 10, "allegro": 2.8,
    "cosmos-1-7b": 7.2, "cosmos-1-14b": 14.3, "cosmos-predict2-2b": 2.0, "cosmos-predict2.5-14b": 14.4,
    "kandinsky-5-lite-i2v": 2.0, "kandinsky-5-pro": 19,
}  # fmt: skip
"""Billions as the checkpoints' pages and papers round them."""
FAST = ("wan-2.2-ti2v-5b", "cosmos-predict2-2b")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHECKPOINTS]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_tokens_follow_from_the_configuration(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    if not hasattr(diffusers, checkpoint.pipeline):
        pytest.skip(f"this diffusers has no {checkpoint.pipeline}")
    model = configured_model(name, device=torch.device("cuda"))
    backbone, (frames, height, width) = model.backbone, checkpoint.size
    with model.running():
        grid = backbone.generation_grid(height, width, frames)
    billions = sum(weight.numel() for weight in model.parts["transformer"].parameters()) / 1e9
    head = backbone.layout().head_width(backbone.transformer)
    found = (backbone.layers, backbone.heads, head, round(billions, 2))
    assert (*found, (grid.frames, grid.height, grid.width, grid.text_tokens)) == EXPECTED[name]
    if name in IN_THE_NAME:
        assert billions == pytest.approx(IN_THE_NAME[name], rel=0.03)
    assert backbone.preset.reading.layer < backbone.layers
    if name == "cosmos-predict2-2b":
        assert follower_preset("heft", backbone).reading.head == 6
    assert {part for part, source in model.sources.items() if source.startswith("unknown")} == set(checkpoint.unknown)


def test_every_checkpoint_says_where_its_values_are_from() -> None:
    assert set(EXPECTED) == set(CHECKPOINTS)
    for name, checkpoint in CHECKPOINTS.items():
        assert checkpoint_of(checkpoint.hub_id.upper()) is checkpoint_of(name) is checkpoint
        for part, described in checkpoint.parts.items():
            named = re.search(r"scripts/|configs/|config.json|arXiv|defaults of the class", described.source)
            assert named or (part in checkpoint.unknown and described.source.startswith("unknown")), (name, part)
    assert not {checkpoint.hub_id for checkpoint in CHECKPOINTS.values()} & set(UNKNOWN_CHECKPOINTS)
    known = {checkpoint.pipeline for checkpoint in CHECKPOINTS.values()}
    # Of Kandinsky 6 no checkpoint is named in a public file.
    families = ("ConsisID", "EasyAnimate", "MotifVideo", "ChronoEdit", "Cosmos3Omni", "Kandinsky6TI2VA")
    silent = {f"{family}Pipeline" for family in families}
    for backbone in BACKBONES:
        assert set(backbone.pipelines) & (known | silent), backbone


def test_sizes_are_those_of_the_pipelines_calls() -> None:
    """Where the name of a checkpoint says no other."""
    for name in (
        "wan-2.1-14b",
        "skyreels-v2-t2v-540p",
        "cosmos-1-7b",
        "cosmos-predict2-2b",
        "kandinsky-5-pro",
        "ltx-video",
    ):
        checkpoint = CHECKPOINTS[name]
        if not hasattr(diffusers, checkpoint.pipeline):
            continue
        call = inspect.signature(getattr(diffusers, checkpoint.pipeline).__call__).parameters
        assert tuple(call[part].default for part in ("num_frames", "height", "width")) == checkpoint.size


@pytest.mark.slow
def test_what_is_unknown_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from corrdit.cli import main

    small = ["--frames", "5", "--height", "128", "--width", "128", "--steps", "2", "--task", "capture"]
    assert main(["plan", "kandinsky-5-lite-i2v", *small]) == 0
    assert "not known, and in no figure: scheduler, text_encoder" in capsys.readouterr().out
    model = configured_model("kandinsky-5-lite-i2v", device=torch.device("cuda"))
    assert model.sources["text_encoder"] == UNKNOWN


@pytest.mark.slow
def test_what_depends_on_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hunyuanvideo-1.5-480p cannot be planned: .* depends on values"):
        plan("hunyuanvideo-1.5-480p", "capture", steps=2, search=False)


RESIZES = importlib.util.find_spec("torchvision") is None
"""Cosmos' padding mask, with a package that is not here."""
PLANNED = [
    name
    for name in CHECKPOINTS
    if not name.startswith("hunyuanvideo-1.5") and not (RESIZES and name.startswith("cosmos"))
]


@pytest.mark.slow
@pytest.mark.skipif(not RESIZES, reason="torchvision is installed")
def test_cosmos_names_the_package_it_resizes_with() -> None:
    with pytest.raises(ValueError, match="resizes its padding mask with torchvision, which is missing"):
        plan("cosmos-predict2-2b", "capture", steps=2, search=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANNED)
def test_memory_is_planned(name: str) -> None:
    if not hasattr(diffusers, CHECKPOINTS[name].pipeline):
        pytest.skip(f"this diffusers has no {CHECKPOINTS[name].pipeline}")
    found = plan(name, "capture", steps=2, search=False)
    _, _, _, billions, (frames, rows, columns, text) = EXPECTED[name]
    assert (found.tokens, found.text_tokens) == (frames * rows * columns, text)
    # Weights in two bytes each, and what a step needs beside them.
    assert found.peak > 2e9 * billions
    assert found.phases
