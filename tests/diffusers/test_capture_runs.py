"""Steps, layers, branches and results of captures of whole pipelines and bare transformers."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from corrdit import CrossAttentionGuidance, PointTracker, capture, load_backbone, ops
from corrdit.testing import TINY_MODELS, tiny_generation, tiny_pipeline

GUIDED = ("cogvideox", "cogvideox-rotary", "hunyuanvideo", "wan", "wan-2.2", "ltx", "mochi")


def same_results(left, right):
    return set(left) == set(right) and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", ["cogvideox-rotary", "wan"])
def test_keys_are_steps_and_layers_counted_from_zero(name, pipeline, generation, scores):
    pipe = pipeline(name)
    plain = pipe(**generation(name, steps=4)).frames
    with capture(pipe, layers=[0, -1], steps=[-1, 1], operation=scores) as captured:
        during = pipe(**generation(name, steps=4)).frames
    assert torch.equal(plain, during)
    assert sorted(captured) == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert len(captured) == 4
    with pytest.raises(KeyError, match="there are"):
        captured[0, 0]


def test_a_backbone_is_captured_through_its_pipeline(generation, scores):
    from corrdit.testing import tiny_backbone

    backbone = tiny_backbone("wan")
    with capture(backbone, layers=0, steps=[-1], operation=scores) as captured:
        backbone.pipe(**generation("wan", steps=2))
    assert list(captured) == [(1, 0)]


def test_all_steps_are_read_without_steps(pipeline, generation, scores):
    pipe = pipeline("wan")
    with capture(pipe, layers=1, operation=scores) as captured:
        pipe(**generation("wan", steps=3))
    assert sorted(captured) == [(0, 1), (1, 1), (2, 1)]


def test_second_order_scheduler_repeats_timesteps_but_not_steps(pipeline, generation, scores):
    from diffusers import HeunDiscreteScheduler

    pipe = pipeline("cogvideox")
    pipe.scheduler = HeunDiscreteScheduler(prediction_type="v_prediction")
    with capture(pipe, layers=0, steps=[-1], operation=scores) as captured:
        pipe(**generation("cogvideox", steps=3))
    assert list(captured) == [(4, 0)]


@pytest.mark.parametrize("name", GUIDED)
def test_unguided_generation_has_the_conditional_branch_only(name, pipeline, generation, scores):
    pipe = pipeline(name)
    arguments = generation(name, guided=False)
    with capture(pipe, layers=0, steps=[0], operation=scores, branch="both") as captured:
        pipe(**arguments)
    assert set(captured[0, 0]) == {"cond"}
    assert captured[0, 0]["cond"].shape[0] == 1
    with (
        pytest.raises(ValueError, match="no classifier-free guidance"),
        capture(pipe, layers=0, steps=[0], operation=scores, branch="uncond"),
    ):
        pipe(**generation(name, guided=False))


def test_dynamic_guidance_does_not_confuse_branches(pipeline, generation, scores):
    pipe = pipeline("cogvideox")
    arguments = {**generation("cogvideox", steps=3), "use_dynamic_cfg": True}
    with capture(pipe, layers=0, operation=scores, branch="both") as captured:
        pipe(**arguments)
    assert all(set(result) == {"cond", "uncond"} for result in captured.values())


def test_second_transformer_of_wan(pipeline, generation):
    pipe = pipeline("wan-2.2")
    ran = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
    queries = {}
    with capture(
        pipe,
        layers=0,
        operation=lambda q, k, grid, key_mask: q.clone(),
        callback=lambda step, layer, result: queries.update({step: (ran.count("transformer_2"), result)}),
    ):
        pipe(**generation("wan-2.2", steps=4))
    assert ran.count("transformer")
    assert ran.count("transformer_2")
    assert sorted(queries) == [0, 1, 2, 3]


def test_several_operations_and_streamed_results(pipeline, generation, scores):
    pipe = pipeline("ltx")
    operations = {"scores": scores, "heads": lambda q, k, grid, key_mask: q.float().norm(dim=(-1, -2))}
    streamed = []
    with capture(pipe, layers=[0, 2], operation=operations, callback=lambda *event: streamed.append(event)) as captured:
        pipe(**generation("ltx", steps=2))
    assert [(step, layer) for step, layer, _ in streamed] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert all(set(result) == {"scores", "heads"} for *_, result in streamed)
    assert not captured
    with pytest.raises(KeyError, match="went to the callback"):
        captured[0, 0]


def test_memory_stays_flat_over_layers_and_steps(pipeline, generation):
    pipe = pipeline("cogvideox")
    alive, counts = [], []

    def watching(q, k, grid, key_mask):
        alive.append(weakref.ref(q.untyped_storage()))
        alive.append(weakref.ref(q))
        counts.append(sum(reference() is not None for reference in alive[1::2]))
        return q.float().mean()

    with capture(pipe, layers=[0, 1, 2], operation=watching):
        pipe(**generation("cogvideox", steps=3))
    gc.collect()
    assert max(counts) == 1
    assert not any(reference() is not None for reference in alive[1::2])


def test_a_second_run_needs_clear_a_callback_or_a_new_capture(pipeline, generation, scores):
    pipe = pipeline("wan")
    with capture(pipe, layers=0, steps=[0], operation=scores) as captured:
        pipe(**generation("wan"))
        first = captured[0, 0]
        captured.clear()
        pipe(**generation("wan", seed=1))
        assert not torch.equal(first, captured[0, 0])
        with pytest.raises(ValueError, match="read twice"):
            pipe(**generation("wan"))
    seen = []
    with capture(pipe, layers=0, steps=[-1], operation=scores, callback=lambda *event: seen.append(event[:2])):
        pipe(**generation("wan", steps=2))
        pipe(**generation("wan", steps=3))
    assert seen == [(1, 0), (2, 0)]


def test_bare_transformer_counts_distinct_timesteps(transformer_call, scores):
    transformer, arguments = transformer_call("wan")
    batch = arguments["timestep"].shape[0]
    with torch.no_grad(), capture(transformer, layers=0, steps=[0, 2], operation=scores) as captured:
        for time in (900.0, 500.0, 100.0):
            transformer(**{**arguments, "timestep": torch.full((batch,), time)})
    assert list(captured) == [(0, 0), (2, 0)]
    assert captured[0, 0].shape[0] == batch
    with torch.no_grad(), capture(transformer, layers=0, operation=scores, branch="uncond") as captured:
        transformer(**arguments)
        transformer(**{**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"] + 1})
    assert list(captured) == [(0, 0)]


def test_bare_transformer_with_a_branch_takes_half_the_batch(transformer_call, scores):
    transformer, arguments = transformer_call("cogvideox")
    with torch.no_grad(), capture(transformer, layers=0, operation=scores) as whole:
        transformer(**arguments)
    for branch, row in (("uncond", 0), ("cond", 1)):
        with torch.no_grad(), capture(transformer, layers=0, operation=scores, branch=branch) as half:
            transformer(**arguments)
        assert torch.equal(half[0, 0], whole[0, 0][row : row + 1])
    single = {name: value[:1] if torch.is_tensor(value) else value for name, value in arguments.items()}
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="the batch has 1 samples"),
        capture(transformer, layers=0, operation=scores, branch="cond"),
    ):
        transformer(**single)


def test_early_exit_runs_several_forwards_in_one_block(transformer_call, scores):
    transformer, arguments = transformer_call("mochi")
    batch = arguments["timestep"].shape[0]
    ran = []
    handle = transformer.transformer_blocks[2].register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad(), capture(transformer, layers=[1], operation=scores, early_exit=True) as captured:
        for time in (900.0, 100.0):
            assert transformer(**{**arguments, "timestep": torch.full((batch,), time)}) is None
    handle.remove()
    assert list(captured) == [(0, 1), (1, 1)]
    assert not ran


def test_samples_appended_inside_the_transformer_are_not_read(pipeline, generation, scores):
    """Guidance methods wrap the transformer's forward and append a perturbed copy of the conditional sample."""
    pipe = pipeline("cogvideox")
    with capture(pipe, layers=0, steps=[0], operation=scores) as reference:
        pipe(**generation("cogvideox"))
    forward = pipe.transformer.forward

    def appended(hidden_states, encoder_hidden_states, timestep, **more):
        grown = [torch.cat([x, x[-1:]]) for x in (hidden_states, encoder_hidden_states, timestep)]
        return (forward(*grown, **more)[0][:2],)

    pipe.transformer.forward = appended
    with capture(pipe, layers=0, steps=[0], operation=scores) as captured:
        pipe(**generation("cogvideox"))
    assert torch.allclose(captured[0, 0], reference[0, 0], rtol=1e-5, atol=1e-5)


