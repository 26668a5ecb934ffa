"""A video read once: what is said of a point is what the operations say of the same queries and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import capture, load_backbone, ops
from corrdit.integrations.diffusers.analysis import Exploration, Setting, explore
from corrdit.integrations.diffusers.analysis.video_pictures import prompt_words
from corrdit.integrations.embedded.world import demo_clip

STEP = 40


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded")


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    return demo_clip(0)[0][:6, :96, :144]


@pytest.fixture(scope="module")
def exploration(backbone, video) -> Exploration:
    return explore(backbone, video, layers=[2, -1], steps=[STEP, -1], prompt="a red disc moves left")


def test_it_reads_what_was_asked_for(exploration):
    assert exploration.layers == (2, 5)
    assert exploration.steps == (STEP, 49)
    assert exploration.words == ("a", "red", "disc", "moves", "left")
    assert exploration.preferred_layer == 5
    assert exploration.frames.shape == (6, 96, 144, 3)


@pytest.mark.parametrize("head", [None, 1])
@pytest.mark.parametrize("frame", [0, 4])
def test_an_answer_is_that_of_the_operations(backbone, video, exploration, head, frame):
    """Of a capture of the same forward, taken apart from it."""
    tokens = exploration.ask(0, 1, 1, Setting(2, STEP)).costs.shape[1:]
    height, width = (int(count * stride) for count, stride in zip(tokens, backbone.token_stride, strict=True))
    latents = backbone.encode_frames(video, height=height, width=width)
    generator = torch.Generator().manual_seed(STEP)
    timestep = backbone.timestep(STEP, 50)
    noisy = backbone.add_noise(latents, torch.randn(latents.shape, generator=generator), timestep)
    arguments = backbone.forward_arguments(
        noisy, timestep, prompt_embeds=backbone.encoded_prompt("a red disc moves left")
    )
    kept = {}

    def keep(q, k, grid, key_mask):
        kept["all"] = (q.clone(), k.clone(), grid, key_mask)
        return q.sum()

    with torch.no_grad(), capture(backbone.pipe.transformer, layers=[2], operation=keep):
        backbone.pipe.transformer(**arguments)
    q, k, grid, key_mask = kept["all"]
    x, y = 50.0, 30.0
    row, column = int(y / 96 * grid.height), int(x / 144 * grid.width)
    token = torch.tensor([row * grid.width + column])
    kind = "probabilities" if head is None else "none"
    costs = ops.cost_rows(q, k, grid, token, source=frame, heads=kind, key_mask=key_mask)
    mass = ops.attention_mass(q, k, grid, token, source=frame, heads=kind, key_mask=key_mask)
    costs, frames = (costs[0], mass.frames[0]) if head is None else (costs[0, head], mass.frames[0, head])
    found = exploration.ask(frame, x, y, Setting(2, STEP, head))
    torch.testing.assert_close(found.costs, costs[0])
    torch.testing.assert_close(found.frames, frames[0])
    logits = torch.einsum("hd,hnd->hn", q[0, :, grid.token(frame, row, column)], k[0]) * q.shape[-1] ** -0.5
    weights = logits.softmax(-1)[:, grid.text_slice]
    weights = weights.mean(0) if head is None else weights[head]
    _, places = prompt_words(backbone, "a red disc moves left")
    torch.testing.assert_close(found.words, weights[places])


def test_matches_are_in_pixels_of_the_video(exploration):
    found = exploration.ask(2, 70.0, 40.0, Setting(5, 49))
    assert found.xy.shape == (6, 2)
    assert np.linalg.norm(found.xy[2] - (70.0, 40.0)) < 8
    assert (found.xy >= 0).all()
    assert (found.xy <= (144, 96)).all()


@pytest.mark.parametrize(
    ("frame", "point", "setting", "message"),
    [
        (6, (1, 1), Setting(2, STEP), "frame 6 is outside the frames read"),
        (0, (200, 1), Setting(2, STEP), r"\(200, 1\) is outside of the frames of 144 x 96"),
        (0, (1, 1), Setting(3, STEP), "layer 3 at step 40 was not read; read were layers 2, 5"),
        (0, (1, 1), Setting(2, STEP, 9), "head 9 is outside the layer"),
    ],
)
def test_what_was_not_read_is_refused(exploration, frame, point, setting, message):
    with pytest.raises(ValueError, match=message):
        exploration.ask(frame, *point, setting)
