"""Reading, guiding and transferring under attention backends that do not call scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from corrdit import CorrespondenceProcessor, capture
from corrdit.integrations.diffusers.attention_inputs import AttentionInputs
from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance
from corrdit.integrations.diffusers.host.attention import AttentionCall, DelegatingProcessor, intercepting
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.motion_transfer import MotionTransfer
from corrdit.integrations.diffusers.testing.plain_attention import (
    PLAIN_BACKEND,
    plain_attention,
    plain_backend,
    use_backend,
)
from corrdit.integrations.diffusers.testing.tiny_pipelines import wan_transformer
from corrdit.testing import tiny_backbone, tiny_generation, tiny_pipeline

FAMILIES = ("hunyuanvideo", "wan", "ltx")
PLAIN = PLAIN_BACKEND.value
STAND_INS = (PLAIN, "flash", "sage")
"""Names of backends that are not installed, under which attention written out stands in."""
BACKENDS = ("native", "_native_math", "flex", *STAND_INS)
PACKAGES = {"flash": "flash_attn", "sage": "sageattention", "xformers": "xformers"}


@pytest.fixture(autouse=True)
def plain():
    with contextlib.ExitStack() as stack:
        for name in STAND_INS:
            stack.enter_context(plain_backend(AttentionBackendName(name)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield stack


def use(transformer, backend):
    use_backend(transformer, AttentionBackendName(backend))


def output(transformer, arguments):
    with torch.no_grad():
        return transformer(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_capture(name, backend, transformer_call, scores):
    transformer, arguments = transformer_call(name)
    with torch.no_grad(), capture(transformer, layers=[0, 1], operation=scores) as native:
        transformer(**arguments)
    use(transformer, backend)
    plain = output(transformer, arguments)
    with capture(transformer, layers=[0, 1], operation=scores) as captured:
        during = output(transformer, arguments)
    assert torch.equal(plain, during)
    assert torch.equal(captured[0, 0], native[0, 0])
    if backend != "flex":
        # The mask over keys is taken for one over queries there.
        torch.testing.assert_close(captured[0, 1], native[0, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real kernels need a GPU")
@pytest.mark.parametrize("backend", PACKAGES)
def test_the_real_kernels_on_a_gpu(backend, request):
    """Bit-identical to the run without us, under kernels that compute in half precision and take no mask."""
    pytest.importorskip(PACKAGES[backend])
    request.getfixturevalue("plain").close()
    # Heads of 64 channels, which all of them have.
    transformer = wan_transformer(attention_head_dim=64).to("cuda", torch.float16)
    source = torch.Generator().manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(1, 4, 3, 16, 16, generator=source).to("cuda", torch.float16),
        "encoder_hidden_states": torch.randn(1, 8, 16, generator=source).to("cuda", torch.float16),
        "timestep": torch.full((1,), 500, device="cuda"),
    }

    def keep(q, k, *further):
        return q.clone(), k.clone()

    with torch.no_grad(), capture(transformer, layers=[0, 2], operation=keep) as native:
        transformer(**arguments)
    use(transformer, backend)
    plain = output(transformer, arguments)
    with capture(transformer, layers=[0, 2], operation=keep) as captured:
        during = output(transformer, arguments)
    assert torch.equal(plain, during)
    assert all(torch.equal(one, two) for one, two in zip(captured[0, 0], native[0, 0], strict=True))


@pytest.mark.parametrize("name", ["wan", pytest.param("hunyuanvideo", marks=pytest.mark.slow)])
def test_capture_of_compiled_blocks(name, transformer_call, scores):
    transformer, arguments = transformer_call(name)
    use(transformer, PLAIN)
    plain = output(transformer, arguments)
    with torch.no_grad(), capture(transformer, layers=[0, 1], operation=scores) as expected:
        transformer(**arguments)
    torch._dynamo.reset()
    for module_list in layout_of(transformer).block_lists(transformer):
        for block in getattr(transformer, module_list):
            block.compile(backend="eager", fullgraph=True)
    with capture(transformer, layers=[0, 1], operation=scores) as captured:
        during = output(transformer, arguments)
    torch._dynamo.reset()
    assert torch.equal(plain, during)
    assert all(torch.equal(captured[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_and_leaving_early(name, transformer_call):
    transformer, arguments = transformer_call(name)
    arguments["hidden_states"].requires_grad_()
    gradients = []
    for backend, early_exit in (("native", False), (PLAIN, False), (PLAIN, True)):
        use(transformer, backend)
        with capture(
            transformer, layers=1, operation=lambda q, k, *_: (q * k).sum(), keep_graph=True, early_exit=early_exit
        ) as captured:
            transformer(**arguments)
        gradients.append(torch.autograd.grad(captured[0, 1], arguments["hidden_states"])[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradients[2], gradients[1])


@pytest.mark.parametrize("name", ["cogvideox-rotary", *FAMILIES])
def test_processors_set_for_the_whole_model_as_users_type_it(name, transformer_call, scores):
    transformer, arguments = transformer_call(name)
    layout = layout_of(transformer)
    modules, grid = layout.attention_modules(transformer), layout.read_call(transformer, arguments).grid
    with capture(transformer, layers="all", operation=scores) as captured:
        plain = output(transformer, arguments)
    stock = transformer.attn_processors
    mine = {
        key: CorrespondenceProcessor(processor, grid, scores)
        for key, processor in stock.items()
        if any(processor is module.processor for module in modules)
    }
    transformer.set_attn_processor({**stock, **mine})
    assert torch.equal(output(transformer, arguments), plain)
    assert [module.processor for module in modules] == list(mine.values())
    for layer, module in enumerate(modules):
        assert torch.equal(module.processor.result, captured[0, layer])
    transformer.set_attn_processor(dict(stock))
    assert transformer.attn_processors == stock


@pytest.mark.parametrize("heads", [None, [1]])
@pytest.mark.parametrize("backend", ["_native_math", PLAIN])
@pytest.mark.parametrize("name", FAMILIES)
def test_guidance(name, backend, heads):
    pipe = tiny_pipeline(name)
    with CrossAttentionGuidance(pipe, 1, heads=heads):
        native = pipe(**tiny_generation(name, steps=2)).frames
    use(pipe.transformer, backend)
    plain = pipe(**tiny_generation(name, steps=2)).frames
    with CrossAttentionGuidance(pipe, 1, heads=heads):
        guided = pipe(**tiny_generation(name, steps=2)).frames
    torch.testing.assert_close(guided, native, rtol=1e-3, atol=1e-3)
    assert (guided - plain).abs().max() > 1e-3
    assert torch.equal(pipe(**tiny_generation(name, steps=2)).frames, plain)


def test_heads_that_keep_their_attention_have_it_from_the_models_backend(monkeypatch):
    widths = []

    def counted(query, *args, **kwargs):
        widths.append(query.shape[2])
        return plain_attention(query, *args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(PLAIN), counted)
    pipe = tiny_pipeline("ltx")
    use(pipe.transformer, PLAIN)
    with CrossAttentionGuidance(pipe, 1, heads=[1]):
        pipe(**tiny_generation("ltx", steps=2))
    assert widths.count(1) == 2


@pytest.mark.parametrize(
    "settings",
    [{"method": "injection", "injection_blocks": (0, 1)}, {"block": 1}, {"block": 1, "optimise": "embedding"}],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_motion_transfer(name, settings):
    generation = tiny_generation(name)
    arguments = {key: generation[key] for key in generation if key not in TRANSFER_SETS}
    rng = np.random.default_rng(0)
    frames = (generation["num_frames"], arguments["height"], arguments["width"], 3)
    video = rng.integers(0, 256, frames, dtype=np.uint8)
    results = []
    for backend in ("native", "_native_math", PLAIN):
        backbone = tiny_backbone(name)
        use(backbone.transformer, backend)
        options = {"steps": 2, "guided_share": 0.5, "optimisation_steps": 1, **settings}
        results.append(MotionTransfer(backbone, **options)(video, **arguments))
    for other in results[1:]:
        np.testing.assert_allclose(other.losses, results[0].losses, rtol=1e-3)
        assert np.abs(other.video.astype(int) - results[0].video).max() <= 2


TRANSFER_SETS = ("num_inference_steps", "generator", "output_type", "num_frames")


def test_attention_assigned_by_the_user_is_seen(transformer_call, scores, monkeypatch):
    transformer, arguments = transformer_call("cogvideox")
    with torch.no_grad(), capture(transformer, layers=[0], operation=scores) as native:
        transformer(**arguments)

    def other(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert attn_mask is None
        return ((query @ key.mT) * query.shape[-1] ** -0.5).softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", other)
    plain = output(transformer, arguments)
    with capture(transformer, layers=[0], operation=scores) as captured:
        during = output(transformer, arguments)
    assert torch.equal(plain, during)
    assert torch.equal(captured[0, 0], native[0, 0])
    assert F.scaled_dot_product_attention is other


class Doubling(DelegatingProcessor):
    """Gives attention queries twice as large."""

    def call(self, interceptors, attn, *args, **kwargs):
        def double(call, attention):
            return attention(call.changed(2 * call.query, call.key, call.value))

        return self.delegated((double, *interceptors), attn, *args, **kwargs)


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_what_is_read_is_what_is_computed_whichever_processor_is_outside(name, transformer_call):
    transformer, arguments = transformer_call(name)
    layout = layout_of(transformer)
    module, grid = layout.attention_modules(transformer)[0], layout.read_call(transformer, arguments).grid
    stock = module.processor

    def reading(inner):
        return CorrespondenceProcessor(inner, grid, lambda q, *_: q.clone())

    module.processor = reading(stock)
    output(transformer, arguments)
    own = module.processor.result
    module.processor = Doubling(stock)
    changed = output(transformer, arguments)
    for outer, inner in ((reading, Doubling), (Doubling, reading)):
        module.processor = outer(inner(stock))
        assert torch.equal(output(transformer, arguments), changed)
        reader = module.processor if outer is reading else module.processor.inner
        assert torch.equal(reader.result, 2 * own)


def test_arguments_are_passed_on_as_they_were_given():
    seen = []

    def dispatch_attention_fn(query, key, value, *args, **kwargs):
        seen.append((args, kwargs))
        return query

    scope = {"dispatch_attention_fn": dispatch_attention_fn, "__name__": "somebody"}
    exec(
        "class Own:\n"
        "    def __call__(self, attn, q, mask, *, scale=0.5):\n"
        "        return dispatch_attention_fn(q, value=q, key=q, attn_mask=mask, scale=scale, backend='other')\n",
        scope,
    )
    masks = []

    class Looking(DelegatingProcessor):
        def call(self, interceptors, attn, *args, **kwargs):
            def look(call, attention):
                masks.append((call.mask, call.scale, call.causal, call.query.shape))
                return attention(call)

            return self.delegated((look,), attn, *args, **kwargs)

    q, mask = torch.randn(2, 5, 3, 4), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(Looking(scope["Own"]())(None, q, mask), q)
    assert seen == [((), {"attn_mask": mask, "scale": 0.5, "backend": "other"})]
    assert masks[0][0].shape == (2, 1, 1, 5)
    assert masks[0][1:] == (0.5, False, (2, 3, 5, 4))
    assert scope["dispatch_attention_fn"] is dispatch_attention_fn


def test_a_block_mask_is_refused_by_name():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="gives its attention a BlockMask"):
        AttentionInputs.of_call(AttentionCall(q, q, q, (), {"attn_mask": mask}, True))


def test_the_mode_ends_with_its_block():
    q = torch.randn(1, 2, 8, 4)
    with intercepting([lambda call, attention: torch.zeros_like(call.query)]):
        assert not F.scaled_dot_product_attention(q, q, q).any()
    assert F.scaled_dot_product_attention(q, q, q).any()