def test_a_copied_pipeline_is_free_of_the_capture(pipeline, generation, scores):
    pipe = pipeline("ltx")
    plain = pipe(**generation("ltx")).frames
    with capture(pipe, layers=0, steps=[0], operation=scores):
        transformer = copy.deepcopy(pipe.transformer)
        pipe(**generation("ltx"))
    other = pipeline("ltx", seed=1)
    other.transformer = transformer
    assert torch.equal(other(**generation("ltx")).frames, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, r"layer 3 is outside CogVideoXTransformer3DModel, which has 3 attention layers \(0 to 2"),
        ({"layers": [-4]}, "layer -4 is outside"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [0.5]}, r"layers must be .*whole numbers"),
        ({"layers": True}, "True and False are no numbers here"),
        ({"layers": torch.tensor([False])}, "True and False are no numbers here"),
        ({"layers": "0"}, r"layers must be .*whole numbers"),
        ({"layers": 0, "steps": [True]}, "steps must be whole numbers"),
        ({"layers": 0, "steps": []}, "steps is empty"),
        ({"layers": 0, "operation": None}, "must be a function"),
        ({"layers": 0, "operation": {}}, "empty dict"),
        ({"layers": 0, "branch": "conditional"}, '"cond", "uncond" or "both"'),
        ({"layers": 0, "callback": 3}, "callback must be a function"),
        ({"layers": 0, "early_exit": True}, "without a prediction"),
    ],
)
def test_bad_options(options, message, pipeline, scores):
    with pytest.raises(ValueError, match=message):
        capture(pipeline("cogvideox"), **{"operation": scores, **options})


