"""A capture that did not see what it was asked for says so, and names what left it out."""

import functools
import types
import warnings

import diffusers
import pytest
import torch

from corrdit.integrations.diffusers.captures import capture


def enable(transformer, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformer.enable_cache(config)


CACHES = {
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=1e6),
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        tensor_format="BFCHW",
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("steps", [None, [0, 1, 2]], ids=["all", "given"])
def test_a_cache_switched_on_inside_the_block(kind, steps, pipeline, generation, scores):
    pipe = pipeline("cogvideox-rotary")

    def switch_on_and_run():
        with capture(pipe, layers=1, steps=steps, operation=scores):
            enable(pipe.transformer, CACHES[kind]())
            pipe(**generation("cogvideox-rotary"))

    with pytest.raises(ValueError, match=rf"never fired for \(step \d, layer 1\).*{kind} left them out.*disable_cache"):
        switch_on_and_run()


def test_a_branch_that_a_cache_drops_is_not_read_as_the_other(pipeline, scores, generation):
    pipe = pipeline("cogvideox-rotary")
    config = diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=1,
        spatial_attention_timestep_skip_range=(-1, 0),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        tensor_format="BFCHW",
        current_timestep_callback=lambda: 500,
    )

    def switch_on_and_run():
        with capture(pipe, layers=0, branch="uncond", operation=scores):
            enable(pipe.transformer, config)
            pipe(**generation("cogvideox-rotary"))

    with pytest.raises(ValueError, match="FasterCache left them out"):
        switch_on_and_run()


def teacache_forward(own, transformer, *args, **kwargs):
    """Every other forward answers from what the one before gave."""
    transformer.seen = getattr(transformer, "seen", 0) + 1
    if transformer.seen % 2:
        transformer.answer = own(transformer, *args, **kwargs)
    return transformer.answer


def replaced(own):
    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        return teacache_forward(own, self, *args, **kwargs)

    return forward


@pytest.fixture
def own_forward():
    """Class-level replacements last until the test ends."""
    kind = diffusers.CogVideoXTransformer3DModel
    own = kind.forward
    yield own
    kind.forward = own


@pytest.mark.parametrize("place", ["instance", "class"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "inside"])
@pytest.mark.parametrize("steps", [None, [1]], ids=["all", "given"])
def test_a_replaced_forward(place, before, steps, pipeline, generation, scores, own_forward):
    pipe = pipeline("cogvideox")

    def replace():
        forward = replaced(own_forward)
        if place == "class":
            diffusers.CogVideoXTransformer3DModel.forward = forward
        else:
            pipe.transformer.forward = types.MethodType(forward, pipe.transformer)

    if before:
        replace()
    named = r"\(step 1, layer 0\).*test_capture_skips\.forward, which replaced the forward of CogVideoXTransformer3DM"

    def run():
        with capture(pipe, layers=0, steps=steps, operation=scores):
            if not before:
                replace()
            pipe(**generation("cogvideox"))

    with pytest.raises(ValueError, match=named):
        run()


@pytest.mark.parametrize(
    ("package", "name"), [("cache_dit.caching", "cache-dit"), ("para_attn.first", "ParaAttention")]
)
def test_a_plug_in_is_named(package, name, pipeline, generation, scores, own_forward):
    pipe = pipeline("cogvideox")
    forward = replaced(own_forward)
    plugged = types.FunctionType(
        forward.__code__, {**globals(), "__name__": package}, "forward", forward.__defaults__, forward.__closure__
    )
    pipe.transformer.forward = functools.partial(functools.wraps(own_forward)(plugged), pipe.transformer)
    with pytest.raises(ValueError, match=f"{name}, which replaced"), capture(pipe, layers=0, operation=scores):
        pipe(**generation("cogvideox"))


def test_a_block_that_answers_from_its_memory(pipeline, generation, scores):
    pipe = pipeline("wan")
    block, calls = pipe.transformer.blocks[0], []
    own = block.forward

    def remembering(hidden_states, *args, **kwargs):
        calls.append(True)
        return own(hidden_states, *args, **kwargs) if len(calls) == 1 else hidden_states

    block.forward = remembering
    with (
        pytest.raises(ValueError, match="remembering, which replaced the forward of WanTransformerBlock"),
        capture(pipe, layers=[0, 1], operation=scores),
    ):
        pipe(**generation("wan"))


def test_a_transformer_alone(transformer_call, scores):
    transformer, arguments = transformer_call()
    block = transformer.transformer_blocks[0]
    block.forward = lambda hidden_states, encoder_hidden_states, *args, **kwargs: (hidden_states, encoder_hidden_states)
    for early_exit in (False, True):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"\(step 0, layer 0\).*replaced the forward of CogVideoXBlock"),
            capture(transformer, layers=[0, 1], operation=scores, early_exit=early_exit),
        ):
            transformer(**arguments)


def test_a_pipeline_that_does_not_call_the_transformer_at_every_step(pipeline, generation, scores):
    pipe = pipeline("cogvideox")
    own, kept = pipe.transformer, []

    class Sometimes:
        def __getattr__(self, name):
            return getattr(own, name)

        def __call__(self, *args, **kwargs):
            if not kept:
                kept.append(own(*args, **kwargs))
            return kept[0]

    def run():
        with capture(pipe, layers=0, operation=scores):
            pipe.__dict__["transformer"] = Sometimes()
            pipe(**generation("cogvideox"))

    with pytest.raises(ValueError, match="steps 1 to 2: the run ended after step 0, before its 3 steps were done"):
        run()


