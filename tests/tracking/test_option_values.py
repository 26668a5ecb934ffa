"""Values that look like others are refused by the name of their option."""

import csv
import pathlib

import numpy as np
import pytest
import torch

from corrdit import TokenGrid, load_backbone, ops
from corrdit.array_files import read_arrays
from corrdit.files import OutputFolder, write_csv
from corrdit.integrations.diffusers import CrossAttentionGuidance
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.testing import tiny_backbone
from corrdit.tracking.options import ReadingPreset, TrackerOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", "45"),
        ("layers", [4.7]),
        ("steps", {-1: 2}),
        ("steps", [True]),
        ("head_weights", {0: 1.0}),
        ("head_weights", [float("nan")]),
        ("head_weights", "11"),
        ("crops", "5"),
        ("crops", [float("nan")]),
        ("noise", "no"),
        ("bidirectional", "false"),
        ("antialias", "off"),
        ("average_overlap", "no"),
        ("temperature", "2"),
        ("low_pass", float("inf")),
        ("tolerance", float("inf")),
    ],
)
def test_tracker_options(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TrackerOptions(**{name: value})


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_budget_that_nothing_would_keep(backend: str) -> None:
    with pytest.raises(ValueError, match="memory_budget is for backend"):
        TrackerOptions(backend=backend, memory_budget=1 << 20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance_scale", float("nan")),
        ("guidance_scale", 1e300),
        ("gradient_checkpointing", "no"),
        ("blocks", "45"),
        ("temperature", "2"),
    ],
)
def test_transfer_settings(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        TransferSettings(**{"blocks": (0,), name: value})


def test_a_guidance_whose_products_overflow() -> None:
    with pytest.raises(ValueError, match="scale must be a finite number of 0 or more and at most 10000, got 1e"):
        CrossAttentionGuidance(tiny_backbone("cogvideox"), layers=0, scale=1e300)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"head": 64}, "reads head 64, but there are"),
        ({"head_weights": (1.0,) * 63}, r"weighs 63 heads \(head_weights\)"),
    ],
)
def test_presets_with_heads_that_the_model_lacks(reading: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone("embedded", preset=Preset(ReadingPreset(0, **reading)))


def test_sparse_and_meta_tensors() -> None:
    grid = TokenGrid(2, 2, 2)
    q = torch.ones(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"q is a sparse tensor .*to_dense"):
        ops.match(q.to_sparse(), q, grid)
    with pytest.raises(ValueError, match="k is a sparse tensor"):
        ops.match(q, q.to_sparse(), grid)
    with pytest.raises(ValueError, match="key_mask is a sparse tensor"):
        ops.match(q, q, grid, key_mask=torch.ones(1, 8, dtype=torch.bool).to_sparse())
    with pytest.raises(ValueError, match="head_weights is on the meta device"):
        ops.match(q, q, grid, head_weights=torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="head_weights is a sparse tensor"):
        ops.match(q, q, grid, head_weights=torch.ones(1).to_sparse())


def test_cells_that_begin_like_a_formula_are_texts(tmp_path: pathlib.Path) -> None:
    write_csv(tmp_path / "t.csv", [{"video": "=1+1", "x": -1.5, "y": None}, {"video": "@SUM(A1)", "x": 2, "y": "a"}])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [["'=1+1", "-1.5", ""], ["'@SUM(A1)", "2", "a"]]


def test_a_file_that_inflates_a_thousandfold(tmp_path: pathlib.Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", xy=np.zeros(1 << 27, np.uint8))
    with pytest.raises(ValueError, match="inflate to"):
        read_arrays(tmp_path / "bomb.npz", ["xy"], what="tracks")


def test_an_output_folder_without_a_name() -> None:
    with pytest.raises(ValueError, match="empty name"):
        OutputFolder("")