@pytest.mark.parametrize(
    "layers", [np.int64(1), torch.tensor(1), torch.tensor([1]), np.array([1]), range(1, 2), [1, -2]]
)
def test_layers_may_be_any_whole_numbers(layers, pipeline, generation, scores):
    pipe = pipeline("wan")
    with capture(pipe, layers=layers, steps=np.arange(1), operation=scores) as captured:
        pipe(**generation("wan", steps=2))
    assert list(captured) == [(0, 1)]


def test_a_pickled_or_copied_capture_is_a_dict_of_its_results(pipeline, generation, scores):
    pipe = pipeline("ltx")
    reader = capture(pipe, layers=0, steps=[0], operation=scores)
    with pytest.raises(KeyError, match="the model has not run inside the block"):
        reader[0, 0]
    with reader:
        pipe(**generation("ltx", steps=2))
    assert repr(reader) == "<Capture of LTXPipeline: (0, 0)>"
    duplicate = copy.deepcopy(reader)
    assert type(duplicate) is dict
    assert same_results(duplicate, reader)
    assert b"LTXPipeline" not in pickle.dumps(reader)


def test_per_head_results(pipeline, generation):
    pipe = pipeline("wan")

    def motion(q, k, grid, key_mask):
        return ops.soft_displacement(q, k, grid, heads="none", key_mask=key_mask)

    with capture(pipe, layers=0, steps=[-1], operation=motion) as captured:
        pipe(**generation("wan", steps=2))
    assert captured[1, 0].shape == (1, 2, 3, 3, 4, 4, 2)


def test_calls_by_something_else_than_the_captured_pipeline_are_refused(pipeline, generation, scores):
    """Another pipeline with the same transformer would be read with the wrong steps and branches."""
    pipe = pipeline("cogvideox")
    sharing = type(pipe)(**pipe.components)
    sharing.set_progress_bar_config(disable=True)
    pipe(**generation("cogvideox", steps=2))
    with (
        pytest.raises(ValueError, match="called, but not by the CogVideoXPipeline that was given"),
        capture(pipe, layers=0, operation=scores),
    ):
        sharing(**generation("cogvideox", steps=2))
    with capture(sharing, layers=0, steps=[-1], operation=scores) as captured:
        sharing(**generation("cogvideox", steps=2))
    assert captured[1, 0].shape[0] == 1


