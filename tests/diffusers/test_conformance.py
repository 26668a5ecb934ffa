"""The conformance suite on every family, and mistakes planted in backbones that it must find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from corrdit.integrations.diffusers import family_layouts, processors
from corrdit.integrations.diffusers.host import attention
from corrdit.integrations.diffusers.testing.conformance import CHECKS, GENERATION_CHECK
from corrdit.testing import TINY_MODELS, check_backbone, tiny_backbone, tiny_generation

LAYOUTS = {
    "cogvideox": family_layouts.CogVideoXLayout,
    "hunyuanvideo": family_layouts.HunyuanVideoLayout,
    "wan": family_layouts.WanLayout,
    "ltx": family_layouts.LTXLayout,
    "mochi": family_layouts.MochiLayout,
}
FAMILIES = tuple(LAYOUTS)
FAST = ("cogvideox-rotary", *(name for name, model in TINY_MODELS.items() if "-" not in name and not model.variant))
EVERY = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name, model in TINY_MODELS.items()
    if not model.packed
]


@pytest.mark.parametrize("name", EVERY)
def test_families_conform(name):
    results = check_backbone(tiny_backbone(name), generation=tiny_generation(name))
    assert [result.name for result in results] == [*CHECKS, GENERATION_CHECK]


def failures(name, *, only=None, generation=False):
    """Names of the checks a (broken) family fails."""
    with pytest.raises(AssertionError) as failed:
        check_backbone(tiny_backbone(name), only=only, generation=tiny_generation(name) if generation else None)
    lines = str(failed.value).splitlines()[1:]
    return {line.removeprefix("- ").partition(":")[0] for line in lines if line.startswith("- ")}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("offset", [-1, 1])
def test_text_offset_off_by_one(name, offset, monkeypatch):
    layout = LAYOUTS[name]
    read_call = layout.read_call

    def misplaced(self, transformer, arguments):
        call = read_call(self, transformer, arguments)
        return replace(call, grid=replace(call.grid, text_tokens=max(0, call.grid.text_tokens + offset)))

    if offset < 0 and not layout.read_call(layout(), *whole_call(name)).grid.text_tokens:
        pytest.skip("there is no text to take away")
    monkeypatch.setattr(layout, "read_call", misplaced)
    assert {"grid", "output unchanged", "attention reproduced", "token order"} <= failures(
        name, only=("grid", "output unchanged", "attention reproduced", "token order")
    )


def whole_call(name):
    from corrdit.integrations.diffusers.testing.subject import Subject

    subject = Subject.random(tiny_backbone(name), frames=3, batch=2, seed=0)
    return subject.transformer, subject.arguments()


@pytest.mark.parametrize("name", ["cogvideox", "hunyuanvideo", "mochi"])
def test_text_at_the_wrong_end(name, monkeypatch):
    layout = LAYOUTS[name]
    read_call = layout.read_call

    def misplaced(self, transformer, arguments):
        call = read_call(self, transformer, arguments)
        return replace(call, grid=replace(call.grid, text_first=not call.grid.text_first))

    monkeypatch.setattr(layout, "read_call", misplaced)
    assert "token order" in failures(name, only=("token order", "text position", "masks"))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_and_columns_swapped(name, monkeypatch):
    layout = LAYOUTS[name]
    video_grid = layout.video_grid
    monkeypatch.setattr(
        layout,
        "video_grid",
        lambda self, transformer, frames, height, width: video_grid(self, transformer, frames, width, height),
    )
    monkeypatch.setattr(
        "corrdit.integrations.diffusers.testing.subject.fitting_tokens", lambda backbone, rows, columns: (4, 3)
    )
    assert failures(name, only=("token order",)) == {"token order"}


@pytest.mark.parametrize("name", FAMILIES)
def test_wrong_branch(name, monkeypatch):
    layout = LAYOUTS[name]
    other = {"batched": "separate", "separate": "batched"}[layout.guidance]
    monkeypatch.setattr(layout, "guidance", other)
    assert failures(name, only=(GENERATION_CHECK,), generation=True) == {GENERATION_CHECK}


@pytest.mark.parametrize("name", ["cogvideox-rotary", "hunyuanvideo"])
def test_rotary_lost_by_a_signature_without_names(name, monkeypatch):
    monkeypatch.setattr(attention, "_with_argument_names", lambda base, inner: base)
    monkeypatch.setattr(
        processors.CorrespondenceProcessor,
        "__call__",
        lambda self, attn, *args, **kwargs: self.call((), attn, *args, **kwargs),
        raising=False,
    )
    assert "output unchanged" in failures(name, only=("output unchanged", "attention reproduced"))


@pytest.mark.parametrize("name", ["cogvideox-rotary", *FAMILIES[1:]])
def test_queries_before_rotary(name, monkeypatch):
    """The output is the model's own, but what is read comes from a call without the rotary tables."""
    read = processors.CorrespondenceProcessor.call

    def without_tables(value):
        return None if isinstance(value, tuple) else value

    def unrotated(self, interceptors, attn, *args, **kwargs):
        if self._request is not None:
            shorn = {n: without_tables(v) for n, v in kwargs.items()}
            read(self, interceptors, attn, *map(without_tables, args), **shorn)
        return self.inner(attn, *args, **kwargs)

    monkeypatch.setattr(processors.CorrespondenceProcessor, "call", unrotated)
    assert failures(name, only=("output unchanged", "attention reproduced")) == {"attention reproduced"}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_moved_by_one(name, monkeypatch):
    of_call = processors.AttentionInputs.of_call

    def moved(call):
        inputs = of_call(call)
        return replace(inputs, query=inputs.query.roll(1, dims=2), key=inputs.key.roll(1, dims=2))

    monkeypatch.setattr(processors.AttentionInputs, "of_call", moved)
    assert "token order" in failures(name, only=("attention reproduced", "token order"))


