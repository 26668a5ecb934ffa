"""Cosmos 3, whose forward packs token ids and frames: its frames attend to both, its text to itself alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from corrdit import CrossAttentionGuidance, TokenGrid, capture, ops
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import forward_arguments
from corrdit.integrations.diffusers.testing import reading_checks, restoring_checks
from corrdit.integrations.diffusers.testing.subject import AttentionRecorder, Subject, copy_of_inputs
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation

pytestmark = pytest.mark.skipif("cosmos3" not in TINY_MODELS, reason="this diffusers has no Cosmos 3")
PROMPT = [4, 5, 6, 2, 3]
CHECKS = (
    *("token_order", "masks", "early_exit", "gradient_checkpointing"),
    *("restored_after_exit", "restored_after_exception", "restored_after_nesting", "saving", "memory"),
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("cosmos3")


@pytest.fixture(scope="module")
def subject(backbone: Backbone) -> Subject:
    """Three frames of 4 x 5 tokens; `sizes` of it have other numbers of frames, rows and columns."""
    latents = torch.randn(1, 3, 4, 8, 10, generator=torch.Generator().manual_seed(0))
    return Subject(backbone, latents, {"input_ids": torch.tensor([PROMPT])}, backbone.timestep(25))


@pytest.mark.parametrize("name", CHECKS)
def test_checks_that_fit_a_packed_forward(name: str, subject: Subject) -> None:
    room: Any = reading_checks if hasattr(reading_checks, f"check_{name}") else restoring_checks
    getattr(room, f"check_{name}")(subject)


def test_what_is_read_is_what_the_frames_attend_with(subject: Subject) -> None:
    plain = subject.prediction()[0]  # type: ignore[index]
    for sized in subject.sizes():
        with AttentionRecorder(sized.modules) as recorder:
            found = sized.read()
        frames, rows, columns = sized.latents.shape[1], sized.latents.shape[3] // 2, sized.latents.shape[4] // 2
        for layer, records in enumerate(recorder.records):
            read = found[layer]
            assert read.grid == TokenGrid(frames, rows, columns, text_tokens=len(PROMPT), text_first=True)
            assert read.q.shape == read.k.shape == (1, 4, read.grid.tokens, 12)
            assert not read.q[:, :, read.grid.text_slice].any()
            # The first call is that of the text.
            value, output = records[1]
            weights = (read.q @ read.k.transpose(-1, -2) * 12**-0.5).softmax(-1)
            attended = weights @ value.repeat_interleave(2, dim=1)
            torch.testing.assert_close(attended[:, :, read.grid.video_slice], output, rtol=1e-4, atol=1e-5)
    with subject.captured(copy_of_inputs):
        assert torch.equal(subject.prediction()[0], plain)  # type: ignore[index]


def test_text_is_read_apart(subject: Subject) -> None:
    whole = subject.read((1,))[1]
    with torch.no_grad(), subject.captured(copy_of_inputs, layers=(1,), attention="cross") as captured:
        subject.run()
    found = captured[0, 1]
    assert torch.equal(found.q, whole.q[:, :, whole.grid.video_slice])
    assert torch.equal(found.k, whole.k[:, :, whole.grid.text_slice])


def test_branches_are_told_apart_by_their_words(backbone: Backbone) -> None:
    call, ids = tiny_generation("cosmos3", steps=2), []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        ids.append(forward_arguments(module, args, kwargs)["input_ids"].tolist())

    handle = backbone.transformer.register_forward_pre_hook(note, with_kwargs=True)
    with capture(backbone.pipe, layers=0, steps=[0, 1], branch="both", operation=lambda q, k, grid, mask: grid) as read:
        again = backbone.pipe(**call).video
    handle.remove()
    assert torch.equal(again, backbone.pipe(**tiny_generation("cosmos3", steps=2)).video)
    for step in (0, 1):
        cond, uncond = ids[2 * step : 2 * step + 2]
        assert read[step, 0]["cond"].text_tokens == len(cond) > len(uncond) == read[step, 0]["uncond"].text_tokens


def test_guidance_takes_the_frames_to_themselves_and_the_text(subject: Subject) -> None:
    backbone, layer, scale = subject.backbone, 1, 1.7
    outputs: list[torch.Tensor] = []

    def record(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0][0].clone())

    call = {**tiny_generation("cosmos3", steps=1), "guidance_scale": 1.0}
    with CrossAttentionGuidance(backbone.pipe, layers=[layer], scale=scale, renormalize=True):
        handle = backbone.transformer.register_forward_hook(record)
        backbone.pipe(**call)
        handle.remove()
    given: list[dict[str, Any]] = []

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given.append(forward_arguments(module, args, kwargs))

    handle = backbone.transformer.register_forward_pre_hook(note, with_kwargs=True)
    plain = tiny_generation("cosmos3", steps=1)
    backbone.pipe(**{**plain, "guidance_scale": 1.0})
    handle.remove()
    with torch.no_grad():
        conditional = backbone.transformer(**given[0])[0][0]
        module = backbone.layout().attention_modules(backbone.transformer)[layer]
        grid = backbone.layout().read_call(backbone.transformer, given[0]).grid

        def replaced(hook: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            value = torch.cat([module.to_v(args[0]), module.add_v_proj(args[1])]).view(1, -1, 2, 12).transpose(1, 2)
            q, k = read[0, layer]
            attended = ops.frame_local_attention(
                q, k, value.repeat_interleave(2, 1), grid, renormalize=True, backend="reference"
            )[:, :, grid.video_slice]
            return output[0], module.to_add_out(attended.transpose(1, 2).flatten(2)[0])

        inputs = capture(
            backbone.transformer, layers=[layer], operation=lambda q, k, grid, mask: (q.clone(), k.clone())
        )
        with inputs as read:
            backbone.transformer(**given[0])
        handle = module.register_forward_hook(replaced)
        perturbed = backbone.transformer(**given[0])[0][0]
        handle.remove()
    assert (conditional - perturbed).abs().max() > 1e-4
    torch.testing.assert_close(outputs[0], conditional + scale * (conditional - perturbed), rtol=1e-4, atol=1e-5)


def test_what_is_refused(backbone: Backbone) -> None:
    latents = torch.zeros(2, 3, 4, 8, 8)
    with pytest.raises(ValueError, match="tiny cosmos3 packs one video a forward, got 2; give them one by one"):
        backbone.forward(latents, 500.0, {0: copy_of_inputs})
    arguments = backbone.forward_arguments(latents[0], 500.0)
    with pytest.raises(ValueError, match="packs sound, actions or several videos beside the frames"):
        backbone.layout().read_call(backbone.transformer, {**arguments, "sound_tokens": [torch.zeros(1)]})
    with pytest.raises(ValueError, match=r'reads token ids: give prompt_embeds=\{"input_ids": '):
        backbone.forward(latents[0], 500.0, {0: copy_of_inputs}, prompt_embeds=torch.zeros(1, 4, 16))
    assert isinstance(arguments["vision_tokens"], list)
    assert not {"hidden_states", "encoder_hidden_states"} & set(arguments)


def test_given_frames_are_clean(backbone: Backbone) -> None:
    """As the pipeline gives the latents of an image: in place of noisy ones, and without a time."""
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32))
    ours = backbone.forward_arguments(latents, 500.0, image=latents[:1] + 1)
    assert torch.equal(ours["vision_tokens"][0][0, :, 0], latents[0] + 1)
    assert ours["vision_noisy_frame_indexes"][0].tolist() == [1, 2]
    assert len(ours["vision_timesteps"]) == 2 * 16
    assert (backbone.predict(latents, 500.0, image=latents[:1])[0] == 0).all()