def test_two_pipelines_at_once_and_a_run_in_another_thread(pipeline, generation, scores):
    first, second = pipeline("wan"), pipeline("ltx")
    with (
        capture(first, layers=0, steps=[0], operation=scores) as one,
        capture(second, layers=1, steps=[1], operation=scores) as two,
    ):
        thread = threading.Thread(target=lambda: first(**generation("wan", steps=2)))
        thread.start()
        thread.join()
        second(**generation("ltx", steps=2))
    assert (list(one), list(two)) == ([(0, 0)], [(1, 1)])


def test_a_callback_that_raises_stops_the_run_and_the_model_is_restored(pipeline, generation, scores):
    pipe = pipeline("wan")
    before = type(pipe.transformer.blocks[0].attn1.processor)

    def failing(step, layer, result):
        raise RuntimeError(f"no room for {step}, {layer}")

    with (
        pytest.raises(RuntimeError, match="no room for 0, 0"),
        capture(pipe, layers=0, operation=scores, callback=failing),
    ):
        pipe(**generation("wan"))
    assert type(pipe.transformer.blocks[0].attn1.processor) is before
    assert not pipe.transformer._forward_pre_hooks


def test_a_wrapped_transformer_says_where_the_known_one_is(transformer_call, scores):
    transformer, arguments = transformer_call("wan")

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = transformer

        def forward(self, **arguments):
            return self.module(**arguments)

    with pytest.raises(ValueError, match=r"but holds a WanTransformer3DModel as \.module"):
        capture(Wrapper(), layers=0, operation=scores)
    wrapper = Wrapper()
    with torch.no_grad(), capture(wrapper.module, layers=0, operation=scores) as captured:
        wrapper(**arguments)
    assert list(captured) == [(0, 0)]


@pytest.mark.parametrize("step", [3, -4])
def test_step_outside_the_run_stops_before_it_starts(step, pipeline, generation, scores):
    pipe = pipeline("cogvideox")
    ran = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: ran.append(True))
    with pytest.raises(ValueError, match="which has 3 steps"), capture(pipe, layers=0, steps=step, operation=scores):
        pipe(**generation("cogvideox"))
    assert not ran


def test_never_fired(pipeline, generation, scores, transformer_call):
    pipe = pipeline("cogvideox")
    with pytest.raises(ValueError, match="did not run inside"), capture(pipe, layers=0, operation=scores):
        pass
    transformer, arguments = transformer_call("ltx")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"never fired for \(step 1, layer 0\): the run ended after step 0"),
        capture(transformer, layers=0, steps=[0, 1], operation=scores),
    ):
        transformer(**arguments)
    with pytest.raises(KeyError, match="own error"), capture(pipe, layers=0, operation=scores):
        raise KeyError("own error")


def test_interrupted_generation_is_reported(pipeline, generation, scores):
    pipe = pipeline("cogvideox")

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    with (
        pytest.raises(ValueError, match="the run ended after step 0"),
        capture(pipe, layers=0, steps=[-1], operation=scores),
    ):
        pipe(**generation("cogvideox"), callback_on_step_end=stop)


def test_models_that_cannot_be_captured(scores):
    class LatteTransformer3DModel(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="factored attention"):
        capture(LatteTransformer3DModel(), layers=0, operation=scores)
    with pytest.raises(ValueError, match=r"Linear is not a known video transformer; known are .*CogVideoX"):
        capture(torch.nn.Linear(2, 2), layers=0, operation=scores)
    with pytest.raises(ValueError, match="needs a diffusers video pipeline"):
        capture(object(), layers=0, operation=scores)


def test_negative_steps_of_a_bare_transformer(transformer_call, scores):
    transformer, _ = transformer_call()
    with pytest.raises(ValueError, match="capture the pipeline"):
        capture(transformer, layers=0, steps=[-1], operation=scores)