@pytest.mark.parametrize("name", ["hunyuanvideo", "mochi"])
def test_masks_forgotten(name, monkeypatch):
    from corrdit.integrations.diffusers.attention_inputs import GatheredCalls

    joined = GatheredCalls.joined
    monkeypatch.setattr(GatheredCalls, "joined", lambda self: replace(joined(self), key_mask=None))
    assert {"masks", "attention reproduced"} <= failures(name, only=("masks", "attention reproduced"))


def test_processors_left_behind(monkeypatch):
    monkeypatch.setattr(attention, "_unwrap", lambda module, wrapped: None)
    only = tuple(name for name in CHECKS if name.startswith("restored"))
    assert failures("wan", only=only) == set(only)


def test_queries_kept_alive(monkeypatch):
    kept = []
    fire = processors.CorrespondenceProcessor._fire

    def keeping(self, request, inputs):
        kept.append(inputs)
        fire(self, request, inputs)

    monkeypatch.setattr(processors.CorrespondenceProcessor, "_fire", keeping)
    assert failures("ltx", only=("memory",)) == {"memory"}


def test_copies_that_keep_the_processor(monkeypatch):
    def whole(self):
        return (object.__new__, (processors.CorrespondenceProcessor,), {"inner": self.inner})

    monkeypatch.setattr(processors.CorrespondenceProcessor, "__reduce__", whole)
    assert failures("wan", only=("pickling",)) == {"pickling"}


def test_second_firing_under_checkpointing(monkeypatch):
    monkeypatch.setattr(processors, "_recomputing", lambda: False)
    monkeypatch.setattr(processors.CorrespondenceProcessor, "disarm", lambda self: None)
    assert failures("cogvideox", only=("gradient checkpointing",)) == {"gradient checkpointing"}


def test_operation_counted_into_the_checkpoint(monkeypatch):
    import contextlib

    monkeypatch.setattr(processors, "saved_tensors_kept_apart", contextlib.nullcontext)
    assert failures("wan", only=("gradient checkpointing",)) == {"gradient checkpointing"}


def test_early_exit_one_layer_too_soon(monkeypatch):
    fire = processors.CorrespondenceProcessor._fire

    def early(self, request, inputs):
        if request.stop:
            raise processors.EarlyExit
        fire(self, request, inputs)

    monkeypatch.setattr(processors.CorrespondenceProcessor, "_fire", early)
    assert failures("wan", only=("early exit",)) == {"early exit"}


def test_unknown_checks_are_refused():
    with pytest.raises(ValueError, match=r"unknown checks \['colour'\]; there are grid, output unchanged"):
        check_backbone(tiny_backbone("ltx"), only=("colour",))


def test_the_checked_model_is_left_as_it_was():
    backbone = tiny_backbone("wan")
    before = {name: value.clone() for name, value in backbone.transformer.state_dict().items()}
    check_backbone(backbone, only=("gradient checkpointing", "early exit"))
    assert all(torch.equal(value, before[name]) for name, value in backbone.transformer.state_dict().items())
    assert not backbone.transformer.gradient_checkpointing
    assert all(parameter.grad is None for parameter in backbone.transformer.parameters())


def test_memory_is_measured_beside_sparse_tensors_of_the_caller():
    held = torch.eye(2).to_sparse()
    results = check_backbone(tiny_backbone("wan"), only=("memory",))
    assert held.is_sparse
    assert [result.name for result in results] == ["memory"]
