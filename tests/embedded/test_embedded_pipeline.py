"""The embedded pipeline is a diffusers pipeline: it generates, saves, loads, and keeps a token's distance a token."""

from __future__ import annotations

import inspect
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from diffusers.models.embeddings import get_3d_rotary_pos_embed

from corrdit.integrations.embedded import load_embedded_pipeline, read_preset
from corrdit.integrations.embedded.pipeline import (
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
        ({"num_frames": 2.5}, "num_frames"),
        ({"height": 0}, "height"),
        ({"width": -16}, "width"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"num_videos_per_prompt": 2}, "num_videos_per_prompt must be 1, got 2; give a list of prompts"),
        ({"prompt": []}, "prompt must be a text or a list of at least one text"),
        ({"prompt": ["a disc", 1]}, "prompt must be a text"),
        ({"negative_prompt": [None]}, "negative_prompt must be a text"),
    ],
)
def test_what_the_parent_would_replace_or_stumble_over_is_refused(
    tiny: EmbeddedVideoPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**{"prompt": "a disc", "num_inference_steps": 1, **arguments})


def test_the_call_has_its_parents_arguments(tiny: EmbeddedVideoPipeline) -> None:
    assert inspect.signature(type(tiny).__call__) == inspect.signature(CogVideoXPipeline.__call__)
    in_order = tiny("a disc", None, 16, 24, 2, 1, output_type="np", generator=torch.Generator().manual_seed(3)).frames
    assert in_order.shape == (1, 2, 16, 24, 3)
    assert not torch.from_numpy(in_order).requires_grad


def test_absolute_positions_need_all_text_tokens() -> None:
    pipe = build_pipeline(build_transformer(1, 2, 16, "absolute", frames=2, size=16))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="max_sequence_length must be at least 24 for absolute positions, got 8"):
        sample(pipe, max_sequence_length=8)


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("tokenizer/vocabulary.json", None, r"vocabulary\.json does not exist"),
        ("tokenizer/vocabulary.json", b'["<pad>", "<e', r"vocabulary\.json is not the JSON file"),
        ("tokenizer/vocabulary.json", b'["disc"]', "begins with <pad> and <end>"),
        ("transformer/diffusion_pytorch_model.safetensors", None, r"\.safetensors"),
        ("transformer/diffusion_pytorch_model.safetensors", b"no weights", r"\.safetensors"),
    ],
)
def test_an_incomplete_folder_is_refused_by_the_name_of_its_file(
    tiny: EmbeddedVideoPipeline, tmp_path: pathlib.Path, file: str, contents: bytes | None, message: str
) -> None:
    tiny.save_pretrained(str(tmp_path))
    if contents is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(contents)
    with pytest.raises((ValueError, OSError), match=message):
        load_embedded_pipeline(tmp_path)
