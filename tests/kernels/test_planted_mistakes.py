"""Each kernel with a mistake planted in it turns its test red: the tests can fail."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from corrdit import TokenGrid
from corrdit.benchmark.kernel_cases import cases
from corrdit.benchmark.kernel_check import attempt
from corrdit.kernels.displacement import folded, folded_backward, gradient_rows, soft_backward, soft_forward
from corrdit.kernels.frame_local import backward as frame_local_backward
from corrdit.kernels.frame_local import forward as frame_local_forward
from corrdit.kernels.frame_local import layout as frame_local_layout
from corrdit.kernels.matching import best_match, best_product, correspondence, refinement, token_rows
from corrdit.kernels.shared import primitives, windows

pytestmark = pytest.mark.slow
TEXT = TokenGrid(2, 3, 6, text_tokens=19)
LOCAL = {"mode": None, "grid": TokenGrid(3, 1, 6, text_tokens=3), "kept": 0.7, "heads": 1}
WIDE = {"window": 1, "grid": TokenGrid(2, 5, 7), "pairs": ((1, 0),)}
# Parts of both axes with ends inside frames, and a head of k for each two of q.
SHARED = {
    "heads": 4,
    "key_heads": 2,
    "grid": TokenGrid(3, 3, 7),
    "queries": (25, 40),
    "keys": (8, 60),
    "pairs": ((1, 0), (1, 2)),
}
SOFT = "soft_displacement"
ZEROED = {**LOCAL, "options": {"renormalize": False, "span": 0}}
KEPT = {**LOCAL, "options": {"renormalize": True, "span": 0}}
MATCH = {"mode": "probabilities", "options": {"bidirectional": True, "refine": 0, "positional": [1, [0]]}}
REFINE = {"mode": "probabilities", "options": {"bidirectional": True, "refine": 1, "positional": [1, [0]]}}
ROWS = {"mode": "probabilities", "options": {"bidirectional": True, "source": 1, "positional": [torch.tensor([17, 3])]}}
MASS = {"mode": "probabilities", "grid": TEXT, "options": {"source": 1, "positional": [torch.tensor([17, 3])]}}

# (module, function, what stands there, what is planted, operation, case): one row a mistake.
PLANTED: list[tuple[Any, str, str, str, str, dict[str, Any]]] = [
    (primitives, "accumulate_moments", "moments * shrink[:, None]", "moments", SOFT, {}),
    (primitives, "raise_peak", "tl.exp2(peak * scale - shift)", "tl.exp2(peak - shift)", SOFT, {}),
    (primitives, "log_sum_exp", "shift + tl.log2", "tl.log2", SOFT, {}),
    (primitives, "gradient_planes", "lanes % 3 == 1, x[:, None], y[:, None]", "lanes % 3 == 1, y[:, None], x[:, None]",
     SOFT, {}),
    (windows, "in_window", "(highest - code)", "(code - lowest)", SOFT, {"window": 1}),
    (windows, "covering_tiles", "highest + radius + 1", "highest + radius", SOFT, WIDE),
    (windows, "tile_corner", "top + down *", "top + 0 *", SOFT, WIDE),
    (windows, "tile_corner", "tile + 1", "tile", SOFT, WIDE),
    (windows, "window_bounds", "tl.minimum(center_x + radius, width - 1)", "center_x + radius", SOFT,
     {**WIDE, "window": 2}),
    (windows, "seen_keys", "tl.where(kept, codes, _OUTSIDE)", "codes", SOFT, {"window": 1, "kept": 0.6}),
    (windows, "block_tokens", "place // ACROSS) * width", "place // ACROSS) * width + width", SOFT, WIDE),
    (soft_forward, "store_displacement", "lane(moments, 1)", "lane(moments, 2)", SOFT, {}),
    (primitives, "load_allowed", "kept & tl.load", "kept | tl.load", SOFT, {"kept": 0.6}),
    (primitives, "gradient_shift", "statistics - tl.where", "statistics + tl.where", SOFT, {}),
    (windows, "held_tokens", "stop - 1", "stop", SOFT, {}),
    (soft_forward, "soft_forward_kernel", "head // group", "head * 0", SOFT, {**SHARED, "pairs": ((1, 0),)}),
    (soft_forward, "soft_forward_kernel", "k_first + bulk + columns", "bulk + columns", SOFT, SHARED),
    (soft_forward, "soft_forward_kernel", "k_place * k_strides[2]", "k_first * k_strides[2]", SOFT, SHARED),
    (soft_backward, "soft_backward_key_kernel", "turn % group", "turn % group * 0", SOFT, SHARED),
    (soft_backward, "soft_backward_key_kernel", "row_next = q_frame + wide(q_first)", "row_next = q_frame + wide(0)",
     SOFT, {**SHARED, "queries": (22, 42)}),
    (soft_backward, "soft_backward_query_kernel", "k_first + bulk + columns", "bulk + columns", SOFT,
     SHARED),
    (gradient_rows, "gradient_rows_kernel", "other=0.0) * LOG2_E_CONSTANT", "other=0.0)", SOFT,
     {**SHARED, "with_lse": True}),
    (soft_backward, "guarded_queries", "tl.where(seen, dlogit, 0.0)", "dlogit", SOFT,
     {"window": 1, "undefined_key": True}),
    (primitives, "head_scores", "head // k_group", "head * 0", SOFT, {**SHARED, "mode": "logits"}),
    (folded_backward, "folded_gradient_kernel", "(k_place - first_column)", "(k_place * 0)", SOFT,
     {**SHARED, "mode": "logits"}),
    (folded_backward, "folded_gradient_kernel", "tl.where(seen, dlogit, 0.0)", "dlogit", SOFT,
     {"window": 1, "undefined_key": True, "mode": "logits"}),
    (soft_forward, "soft_forward_kernel", "wide(batch) * mask_strides[0]", "wide(batch) * 0", SOFT,
     {"kept": 0.6, "batch": 2, "heads": 1, "pairs": ((1, 0),)}),
    (soft_forward, "soft_forward_kernel", "scores = ahead", "scores = scores", SOFT, {"pairs": ((1, 0),),
     "grid": TokenGrid(2, 5, 7)}),
    (soft_forward, "soft_forward_kernel", "(first - BLOCK_N) * COORDINATE_LANES", "first * COORDINATE_LANES", SOFT,
     {"pairs": ((1, 0),), "grid": TokenGrid(2, 5, 7)}),
    (soft_forward, "soft_forward_kernel", "(bulk - BLOCK_N) * COORDINATE_LANES", "(bulk - BLOCK_N) * 0", SOFT,
     {"pairs": ((1, 0),), "grid": TokenGrid(2, 5, 7)}),
    (primitives, "weighted_scale", "scale * tl.load(common)", "scale", SOFT,
     {"mode": "logits", "weights": (0.8, 0.2), "pairs": ((1, 0),)}),
    (soft_backward, "soft_backward_query_kernel", "accumulator * (logit_scale * gradient_range)",
     "accumulator * gradient_range", SOFT, {}),
    (soft_backward, "soft_backward_key_kernel", "accumulator * (logit_scale * gradient_range)",
     "accumulator * logit_scale", SOFT, {}),
    (soft_backward, "soft_backward_query_kernel", "inside, mask_strides[1]", "inside, mask_strides[1] * 2", SOFT,
     {"kept": 0.6}),
    (soft_backward, "soft_backward_key_kernel", "lowest - corner", "lowest", SOFT, WIDE),
    (gradient_rows, "gradient_rows_kernel", "mean_x, mean_y, of_level)", "mean_y, mean_x, of_level)", SOFT, {}),
    (folded, "folded_forward_kernel", "scale, width, rows", "scale * 2, width, rows", SOFT,
     {"mode": "logits"}),
    (folded, "frame_rows", "<= places", "< places", SOFT, {"mode": "logits", "pairs": ((0, 0), (1, 0))}),
    (folded, "add_stretch", "count, k_first)", "count, 0)", SOFT, {**SHARED, "mode": "logits"}),
    (windows, "stretch_tokens", "place < count", "place < count - 1", SOFT, {"kept": 0.6}),
    (folded, "folded_forward_kernel", "kept_rows, bulk, count", "kept_rows, bulk, bulk", SOFT, {"mode": "logits"}),
    (folded_backward, "folded_gradient_kernel", "k + k_place * k_strides[2]", "k", SOFT,
     {"mode": "logits", "pairs": ((0, 0), (0, 1))}),
    (primitives, "head_scores", "index // chunks", "index // chunks * 0", SOFT, {"mode": "logits"}),
    (primitives, "better_match", "tile_best > best", "tile_best < best", "hard_displacement", {}),
    (best_product, "best_product_kernel", "place_code(x, y)", "place_code(x, y * 0)", "hard_displacement", WIDE),
    (best_product, "best_product_kernel", "tl.where(seen, scores, float(\"-inf\"))", "scores", "hard_displacement",
     {"kept": 0.5}),
    (best_product, "best_product_kernel", "scores <= best", "scores >= best", "hard_displacement", {}),
    (best_match, "best_match_kernel", "allowed[None, :]", "(columns >= 0)[None, :]", "hard_displacement",
     {"mode": "probabilities", "kept": 0.0}),
    (correspondence, "cost_tile", "share * 0.5", "share", "match", MATCH),
    (correspondence, "cost_tile", "allowed_rows[:, None], weights, 0.0", "allowed_rows[:, None], weights, weights",
     "match", {**MATCH, "kept": 0.6}),
    (correspondence, "cost_tile", "level[None, :]", "level[None, :] * 0", "match", MATCH),
    (refinement, "refinement_kernel", "sum_y / divisor", "sum_x / divisor", "match", REFINE),
    (token_rows, "cost_rows_kernel", "frame_k + columns", "columns", "cost_rows", ROWS),
    (token_rows, "row_statistics_kernel", "total * shrink", "total", "attention_mass", MASS),
    (token_rows, "row_statistics_kernel", "tl.where(allowed[None, :], scores", "tl.where(kept_rows[:, None], scores",
     "attention_mass", MASS),
    (token_rows, "attention_mass_kernel", "allowed[None, :], weights, 0.0", "allowed[None, :], weights, weights",
     "attention_mass", MASS),
    (token_rows, "attention_mass_kernel", "tl.maximum(peak, tl.max(weights, 1))", "tl.max(weights, 1)",
     "attention_mass", MASS),
    (frame_local_forward, "attend", "mean * shrink[:, None]", "mean", "frame_local_attention", KEPT),
    (frame_local_layout, "visible_runs", "part + 1", "part + 2", "frame_local_attention", KEPT),
    (frame_local_backward, "local_backward_key_kernel", "turn % group", "turn % group * 0", "frame_local_attention",
     {**KEPT, "heads": 2, "key_heads": 1}),
    (frame_local_backward, "add_keys", "- delta[:, None])", ")", "frame_local_attention", KEPT),
    (frame_local_backward, "local_backward_key_kernel", "logit_scale * gradient_range", "gradient_range",
     "frame_local_attention", KEPT),
    (frame_local_backward, "local_backward_key_kernel", "sum_v * gradient_range", "sum_v", "frame_local_attention",
     {**KEPT, "dtype": torch.float16}),
    (frame_local_backward, "local_backward_query_kernel", "+ head // group", "+ head", "frame_local_attention",
     {**KEPT, "dtype": torch.float16, "heads": 2, "key_heads": 1, "batch": 2}),
    (frame_local_backward, "add_queries", "- delta[None, :])", ")", "frame_local_attention", KEPT),
    (frame_local_backward, "add_queries", "-weights * delta", "weights * delta", "frame_local_attention",
     ZEROED),
    (frame_local_backward, "add_queries", "gradient_tile, sum_v, PRECISION", "gradient_tile, sum_k, PRECISION",
     "frame_local_attention", KEPT),
]  # fmt: skip


# One a kernel, and one of what the others share.
OF_EACH_KERNEL = list(
    {
        row[1]: row for row in reversed(PLANTED) if row[1].endswith("_kernel") or row[1] in ("attend", "cost_tile")
    }.values()
)


def with_mistake(module: Any, name: str, sound: str, planted: str) -> tuple[Any, Any]:
    """The Python function of an interpreted kernel, and what stands for it with the mistake."""
    from triton.runtime.interpreter import FunctionRewriter

    function = getattr(module, name)
    lines, _ = inspect.getsourcelines(function.fn)
    rewriter = FunctionRewriter(function.fn, **function.kwargs)
    rewriter.filename, rewriter.def_file_lineno = rewriter._get_jit_fn_file_line()
    rewriter.def_lineno = rewriter._find_def(lines)
    source = rewriter._prepare_source(lines)
    assert sound in source, f"{name} has no {sound!r} any more; plant the mistake where it is now"
    return function.fn, rewriter._compile_and_exec(rewriter._transform_ast(source.replace(sound, planted)))


@pytest.mark.parametrize("row", PLANTED, ids=lambda row: f"{row[1]}: {row[3]}")
def test_a_planted_mistake_is_found(check, case, monkeypatch, row):
    from triton.runtime.interpreter import InterpretedFunction

    *planted, operation, pinned = row
    function, changed = with_mistake(*planted)
    gradients = operation in ("soft_displacement", "frame_local_attention")
    check(operation, case(**pinned), gradients)
    monkeypatch.setitem(InterpretedFunction.rewritten_fn, function, changed)
    with pytest.raises(AssertionError):
        check(operation, case(**pinned), gradients)


@pytest.mark.parametrize("row", OF_EACH_KERNEL, ids=lambda row: f"{row[1]}: {row[3]}")
def test_the_check_of_a_new_machine_finds_a_planted_mistake(monkeypatch, row):
    from triton.runtime.interpreter import InterpretedFunction

    *planted, operation, _ = row
    function, changed = with_mistake(*planted)
    monkeypatch.setitem(InterpretedFunction.rewritten_fn, function, changed)
    mine = (case for case in cases(torch.device("cpu")) if case.operation == operation)
    assert any(attempt(case, torch.device("cpu")).wrong for case in mine)
