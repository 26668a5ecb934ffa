"""The processor put in by hand: one line on somebody's own model."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corrdit import CorrespondenceProcessor, TokenGrid
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.processors import named_operations

FAMILIES = ("cogvideox", "cogvideox-rotary", "hunyuanvideo", "wan", "ltx", "mochi")


@pytest.fixture(autouse=True)
def usual_backend_afterwards():
    """A model's `set_attention_backend` also changes diffusers' backend of all other models, which stays changed."""
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("native"):
        yield


@pytest.fixture
def attached(transformer_call):
    """(transformer, arguments, first self-attention module, its grid)."""

    def build(name: str = "cogvideox"):
        transformer, arguments = transformer_call(name)
        layout = layout_of(transformer)
        grid = layout.read_call(transformer, arguments).grid
        return transformer, arguments, layout.attention_modules(transformer)[0], grid

    return build


def run(transformer, arguments):
    with torch.no_grad():
        return transformer(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_swap_in_and_out(name, attached, scores):
    transformer, arguments, module, grid = attached(name)
    plain = run(transformer, arguments)
    stock = module.processor
    module.processor = CorrespondenceProcessor(module.processor, grid, scores)
    with pytest.raises(ValueError, match="no forward has gone through it"):
        module.processor.result.sum()
    assert torch.equal(plain, run(transformer, arguments))
    assert module.processor.result.shape == (2, grid.tokens, grid.tokens)
    module.processor = module.processor.inner
    assert module.processor is stock


def test_results_of_the_latest_forward_by_name(attached, scores):
    transformer, arguments, module, grid = attached()
    operations = {"scores": scores, "largest": lambda q, k, grid, key_mask: q.amax()}
    module.processor = CorrespondenceProcessor(module.processor, grid, operations)
    run(transformer, arguments)
    first = module.processor.result
    run(transformer, {**arguments, "hidden_states": arguments["hidden_states"] + 1})
    assert set(first) == {"scores", "largest"}
    assert not torch.equal(first["scores"], module.processor.result["scores"])


def test_graph_is_kept_on_request(attached):
    transformer, arguments, module, grid = attached("wan")
    latents = arguments["hidden_states"].requires_grad_()
    module.processor = CorrespondenceProcessor(
        module.processor, grid, lambda q, k, grid, key_mask: (q * k).sum(), keep_graph=True
    )
    transformer(**arguments)
    (gradient,) = torch.autograd.grad(module.processor.result, latents)
    assert gradient.abs().sum() > 0


def test_checkpointed_blocks_fire_once(attached):
    transformer, arguments, module, grid = attached("cogvideox")
    fired = []
    module.processor = CorrespondenceProcessor(module.processor, grid, lambda *_: fired.append(True))
    transformer.enable_gradient_checkpointing()
    arguments["hidden_states"].requires_grad_()
    transformer(**arguments, return_dict=False)[0].sum().backward()
    assert fired == [True]


@pytest.mark.parametrize("name", ["cogvideox", "hunyuanvideo", "wan"])
@pytest.mark.parametrize("wrong", [{"text_tokens": 1}, {"frames": 1}, {"width": -1}])
def test_a_grid_that_does_not_fit_names_both_numbers(name, wrong, attached, scores):
    transformer, arguments, module, grid = attached(name)
    sizes = {"frames": grid.frames, "height": grid.height, "width": grid.width, "text_tokens": grid.text_tokens}
    other = TokenGrid(**{n: size + wrong.get(n, 0) for n, size in sizes.items()}, text_first=grid.text_first)
    module.processor = CorrespondenceProcessor(module.processor, other, scores)
    with pytest.raises(ValueError, match=f"has {grid.tokens} tokens but the grid has {other.tokens} "):
        run(transformer, arguments)


def test_mochi_counts_the_tokens_of_each_prompt(attached, scores):
    transformer, arguments, module, grid = attached("mochi")
    module.processor = CorrespondenceProcessor(
        module.processor, TokenGrid(grid.frames, grid.height, grid.width, grid.text_tokens + 1, False), scores
    )
    with pytest.raises(ValueError, match=f"tokens but the grid has {grid.tokens + 1} "):
        run(transformer, arguments)


def test_cross_attention_is_refused(attached, scores):
    transformer, arguments, _, grid = attached("wan")
    module = transformer.blocks[0].attn2
    module.processor = CorrespondenceProcessor(module.processor, grid, scores)
    with pytest.raises(ValueError, match="cross-attention"):
        run(transformer, arguments)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda q, k, grid, key_mask: q, "returned q or a view"),
        (lambda q, k, grid, key_mask: {"kept": [k[:, :, 1:2].transpose(1, 2)]}, "returned k or a view"),
        (lambda q, k, grid, key_mask: q.detach().numpy()[0], "returned q or a view"),
        (lambda q, k, grid, key_mask: {"set": {k[0]}}, "returned k or a view"),
        (lambda q, k, grid, key_mask: SimpleNamespace(inside=[q]), "returned q or a view"),
        (lambda q, k, grid, key_mask: (row for row in q), "returned a generator"),
        (lambda q, k, grid, key_mask: k.mul_(2).sum(), "wrote to k in place"),
    ],
)
def test_operations_that_hold_or_change_the_model_are_caught(operation, message, attached):
    transformer, arguments, module, grid = attached()
    module.processor = CorrespondenceProcessor(module.processor, grid, operation)
    with pytest.raises(ValueError, match=message):
        run(transformer, arguments)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (lambda q, k: q, r"<lambda>\(q, k\), which cannot be called with \(q, k, grid, key_mask\): too many"),
        (lambda q, k, grid, key_mask, scale: q, "missing a required argument: 'scale'"),
        (lambda *, q, k, grid, key_mask: q, "too many positional arguments"),
    ],
)
def test_an_operation_with_other_arguments_is_named_before_the_model_runs(operation, said):
    with pytest.raises(ValueError, match=f"operation 'mine' is .*{said}.*give a function of these four"):
        named_operations({"mine": operation})
    takes = {"some": lambda q, k, *further: q, "optional": lambda q, k, grid, mask, scale=1: q, "builtin": max}
    assert named_operations(takes) == takes


def test_results_of_other_kinds_are_passed_on(attached):
    transformer, arguments, module, grid = attached()
    cycle = SimpleNamespace()
    cycle.itself = cycle
    given = (None, 2.5, {"a"}, cycle, torch.eye(3).to_sparse(), torch.nn.Linear(1, 1), np.zeros(3), torch.zeros(0))
    module.processor = CorrespondenceProcessor(module.processor, grid, lambda *_: given)
    run(transformer, arguments)
    assert all(kept is one for kept, one in zip(module.processor.result[:4], given[:4], strict=True))


@pytest.mark.parametrize(("name", "other"), [("wan", "cogvideox"), ("mochi", "wan"), ("ltx", "hunyuanvideo")])
def test_the_processor_of_another_family_is_refused(name, other, attached, scores):
    transformer, arguments, module, grid = attached(name)
    foreign = attached(other)[2].processor
    module.processor = CorrespondenceProcessor(foreign, grid, scores)
    with pytest.raises(
        ValueError, match=f"{type(foreign).__name__} fails on this .*wrap the processor that the module"
    ):
        run(transformer, arguments)


def test_errors_of_an_operation_reach_the_caller_as_they_are(attached):
    transformer, arguments, module, grid = attached()
    module.processor = CorrespondenceProcessor(module.processor, grid, lambda q, k, grid, key_mask: q.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        run(transformer, arguments)


def test_a_graph_that_cannot_be_kept_is_said(attached):
    transformer, arguments, module, grid = attached()
    module.processor = CorrespondenceProcessor(module.processor, grid, lambda q, *_: q.mean(), keep_graph=True)
    with pytest.warns(UserWarning, match="runs without autograd"):
        run(transformer, arguments)


def test_results_keep_their_structure(attached):
    from dataclasses import dataclass
    from typing import NamedTuple

    class Pair(NamedTuple):
        left: torch.Tensor
        right: torch.Tensor

    @dataclass(frozen=True)
    class Summary:
        mean: torch.Tensor
        name: str

    transformer, arguments, module, grid = attached()
    module.processor = CorrespondenceProcessor(
        module.processor,
        grid,
        lambda q, k, grid, key_mask: (Pair(q.mean(), k.mean()), [Summary(q.std(), "q"), None]),
        keep_graph=False,
    )
    transformer(**arguments)
    pair, (summary, nothing) = module.processor.result
    assert isinstance(pair, Pair)
    assert summary.name == "q"
    assert nothing is None
    assert not (pair.left.requires_grad)
    assert not (summary.mean.requires_grad)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "_native_efficient"])
def test_attention_backends_that_call_sdpa(backend, attached, scores):
    from diffusers.models.attention_dispatch import attention_backend

    transformer, arguments, module, grid = attached("wan")
    reference = CorrespondenceProcessor(module.processor, grid, scores)
    module.processor = reference
    run(transformer, arguments)
    expected = reference.result
    transformer.set_attention_backend(backend)
    if backend == "_native_efficient":
        # This kernel exists on CUDA only; the processor must still have handed over what it was given.
        with pytest.raises(RuntimeError):
            run(transformer, arguments)
    else:
        run(transformer, arguments)
    assert torch.equal(module.processor.result, expected)
    transformer.reset_attention_backend()
    with attention_backend("native"):
        run(transformer, arguments)
    assert torch.equal(module.processor.result, expected)


def test_other_attention_backends_are_refused_by_name_where_they_cannot_be_seen(attached, scores):
    from diffusers.models.attention_dispatch import AttentionBackendName

    from corrdit import capture

    transformer, arguments, module, _grid = attached("ltx")

    class Own(type(module.processor)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    module.processor = Own()
    with torch.no_grad(), capture(transformer, layers=0, operation=scores) as captured:
        transformer(**arguments)
    assert captured[0, 0].isfinite().all()
    module.processor._attention_backend = AttentionBackendName.FLEX
    with (
        pytest.raises(
            ValueError, match=r"backend 'flex' does not go through .* Own does not call dispatch_attention_fn"
        ),
        capture(transformer, layers=0, operation=scores),
    ):
        run(transformer, arguments)


def test_a_backend_set_through_the_processor_reaches_the_inner_one(attached, scores):
    transformer, _arguments, module, grid = attached("wan")
    inner = module.processor
    module.processor = CorrespondenceProcessor(inner, grid, scores)
    transformer.set_attention_backend("_native_math")
    assert inner._attention_backend == "_native_math"


def test_a_processor_without_sdpa_is_refused(attached, scores):
    class MeanProcessor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return hidden_states.mean(dim=1, keepdim=True).expand_as(hidden_states)

    transformer, arguments, module, grid = attached("wan")
    module.processor = CorrespondenceProcessor(MeanProcessor(), grid, scores)
    with pytest.raises(ValueError, match=r"MeanProcessor did not call scaled_dot_product_attention .*seen 0 of 2"):
        run(transformer, arguments)


def test_an_attention_module_in_place_of_its_processor_is_refused(attached, scores):
    _, _, module, grid = attached("wan")
    with pytest.raises(ValueError, match=r"WanAttention is the attention module; give its \.processor"):
        CorrespondenceProcessor(module, grid, scores)


def test_copies_are_the_inner_processor(attached, scores):
    _, _, module, grid = attached("hunyuanvideo")
    processor = CorrespondenceProcessor(module.processor, grid, scores)
    assert type(copy.deepcopy(processor)) is type(module.processor)
    assert type(pickle.loads(pickle.dumps(processor))) is type(module.processor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, TokenGrid(1, 1, 1), print), "needs the attention processor it delegates to"),
        ((int, TokenGrid(1, 1, 1), print), "needs the attention processor it delegates to"),
        ((print, (1, 2, 3), print), "needs a TokenGrid"),
        ((print, TokenGrid(1, 1, 1), "softmax"), "must be a function"),
        ((print, TokenGrid(1, 1, 1), None), "must be a function"),
        ((print, None, print), "needs a TokenGrid"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CorrespondenceProcessor(*arguments)