def test_an_interrupted_run_is_allowed_and_called_that(pipeline, generation, scores):
    pipe = pipeline("cogvideox")

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    with capture(pipe, layers=0, operation=scores) as captured:
        pipe(**generation("cogvideox"), callback_on_step_end=stop)
    assert list(captured) == [(0, 0)]
    with (
        pytest.raises(ValueError, match="interrupted after step 0"),
        capture(pipe, layers=0, steps=2, operation=scores),
    ):
        pipe(**generation("cogvideox"), callback_on_step_end=stop)


def test_a_cache_that_left_nothing_out_is_no_error(pipeline, generation, scores):
    pipe = pipeline("cogvideox")
    with capture(pipe, layers=0, operation=scores) as captured:
        enable(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=1e-9))
        pipe(**generation("cogvideox"))
    assert list(captured) == [(0, 0), (1, 0), (2, 0)]


def test_a_forward_that_fails_skipped_nothing(transformer_call, scores):
    transformer, arguments = transformer_call()

    def fail(*args, **kwargs):
        raise KeyError("own error")

    own, transformer.transformer_blocks[1].forward = transformer.transformer_blocks[1].forward, fail
    with torch.no_grad(), capture(transformer, layers=[1], operation=scores) as captured:
        with pytest.raises(KeyError, match="own error"):
            transformer(**arguments)
        transformer.transformer_blocks[1].forward = own
        transformer(**arguments)
    assert list(captured) == [(0, 1)]


def read_with_cache(pipe, name, generation, scores, switch_on):
    """Latents of a cached run without and with a capture that computes, and what it read."""
    switch_on(pipe.transformer)
    plain = pipe(**generation(name)).frames
    with capture(pipe, layers=[0, 2], operation=scores, on_skip="compute") as captured:
        again = pipe(**generation(name)).frames
    return plain, again, dict(captured)


COMPUTED = {
    "FirstBlockCache": ("wan", lambda: diffusers.FirstBlockCacheConfig(threshold=1e6)),
    "MagCache": (
        "wan",
        lambda: diffusers.MagCacheConfig(
            mag_ratios=[1.0] * 8, num_inference_steps=4, retention_ratio=0.2, threshold=9.0
        ),
    ),
    "PyramidAttentionBroadcast": ("cogvideox-rotary", CACHES["PyramidAttentionBroadcast"]),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_skipped_layers_are_computed_beside_the_run(kind, pipeline, generation, scores):
    """The video is the cached run's to the bit, and what is read is a clean model's for the same inputs."""
    if kind == "MagCache" and not hasattr(diffusers, "MagCacheConfig"):
        pytest.skip("this diffusers has no MagCache")
    name, config = COMPUTED[kind]
    pipe = pipeline(name)
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({key: copied(value) for key, value in kwargs.items()}),
        with_kwargs=True,
    )
    plain, again, read = read_with_cache(pipe, name, generation, scores, lambda it: enable(it, config()))
    handle.remove()
    assert torch.equal(plain, again)
    assert sorted(read) == [(step, layer) for step in range(3) for layer in (0, 2)]
    clean = pipeline(name).transformer
    conditional = calls[len(calls) // 2 :: len(calls) // 6]
    for step, arguments in enumerate(conditional):
        with torch.no_grad(), capture(clean, layers=[0, 2], operation=scores) as expected:
            clean(**arguments)
        for layer in (0, 2):
            found = read[step, layer]
            assert torch.equal(found, expected[0, layer][-len(found) :])


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("place", ["transformer", "block"])
def test_layers_that_a_replaced_forward_leaves_out_are_computed(place, pipeline, generation, scores):
    pipe, calls = pipeline("cogvideox"), []
    module = pipe.transformer if place == "transformer" else pipe.transformer.transformer_blocks[0]
    own = module.forward

    def remembering(*args, **kwargs):
        calls.append(own(*args, **kwargs) if not calls else calls[0])
        return calls[0]

    module.forward = remembering
    with capture(pipe, layers=[0, 2], operation=scores, on_skip="compute") as captured:
        pipe(**generation("cogvideox"))
    assert module.forward is remembering
    assert sorted(captured) == [(step, layer) for step in range(3) for layer in (0, 2)]


def test_a_forward_replaced_for_its_class_cannot_be_computed_beside(pipeline, generation, scores, own_forward):
    pipe = pipeline("cogvideox")
    diffusers.CogVideoXTransformer3DModel.forward = replaced(own_forward)
    with (
        pytest.raises(ValueError, match=r"replaced the forward of CogVideoXTransformer3DModel, for its whole class"),
        capture(pipe, layers=0, operation=scores, on_skip="compute"),
    ):
        pipe(**generation("cogvideox"))


def test_wrong_words_for_skipped_layers(pipeline, scores):
    with pytest.raises(ValueError, match="on_skip must be one of"):
        capture(pipeline("wan"), layers=0, operation=scores, on_skip="ignore")


def test_a_cache_is_refused_unless_what_it_skips_is_computed(pipeline, scores):
    pipe = pipeline("wan")
    enable(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=1e6))
    with pytest.raises(ValueError, match=r'FirstBlockCache is enabled .*on_skip="compute"'):
        capture(pipe, layers=0, operation=scores).__enter__()
