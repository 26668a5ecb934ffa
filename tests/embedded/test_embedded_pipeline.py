"""The embedded pipeline is a diffusers pipeline: it generates, saves, loads, and keeps a token's distance a token."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from corrdit.integrations.diffusers.embedded import load_embedded_pipeline, read_preset
from corrdit.integrations.diffusers.embedded.pipeline import (
    EmbeddedVideoPipeline,
    build_pipeline,
    build_transformer,
    rotary_positions,
)


@pytest.fixture(scope="module")
def tiny() -> EmbeddedVideoPipeline:
    torch.manual_seed(0)
    pipe = build_pipeline(build_transformer(layers=2, heads=2, head_dim=16, frames=4, size=16))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: EmbeddedVideoPipeline, **size: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return pipe(
        "a striped disc moves left over grass", num_inference_steps=2, output_type="np", generator=generator, **size
    ).frames


def test_generates_the_size_of_training_and_others(tiny: EmbeddedVideoPipeline) -> None:
    assert sample(tiny).shape == (1, 4, 16, 16, 3)
    frames = sample(tiny, height=24, width=40, num_frames=6)
    assert frames.shape == (1, 6, 24, 40, 3)
    assert np.isfinite(frames).all()


def test_save_and_load_give_the_same_video(tiny: EmbeddedVideoPipeline, tmp_path: pathlib.Path) -> None:
    tiny.save_pretrained(str(tmp_path))
    loaded = load_embedded_pipeline(tmp_path)
    assert isinstance(loaded, EmbeddedVideoPipeline)
    np.testing.assert_array_equal(sample(loaded), sample(tiny))


def test_precision_is_chosen_at_loading(tiny: EmbeddedVideoPipeline, tmp_path: pathlib.Path) -> None:
    tiny.save_pretrained(str(tmp_path))
    assert load_embedded_pipeline(tmp_path).transformer.dtype == torch.float32
    assert load_embedded_pipeline(tmp_path, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_rotary_positions_are_token_indices_up_to_the_longest_side_of_training() -> None:
    small = rotary_positions(16, 3, 4, 5)[0].reshape(3, 4, 5, 16)
    large = rotary_positions(16, 6, 9, 13)[0].reshape(6, 9, 13, 16)
    torch.testing.assert_close(large[:3, :4, :5], small, atol=0, rtol=0)
    assert (small[0, 0, 0] == 1).all()
    shrunk = rotary_positions(16, 6, 18, 26)[0].reshape(6, 18, 26, 16)
    torch.testing.assert_close(shrunk[:, ::2, ::2], large, atol=1e-6, rtol=0)


def test_rotary_positions_are_those_of_diffusers() -> None:
    expected = get_3d_rotary_pos_embed(
        embed_dim=32, crops_coords=None, grid_size=(5, 7), temporal_size=4, grid_type="slice", max_size=(5, 7)
    )
    for ours, theirs in zip(rotary_positions(32, 4, 5, 7), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_absolute_variant_runs() -> None:
    pipe = build_pipeline(build_transformer(2, 2, 16, "absolute", frames=4, size=16))
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe).shape == (1, 4, 16, 16, 3)
    with pytest.raises(ValueError, match="'rotary' or 'absolute'"):
        build_transformer(positions="learned")


def test_a_folder_without_a_pipeline_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index"):
        load_embedded_pipeline(tmp_path)
    with pytest.raises(FileNotFoundError, match="preset"):
        read_preset(tmp_path)
