"""Attention from the video to the text, read from a module of its own or out of joint attention."""

from __future__ import annotations

import pytest
import torch

from corrdit import capture
from corrdit.grid import CrossGrid
from corrdit.integrations.diffusers.testing.subject import AttentionRecorder, Subject, copy_of_inputs
from corrdit.integrations.diffusers.text_attention import TextAttention, text_maps
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation, tiny_pipeline

NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if model.variant else name
    for name, model in TINY_MODELS.items()
    if not model.packed
]

pytestmark = pytest.mark.filterwarnings("ignore:.*no text encoder")


def read(subject, **options):
    with torch.no_grad(), subject.captured(copy_of_inputs, **options) as captured:
        subject.run()
    return {layer: captured[0, layer] for layer in subject.layers}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_the_model_attends_with(name):
    subject = Subject.random(tiny_backbone(name), frames=3, batch=2, seed=0)
    plain = subject.prediction()
    layout = subject.backbone.layout()
    whole = read(subject)[0].grid
    if layout.text is not None:
        joint = read(subject)
        for layer, found in read(subject, attention="cross").items():
            expected = joint[layer]
            assert found.grid == CrossGrid(whole.frames, whole.height, whole.width, whole.text_tokens)
            assert torch.equal(found.q, expected.q[:, :, whole.video_slice])
            assert torch.equal(found.k, expected.k[:, :, whole.text_slice])
            if expected.key_mask is not None:
                assert torch.equal(found.key_mask, expected.key_mask[:, whole.text_slice])
        return
    modules = TextAttention(layout).modules(subject.transformer)
    with AttentionRecorder(modules) as recorder:
        found = read(subject, attention="cross")
    assert torch.equal(subject.prediction(), plain)
    for layer, records in enumerate(recorder.records):
        each = found[layer]
        assert each.q.shape[2] == whole.video_tokens == each.grid.video_tokens
        # A model that attends to a picture too has a call for it, with other keys.
        value, output = next((v, o) for v, o in records if v.shape[2] == each.k.shape[2])
        logits = each.q.float() @ each.k.float().transpose(-1, -2) * each.q.shape[-1] ** -0.5
        if each.key_mask is not None:
            logits = logits.masked_fill(~each.key_mask[:, None, None], -torch.inf)
        torch.testing.assert_close(logits.softmax(-1) @ value, output, rtol=1e-4, atol=1e-5)


def test_masks_of_the_text_are_read():
    subject = Subject.random(tiny_backbone("ltx"), frames=3, batch=2, seed=0)
    found = read(subject, attention="cross")[0]
    assert torch.equal(found.key_mask, subject.text["encoder_attention_mask"].bool())


@pytest.mark.parametrize("name", ["wan", "cogvideox-rotary"])
def test_maps_of_words_while_a_video_is_made(name):
    pipe = tiny_pipeline(name)
    plain = pipe(**tiny_generation(name)).frames

    def maps(q, k, grid, key_mask):
        return text_maps(q, k, grid, key_mask=key_mask)

    with capture(pipe, layers=[1], steps=[0], operation=maps, attention="cross") as captured:
        again = pipe(**tiny_generation(name)).frames
    assert torch.equal(plain, again)
    assert captured[0, 1].shape == (1, 8, 3, 4, 4)
    torch.testing.assert_close(captured[0, 1].sum(1), torch.ones(1, 3, 4, 4))


def test_maps_are_the_softmax_written_out():
    grid = CrossGrid(2, 3, 2, 5)
    q, k = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0)), torch.randn(2, 2, 5, 8)
    mask = torch.arange(5)[None] < torch.tensor([[5], [3]])
    found = text_maps(q, k, grid, tokens=[4, 1], key_mask=mask)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5).masked_fill(~mask[:, None, None], -torch.inf)
    expected = logits.softmax(-1).mean(1).transpose(1, 2).unflatten(2, (2, 3, 2))
    torch.testing.assert_close(found, expected[:, [4, 1]])
    assert (found[1, 0] == 0).all()
    whole = text_maps(q, k, grid, key_mask=mask, heads="none")
    assert whole.shape == (2, 4, 5, 2, 3, 2)
    torch.testing.assert_close(whole.mean(1), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [5]}, "tokens"),
        ({"heads": "logits"}, "heads must be one of"),
        ({"grid": CrossGrid(2, 3, 3, 5)}, "q must have the grid's 18 video tokens, got 12"),
        ({"grid": CrossGrid(2, 3, 2, 4)}, "k must have the grid's 4 text tokens, got 5"),
    ],
)
def test_wrong_arguments_of_maps(change, message):
    given = {"q": torch.zeros(1, 2, 12, 4), "k": torch.zeros(1, 2, 5, 4), "grid": CrossGrid(2, 3, 2, 5), **change}
    with pytest.raises(ValueError, match=message):
        text_maps(**given)


def test_wrong_words_for_the_attention():
    with pytest.raises(ValueError, match="attention must be one of"):
        capture(tiny_pipeline("wan"), layers=0, operation=copy_of_inputs, attention="text")
