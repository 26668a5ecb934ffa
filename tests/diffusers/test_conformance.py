"""The conformance suite on every family, and mistakes planted in backbones that it must find."""

from __future__ import annotations

import importlib.util
import types
from dataclasses import replace

import pytest
import torch

from corrdit.integrations.diffusers import family_layouts, layouts, processors
from corrdit.integrations.diffusers.host import attention
from corrdit.integrations.diffusers.testing.accelerated_checks import ACCELERATED_CHECKS, FAILS_ITSELF, NO_GROUPS
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


QUICK = tuple(name for name in (*CHECKS, GENERATION_CHECK) if name not in ACCELERATED_CHECKS)


@pytest.mark.parametrize("name", EVERY)
def test_families_conform(name):
    results = check_backbone(tiny_backbone(name), generation=tiny_generation(name), only=QUICK)
    assert [result.name for result in results] == list(QUICK)
    assert all(result.passed for result in results)


OTHERS = [name for name, model in TINY_MODELS.items() if name != "wan" and not model.packed]


@pytest.mark.parametrize("name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_families_conform_however_they_are_run(name):
    results = check_backbone(tiny_backbone(name), only=tuple(ACCELERATED_CHECKS))
    assert [result.name for result in results] == list(ACCELERATED_CHECKS)
    absent = {
        "quantized": "torchao is not installed",
        "lora": "peft is not installed",
        "group offload": NO_GROUPS,
    }
    itself = {"ltx2": ["offload"], "ltx2-image": ["offload"]}.get(name, [])
    for result in results:
        if result.name in itself:
            assert result.skipped.startswith(FAILS_ITSELF)
            continue
        assert result.passed or result.name == "fused projections" or result.skipped == absent[result.name]


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


def from_weights(self, transformer, arguments):
    assert float(transformer.patch_embedding.weight.float().abs().sum()) > 0
    return family_layouts.WanLayout.read_call(self, transformer, arguments)


def from_dtypes(self, transformer, arguments):
    dtype = transformer.blocks[0].ffn.net[0].proj.weight.dtype
    return family_layouts.WanLayout.read_call(
        self, transformer, {**arguments, "hidden_states": arguments["hidden_states"].to(dtype).view(torch.float32)}
    )


def by_linear_class(self, transformer):
    found = family_layouts.WanLayout.attention_modules(self, transformer)
    return [module for module in found if type(module.to_q) is torch.nn.Linear and not is_quantized(module.to_q)]


def is_quantized(linear):
    return type(linear.weight) is not torch.nn.Parameter


def by_unfused(self, transformer):
    return [
        module
        for module in family_layouts.WanLayout.attention_modules(self, transformer)
        if not getattr(module, "fused_projections", False)
    ]


def in_another_order(self, transformer):
    return ["single_transformer_blocks", "transformer_blocks"]


PLANTED = {
    "offload": ({"read_call": from_weights}, "take sizes from the config"),
    "group offload": ({"block_lists": in_another_order}, "block_lists has to name the lists of all blocks"),
    "fused projections": ({"attention_modules": by_unfused}, "find modules by their place in the model"),
    "layerwise casting": ({"read_call": from_dtypes}, "take dtypes from the arguments"),
    "quantized": ({"attention_modules": by_linear_class}, "linear layers are of other classes here"),
    "lora": ({"attention_modules": by_linear_class}, "linear layers are of other classes here"),
    "compiled blocks": ({"block_lists": in_another_order}, "block_lists has to name the lists of all blocks"),
}


@pytest.mark.parametrize("name", [*PLANTED][:-1] + [pytest.param([*PLANTED][-1], marks=pytest.mark.slow)])
def test_mistakes_of_a_layout_that_show_when_the_model_is_run_otherwise(name, monkeypatch):
    methods, advice = PLANTED[name]
    if name in ("quantized", "lora"):
        pytest.importorskip({"quantized": "torchao", "lora": "peft"}[name])
    family = "hunyuanvideo" if "block_lists" in methods else "wan"
    backbone = tiny_backbone(family)
    if check_backbone(backbone, only=(name,))[0].skipped == NO_GROUPS:
        pytest.skip(NO_GROUPS)
    layout = type("Broken", (LAYOUTS[family],), methods)
    monkeypatch.setitem(layouts._registered, type(backbone.transformer).__name__, layout)
    with pytest.raises(AssertionError, match=f"- {name}: ") as failed:
        check_backbone(backbone, only=(name,))
    assert advice in str(failed.value)


def test_a_processor_that_goes_through_its_base_class_is_not_seen_under_another_backend():
    backbone = tiny_backbone("wan")

    class Own(type(backbone.transformer.blocks[0].attn1.processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    for block in backbone.transformer.blocks:
        block.attn1.processor = Own()
    check_backbone(backbone, only=("attention reproduced",))
    with pytest.raises(AssertionError, match=r"- attention backend: .*own __call__ has to call dispatch_attention_fn"):
        check_backbone(backbone, only=("attention backend",))


def test_a_model_whose_class_has_not_its_forward_cannot_be_computed_beside_a_cache():
    backbone = tiny_backbone("wan")
    transformer = backbone.transformer

    class Assigned(type(transformer)):
        def forward(self, hidden_states, timestep, encoder_hidden_states, **further):
            raise NotImplementedError("it is assigned")

    transformer.forward = types.MethodType(type(transformer).forward, transformer)
    transformer.__class__ = Assigned
    with pytest.raises(AssertionError, match=r"- step cache: .*its forward has to run without what was put round it"):
        check_backbone(backbone, only=("step cache",))


def test_checks_that_cannot_be_made_say_why(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    (result,) = check_backbone(tiny_backbone("ltx"), only=("quantized",))
    assert (result.problem, result.skipped, result.passed) == ("", "torchao is not installed", False)