def test_captured_twice_leaves_the_first_alone(pipeline, generation, scores):
    pipe = pipeline("mochi")
    with capture(pipe, layers=0, steps=[0], operation=scores) as captured:
        with pytest.raises(ValueError, match="already being captured"), capture(pipe, layers=2, operation=scores):
            pass
        with pytest.raises(ValueError, match="already open"):
            captured.__enter__()
        pipe(**generation("mochi"))
    assert list(captured) == [(0, 0)]
    assert "Correspondence" not in type(pipe.transformer.transformer_blocks[0].attn1.processor).__name__


def test_a_capture_can_be_opened_again(pipeline, generation, scores):
    pipe = pipeline("ltx")
    reader = capture(pipe, layers=0, steps=[0], operation=scores)
    with reader:
        pipe(**generation("ltx"))
    first = dict(reader)
    reader.clear()
    with reader:
        pipe(**generation("ltx"))
    assert same_results(first, reader)


def test_token_coordinates_of_a_third_party_family(scores):
    """A family registered from outside is found by its class name."""
    from corrdit.integrations.diffusers import register_layout
    from corrdit.integrations.diffusers.backbones.wan import WanLayout
    from corrdit.testing import tiny_pipeline

    wan = tiny_pipeline("wan").transformer

    class OutsideTransformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.config, self.inner = wan.blocks, wan.config, wan

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return self.inner(hidden_states, timestep, encoder_hidden_states)

    with pytest.raises(ValueError, match="subclass of TransformerLayout"):
        register_layout("OutsideTransformer", dict)
    register_layout("OutsideTransformer", WanLayout)
    model = OutsideTransformer()
    with torch.no_grad(), capture(model, layers=0, operation=lambda q, k, grid, key_mask: grid) as captured:
        model(torch.randn(1, 4, 2, 4, 6), torch.tensor([5.0]), torch.randn(1, 7, 16))
    assert captured[0, 0].tokens == 2 * 2 * 3


def test_processors_put_back_after_a_capture_do_not_block_the_next() -> None:
    """A user, or fuse_qkv_projections, may keep the processors seen inside a capture and restore them after it."""
    pipe = tiny_pipeline("cogvideox-rotary")
    transformer = pipe.transformer
    expected = pipe(**tiny_generation("cogvideox-rotary", steps=1)).frames
    with capture(pipe, layers=[0], operation=lambda q, k, grid, mask: q.mean()):
        saved = transformer.attn_processors
        pipe(**tiny_generation("cogvideox-rotary", steps=1))
    transformer.set_attn_processor(saved)
    assert torch.equal(pipe(**tiny_generation("cogvideox-rotary", steps=1)).frames, expected)
    with capture(pipe, layers=[0], operation=lambda q, k, grid, mask: q.mean()) as captured:
        assert torch.equal(pipe(**tiny_generation("cogvideox-rotary", steps=1)).frames, expected)
    assert len(captured) == 1
    assert "CorrespondenceProcessor" not in {type(kept).__name__ for kept in transformer.attn_processors.values()}


def test_fusing_inside_a_capture_does_not_block_the_next() -> None:
    pipe = tiny_pipeline("cogvideox-rotary")
    with capture(pipe, layers=[0], operation=lambda q, k, grid, mask: q.mean()):
        pipe(**tiny_generation("cogvideox-rotary", steps=1))
        pipe.transformer.fuse_qkv_projections()
    pipe.transformer.unfuse_qkv_projections()
    with capture(pipe, layers=[0], operation=lambda q, k, grid, mask: q.mean()) as captured:
        pipe(**tiny_generation("cogvideox-rotary", steps=1))
    assert len(captured) == 1


