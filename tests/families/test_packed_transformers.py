"""Transformers that diffusers runs by modular pipelines alone: what can be read of them, and why not the others."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from corrdit import TokenGrid, capture
from corrdit.integrations.diffusers.backbones.coverage import coverage
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.testing.subject import AttentionRecorder, copy_of_inputs

TEXT, SOUND = 5, 4


def minimax_h3() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=1,
        ffn_dim=16,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=16,
        time_embed_hidden_dim=16,
        time_embed_dim=8,
        rope_freq_dim=2,
    ).eval()


def packed(frames: int, height: int, width: int) -> dict[str, Any]:
    """Arguments of a forward of text to video: text, sound and frames, in this order."""
    source, before = torch.Generator().manual_seed(1), TEXT + SOUND
    video = torch.cartesian_prod(*(torch.arange(size).float() for size in (frames, height, width)))
    total = before + len(video)
    return {
        "hidden_states": torch.randn(1, len(video), 16, generator=source),
        "audio_hidden_states": torch.randn(1, SOUND, 4, generator=source),
        "encoder_hidden_states": torch.randn(1, TEXT, 8, generator=source),
        "timestep": torch.tensor([0.0, 0.5]),
        "timestep_indices": (torch.arange(total) >= TEXT).long(),
        "token_tags": torch.tensor([1] * TEXT + [2] * SOUND + [0] * len(video)),
        "position_ids": torch.cat([torch.arange(before).float()[:, None].expand(-1, 3), video]),
        "video_indices": torch.arange(before, total),
        "audio_indices": torch.arange(TEXT, before),
        "text_indices": torch.arange(TEXT),
    }


@pytest.mark.skipif(not hasattr(diffusers, "MiniMaxH3Transformer3DModel"), reason="this diffusers has no MiniMax-H3")
@pytest.mark.parametrize("size", [(3, 4, 4), (2, 3, 5), (5, 2, 3)])
@torch.no_grad()
def test_minimax_h3_is_captured(size: tuple[int, int, int]) -> None:
    model, arguments = minimax_h3(), packed(*size)
    modules = layout_of(model).attention_modules(model)
    plain = model(**arguments).sample
    with AttentionRecorder(modules) as recorder, capture(model, layers="all", operation=copy_of_inputs) as captured:
        assert torch.equal(model(**arguments).sample, plain)
    grid = TokenGrid(*size, text_tokens=TEXT + SOUND, text_first=True)
    for layer, ((value, output),) in enumerate(recorder.records):
        read = captured[0, layer]
        assert read.grid == grid
        weights = (read.q @ read.k.transpose(-1, -2) * 16**-0.5).softmax(-1)
        torch.testing.assert_close(weights @ value, output, rtol=1e-4, atol=1e-5)
    place = (1, size[1] - 1, 2)
    row = (place[0] * size[1] + place[1]) * size[2] + place[2]
    moved = arguments["hidden_states"].clone()
    moved[:, row] += 1
    with capture(model, layers=0, operation=copy_of_inputs) as other:
        model(**{**arguments, "hidden_states": moved})
    differs = (other[0, 0].q != captured[0, 0].q).any(-1).any(1)[0]
    assert differs.nonzero().flatten().tolist() == [grid.token(*place)]


@pytest.mark.skipif(not hasattr(diffusers, "MiniMaxH3Transformer3DModel"), reason="this diffusers has no MiniMax-H3")
def test_pictures_beside_the_frames_are_refused() -> None:
    arguments = packed(3, 4, 4)
    further = {**arguments, "video_indices": arguments["video_indices"][16 - 3 :]}
    with (
        pytest.raises(ValueError, match="packs pictures or other videos beside the frames"),
        capture(minimax_h3(), layers=0, operation=copy_of_inputs) as captured,
    ):
        captured._models[0][1].read_call(captured._models[0][0], further)


def test_what_has_no_pipeline_is_named_with_the_reason() -> None:
    rows = {name: row for row in coverage() for name in row["transformers"]}
    assert rows["MiniMaxH3Transformer3DModel"]["family"] == "minimaxh3"
    for name in ("MiniMaxH3", "WanAnimate2"):
        assert not [
            kind
            for kind in dir(diffusers)
            if kind.startswith(name) and kind.endswith("Pipeline") and "Modular" not in kind
        ]
        assert all(use["supported"] == "no" for use in rows[f"{name}Transformer3DModel"]["uses"].values())


class Seen(Exception):
    """Ends a forward at its attention."""


@pytest.mark.skipif(not hasattr(diffusers, "WanAnimate2Transformer3DModel"), reason="this diffusers has no such model")
def test_wan_animate_2_attends_by_a_mask_that_differs_from_frame_to_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_wan_animate_2 as source

    made = source.create_block_mask

    def uncompiled(mask_mod: Any, **options: Any) -> Any:
        return made(mask_mod, **{**options, "_compile": False})

    monkeypatch.setattr(source, "create_block_mask", uncompiled)
    model = diffusers.WanAnimate2Transformer3DModel(
        in_dim=12, dim=24, ffn_dim=16, freq_dim=16, text_dim=8, out_dim=4, num_heads=2, num_layers=1, use_img_emb=False
    )
    with pytest.raises(ValueError, match=r"a reference video's tokens of that frame .* differs from frame to frame"):
        layout_of(model)
    # Frame 0 of the generation stands for the reference picture, and each later one sees its own of the reference.
    frame, frames = 128, 2
    mask = model.create_mask(frames, frame, "cpu").mask_mod
    total = (frames + 1) * frame
    first, second = torch.tensor(1 * frame), torch.tensor(2 * frame)
    reference = [torch.tensor(total + index * frame) for index in range(frames)]
    zero = torch.tensor(0)
    assert [bool(mask(zero, zero, first, key)) for key in reference] == [True, False]
    assert [bool(mask(zero, zero, second, key)) for key in reference] == [False, True]
