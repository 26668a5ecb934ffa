"""The shipped checkpoint: small, loads without a network, and its attention finds what moved."""

from __future__ import annotations

import pathlib
import socket

import numpy as np
import pytest
import torch

from corrdit.integrations.embedded import load_embedded_pipeline, read_preset
from corrdit.integrations.embedded.pipeline import EmbeddedVideoPipeline, build_pipeline
from corrdit.integrations.embedded.preset import WEIGHTS
from corrdit.integrations.embedded.training.evaluation import (
    bootstrap,
    held_out_videos,
    matching_table,
    nearest,
    read_matches,
    summary,
)
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig

FEW = range(HELD_OUT_SEEDS + 2_000_000, HELD_OUT_SEEDS + 2_000_012)


@pytest.fixture(scope="module")
def shipped() -> EmbeddedVideoPipeline:
    return load_embedded_pipeline()


def test_small_and_half_precision() -> None:
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 12e6
    assert not [path for path in sizes if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert (WEIGHTS / "README.md").is_file()


def test_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the shipped model asked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_embedded_pipeline().transformer.config.use_rotary_positional_embeddings


def test_preset_names_a_layer_of_the_model(shipped: EmbeddedVideoPipeline) -> None:
    preset, config = read_preset(), shipped.transformer.config
    assert 0 <= preset["layer"] < config.num_layers
    head = preset.get("head")
    assert head is None or 0 <= head < config.num_attention_heads


def test_a_saved_copy_is_read_with_its_preset(shipped: EmbeddedVideoPipeline, tmp_path: pathlib.Path) -> None:
    from corrdit import load_backbone

    shipped.save_pretrained(str(tmp_path))
    assert read_preset(tmp_path) == read_preset()
    assert load_backbone(str(tmp_path)).preset == load_backbone("embedded").preset


def test_a_pipeline_from_no_folder_takes_no_preset_that_lies_about(
    shipped: EmbeddedVideoPipeline, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "preset.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    build_pipeline(shipped.transformer).save_pretrained(str(tmp_path / "copy"))
    assert not (tmp_path / "copy" / "preset.json").exists()


def test_a_copy_written_over_another_takes_its_own_preset(
    shipped: EmbeddedVideoPipeline, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "preset.json").write_text('{"layer": 0}', encoding="utf-8")
    shipped.save_pretrained(str(tmp_path))
    assert read_preset(tmp_path) == read_preset()


def test_beats_standing_still_and_patches(shipped: EmbeddedVideoPipeline) -> None:
    table = matching_table(shipped, WorldConfig(), FEW, (50, 300))
    assert table["points"] > 500
    for timestep, margin in (("50", 0.05), ("300", 0.12)):
        rows = summary(table["readings"])[timestep]
        assert rows["best layer"]["low"] > 0.15
        assert rows["best layer"]["share"] > rows["patches"]["share"] + margin
        assert rows["best layer"]["share"] > rows["best features"]["share"]


def test_readings_between_tokens_stay_by_the_best_token_and_find_more(shipped: EmbeddedVideoPipeline) -> None:
    videos = held_out_videos(shipped, WorldConfig(), FEW)
    noise = torch.randn(videos.latents.shape, generator=torch.Generator().manual_seed(0))
    plain = read_matches(shipped, videos.latents, videos.grid, 300, noise)
    both = read_matches(shipped, videos.latents, videos.grid, 300, noise, refined=True)
    layers, heads = shipped.transformer.config.num_layers, shipped.transformer.config.num_attention_heads
    extra = both.keys() - plain.keys()
    assert len(extra) == layers * (heads + 1)
    for name, xy in plain.items():
        torch.testing.assert_close(both[name], xy)
    for name in extra:
        best = both[name.removeprefix("refined ")]
        assert bool((both[name] != best).any())
        assert float((both[name] - best).abs().max()) <= 1 + 1e-5
    layer = read_preset()["layer"]
    assert (
        videos.hits(both[f"refined query-key {layer} mean"]).sum() > videos.hits(plain[f"query-key {layer} mean"]).sum()
    )


def test_generates_from_words(shipped: EmbeddedVideoPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = shipped(
        "a red striped disc moves left over grass", num_inference_steps=8, output_type="np", generator=generator
    ).frames
    assert frames.shape == (1, 8, 32, 32, 3)
    # A trained model paints a picture, not noise: neighbouring pixels are alike.
    assert np.abs(np.diff(frames, axis=3)).mean() < 0.6 * frames.std()


def test_truth_in_tokens_agrees_with_patches_of_clean_latents(shipped: EmbeddedVideoPipeline) -> None:
    """Without noise the nearest patch finds most points, which a shift of half a token in the truth would spoil."""
    videos = held_out_videos(shipped, WorldConfig(frames=3, height=64, width=64), FEW[:6])
    assert videos.xy.shape == (6, 2, 256, 2)
    assert not (videos.moved & ~videos.visible).any()
    matches = read_matches(shipped, videos.latents, videos.grid, 0, None)
    own = videos.grid.coordinates().expand(videos.xy.shape)
    assert int(videos.hits(own).sum()) == 0
    assert videos.hits(matches["patches"]).sum() / videos.moved.sum() > 0.4
    shifted = matches["patches"] + 1.5
    assert videos.hits(shifted).sum() / videos.moved.sum() < 0.2


def test_nearest_features_are_found() -> None:
    from corrdit.grid import TokenGrid

    grid = TokenGrid(2, 2, 3)
    first = torch.eye(6)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    features = torch.cat([first, 5 * first[order]])[None]
    expected = grid.coordinates()[torch.argsort(order)]
    for cosine in (True, False):
        torch.testing.assert_close(nearest(features, grid, cosine=cosine)[0, 0], expected)


def test_bootstrap_interval_covers_the_share() -> None:
    rng = np.random.default_rng(0)
    totals = rng.integers(5, 50, 80)
    row = bootstrap(rng.binomial(totals, 0.4), totals)
    assert row["low"] < row["share"] < row["high"]
    assert 0.02 < row["high"] - row["low"] < 0.12


def test_weights_are_package_data() -> None:
    assert pathlib.Path(WEIGHTS).is_dir()
    assert (WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