@pytest.mark.parametrize("preset, message", [({"layer": 1}, "is a Preset or the path"), ("", "is a folder")])
def test_presets_that_are_none(preset: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone("embedded", preset=preset or tmp_path)


def in_another_thread(function):
    """What the function raises there, or None."""
    raised = []

    def call():
        try:
            function()
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return str(raised[0]) if raised else None


def test_a_second_thread_is_refused_and_leaves_the_first_as_it_is(pipeline, generation, scores):
    """Its run would be counted as steps of the first one's, and its results taken for those."""
    pipe = pipeline("wan")
    with capture(pipe, layers=0, operation=scores) as alone:
        pipe(**generation("wan", steps=2))

    def second(pipe, step, timestep, arguments):
        refusals.append(in_another_thread(lambda: pipe.transformer(**given[0])))
        refusals.append(in_another_thread(lambda: capture(pipe.transformer, layers=1, operation=scores).__enter__()))
        refusals.append(in_another_thread(lambda: CrossAttentionGuidance(pipe, 1).__enter__()))
        return {}

    refusals, given = [], []
    keep = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    with capture(pipe, layers=0, operation=scores) as captured:
        pipe(**generation("wan", steps=2), callback_on_step_end=second)
    keep.remove()
    assert len(refusals) == 6
    messages = ("is in use in another thread", "is already being captured", "is in use in another thread")
    assert all(message in str(refusal) for message, refusal in zip(2 * messages, refusals, strict=True))
    assert same_results(alone, captured)
    assert in_another_thread(lambda: pipe(**generation("wan", steps=1))) is None


def test_a_model_inside_a_guidance_serves_no_tracker():
    backbone = load_backbone("embedded")
    video = np.zeros((3, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="leave the guidance or the capture"), CrossAttentionGuidance(backbone):
        PointTracker(backbone).track(video, "grid:2")
    PointTracker(backbone).track(video, "grid:2")


@pytest.mark.parametrize("name", ["cogvideox", "wan", "ltx", "mochi"])
@pytest.mark.parametrize("block", ["capture", "guidance"])
def test_a_guidance_scale_that_is_no_number_is_refused(pipeline, generation, scores, name, block):
    """It is neither above 1 nor at most 1: pipelines left classifier-free guidance out, or made frames of NaN."""
    pipe = pipeline(name)
    context = capture(pipe, layers=0, operation=scores) if block == "capture" else CrossAttentionGuidance(pipe, 1)
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"), context:
        pipe(**{**generation(name, steps=2), "guidance_scale": float("nan")})


@pytest.mark.parametrize("block", ["capture", "early exit", "cross_frame", "skip"])
def test_a_model_saved_inside_a_block_needs_nothing_of_ours(pipeline, generation, scores, block):
    """A pickle, and with it `torch.save`, names no module of this package; the model in it is as it was before."""
    pipe = pipeline("wan")
    given, output = {}, {}

    def note(module, args, kwargs, result):
        given.update(kwargs)
        output["plain"] = result[0]

    keep = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    pipe(**generation("wan", steps=1))
    keep.remove()
    contexts = {
        "capture": capture(pipe, layers=1, operation=scores),
        "early exit": capture(pipe.transformer, layers=1, operation=scores, early_exit=True),
        "cross_frame": CrossAttentionGuidance(pipe, 1),
        "skip": CrossAttentionGuidance(pipe, 1, perturbation="skip"),
    }
    context = contexts[block].__enter__()
    saved, duplicate = pickle.dumps(pipe.transformer), copy.deepcopy(pipe.transformer)
    # As after an exception: nothing came of the capture.
    context.__exit__(InterruptedError, None, None)
    assert b"corrdit" not in saved
    assert {type(processor) for processor in duplicate.attn_processors.values()} == {
        type(processor) for processor in pipe.transformer.attn_processors.values()
    }
    with torch.no_grad():
        torch.testing.assert_close(duplicate(**given)[0], output["plain"], rtol=0, atol=0)


@pytest.mark.skipif("kandinsky5" not in TINY_MODELS, reason="this diffusers has no Kandinsky 5")
@pytest.mark.parametrize("guided", [True, False])
def test_second_order_steps_of_a_pipeline_that_keeps_no_timestep(guided):
    """Five passes of the loop, of which two have the timestep of the one before."""
    pipe = tiny_pipeline("kandinsky5")
    assert not hasattr(type(pipe), "current_timestep")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *given: calls.append(given))
    with capture(pipe, layers=[0], operation=lambda q, k, grid, key_mask: torch.tensor([len(calls)])) as captured:
        pipe(**tiny_generation("kandinsky5", steps=3, guided=guided))
    assert len(calls) == (10 if guided else 5)
    expected = {(step, 0): (2 * step if guided else step) + 1 for step in range(5)}
    assert {key: int(value) for key, value in captured.items()} == expected
