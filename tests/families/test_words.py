"""Words of the prompt in the video: pictures of an analysis and paths of motion transfer, whatever attends to text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from corrdit import MotionTransfer, capture, load_backbone
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.analysis.sources import AnalysisVideo
from corrdit.integrations.diffusers import text_maps
from corrdit.integrations.diffusers.analysis.painting import drawn_pictures
from corrdit.integrations.diffusers.analysis.video_pictures import PictureChoice, VideoPictures, video_pictures
from corrdit.motion import word_attention

PROMPT = "a red disc moves left"
NAMES = ["ltx", pytest.param("cogvideox-rotary", marks=pytest.mark.slow)]
"""One with cross-attention, one with the text in self-attention."""


def moving(side: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, 5 * frame, axis=1) for frame in range(9)])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_where_words_are(name: str, with_words: Callable[[str], Path]) -> None:
    backbone, side = load_backbone(with_words(name)), 128 if name == "ltx" else 64
    xy = np.repeat(np.array([[[20.0, 20.0], [40.0, 30.0]]], np.float32), 9, axis=0)
    (found,) = pictures(backbone, AnalysisVideo(moving(side), xy, np.ones((9, 2), bool), PROMPT))
    assert found.words == ("disc", "left")
    latents = backbone.encode_frames(moving(side)[:4])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    arguments = backbone.forward_arguments(
        backbone.add_noise(latents, noise, 500.0), 500.0, prompt_embeds=backbone.encoded_prompt(PROMPT)
    )
    with torch.no_grad(), capture(backbone.transformer, layers=1, operation=text_maps, attention="cross") as captured:
        backbone.transformer(**arguments)
    assert found.text.shape == (2, 4, *captured[0, 1].shape[-2:])
    # The noise of the analysis is its own, so maps agree in kind and not to the digit.
    assert ((found.text > 0) & (found.text < 1)).all()
    sheets = {each.name: each.picture for each in drawn_pictures(found, name="a", head=None)}
    assert "softmax over the prompt's tokens" in sheets["words"][2]


def pictures(backbone: object, video: AnalysisVideo) -> list[VideoPictures]:
    options = AnalysisOptions(features=False, per_head=False, max_frames=4)
    choice = PictureChoice(words=("disc", "left"))
    return video_pictures(backbone, video, timesteps={30: 500.0}, layers=[1], options=options, choice=choice)  # type: ignore[arg-type]


def test_an_object_follows_a_path_where_the_text_is_apart(with_words: Callable[[str], Path]) -> None:
    backbone = load_backbone(with_words("ltx"))
    settings = {"method": "path", "word": "disc", "path": ((0.0, 0.0, 0.0, 0.5, 0.5), (1.0, 0.5, 0.5, 1.0, 1.0))}
    steps = {"block": 1, "steps": 3, "guided_share": 0.6, "optimisation_steps": 3, "learning_rate": 0.05}
    transfer = MotionTransfer(backbone, **settings, **steps)
    result = transfer(None, prompt=PROMPT, num_frames=9, height=128, width=128)
    assert result.losses[0, 2] < result.losses[0, 0]
    assert result.losses[1, 2] < result.losses[0, 0]


def test_a_words_attention_is_the_same_from_parts() -> None:
    from corrdit.grid import CrossGrid, TokenGrid

    source = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 17, 8, generator=source) for _ in range(2))
    grid, mask = TokenGrid(2, 3, 2, text_tokens=5, text_first=True), torch.ones(2, 17, dtype=torch.bool)
    mask[1, 3:5] = False
    whole = word_attention(q, k, grid, (1, 4), key_mask=mask)
    parts = (q[:, :, grid.video_slice], k[:, :, grid.text_slice], CrossGrid(2, 3, 2, 5))
    assert torch.equal(whole, word_attention(*parts, (1, 4), key_mask=mask[:, grid.text_slice]))
    torch.testing.assert_close(whole, text_maps(*parts, mask[:, grid.text_slice], tokens=(1, 4)).sum(1))
