"""Tile primitives shared by all kernels: one small jitted function for each idea.

Shapes in the comments: M query rows, N key columns and D padded head_dim of a tile. Scores are raw products q.k in
float32; `scale` carries scale * temperature * log2(e) and is above 0, so that exponentials are `exp2` with one fused
multiply-add. A removed key has score -inf; the log-sum-exp of a row without keys is +inf, which makes its weights 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
COORDINATE_LANES = tl.constexpr(16)
GRADIENT_LANES = tl.constexpr(8)
_SMALLEST_NORMAL = tl.constexpr(1.1754944e-38)
_NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def wide(index):
    """An index as int64, for offsets that may pass 2**31."""
    return tl.cast(index, tl.int64)


@triton.jit
def query_frame(pairs, pair):
    """(place, first token, stop) of what q holds of the query frame, and the place of the rows, of an entry of `pairs`.

    Places, of token 0 of the frame, are int64; see `corrdit.kernels.shared.tables`.
    """
    entry = pairs + 8 * pair
    return wide(tl.load(entry)), tl.load(entry + 1), tl.load(entry + 2), wide(tl.load(entry + 6))


@triton.jit
def key_frame(pairs, pair):
    """(place, first token, stop) of what k holds of the key frame."""
    entry = pairs + 8 * pair + 3
    return wide(tl.load(entry)), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def held_frame(frames, frame):
    """(place, first token, stop) of what a tensor holds of a frame."""
    entry = frames + 3 * frame
    return wide(tl.load(entry)), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator `[M, N]` float32 + a `[M, K]` @ b `[K, N]`, on tensor cores for 16-bit operands."""
    if INTERPRETED:
        # The interpreter's tl.dot multiplies the raw bits of bfloat16.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a `[M, K]` @ b `[K, N]` in float32. A first accumulator of zeros would cost registers and synchronisation."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_tile(pointer, tokens, dims, strides, kept, GUARD: tl.constexpr, D: tl.constexpr):
    """`[T, D]` tile of one head: rows `tokens [T]`, columns `dims [D]`; what is not `kept [T]` or past D reads as 0.

    Args:
        strides: element strides (batch, head, token, dim) of the tensor.
        GUARD: whether `kept` is looked at.
        D: the true head_dim; columns past it are padding.
    """
    # int64: a token offset may pass 2**31 in a large or oddly strided tensor.
    pointers = pointer + wide(tokens)[:, None] * strides[2] + wide(dims)[None, :] * strides[3]
    if GUARD:
        return tl.load(pointers, mask=kept[:, None] & (dims < D)[None, :], other=0.0)
    elif tl.constexpr(D) % dims.shape[0] != 0:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_tile(pointer, tile, tokens, dims, strides, kept, D: tl.constexpr):
    """Writes the `kept` rows and the first D columns of a `[T, D]` tile."""
    pointers = pointer + wide(tokens)[:, None] * strides[2] + wide(dims)[None, :] * strides[3]
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=kept[:, None] & (dims < D)[None, :])


@triton.jit
def load_allowed(key_mask, tokens, kept, mask_stride, HAS_MASK: tl.constexpr):
    """`[T]` which of the tokens may be attended."""
    if HAS_MASK:
        return kept & tl.load(key_mask + wide(tokens) * mask_stride, mask=kept, other=0).to(tl.int1)
    else:
        return kept


@triton.jit
def coordinate_tile(table, tokens, kept, GUARD: tl.constexpr):
    """`[N, 16]` rows (1, x, y, 1, x, y, 0, ...) of the coordinate table; see `corrdit.kernels.shared.tables`."""
    pointers = table + tokens[:, None] * COORDINATE_LANES + tl.arange(0, COORDINATE_LANES)[None, :]
    if GUARD:
        return tl.load(pointers, mask=kept[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def lane(moments, index: tl.constexpr):
    """Column `index` of a `[M, 16]` tile, as `[M]`."""
    lanes = tl.arange(0, COORDINATE_LANES)
    # A product, not a selection: where the other lanes are never read, ptxas finds no registers to keep their matrix
    # products in flight and serialises every wgmma of the kernel.
    return tl.sum(moments * (lanes == index).to(tl.float32)[None, :], 1)


@triton.jit
def raise_peak(peak, scores, scale):
    """One step of the online softmax.

    Returns:
        The new running maximum `[M]` of the raw scores, the shift `[M]` of the exponent, and the factor `[M]` by which
        what was accumulated under the old maximum shrinks.
    """
    raised = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet keeps a finite shift, or its exponent would be inf - inf.
    shift = tl.where(raised == float("-inf"), 0.0, raised) * scale
    return raised, shift, tl.exp2(peak * scale - shift)


@triton.jit
def exponentials(scores, scale, shift):
    """exp2(scale * scores - shift): the softmax where `shift` (`[M, 1]`, or `[1, M]` for transposed scores) is the
    log-sum-exp in base 2."""
    return tl.exp2(scores * scale - shift)


@triton.jit
def accumulate_moments(peak, moments, scores, scale, coordinates, PRECISION: tl.constexpr):
    """Adds one tile of keys to the running (sum of weights, sum of weights * x, sum of weights * y) `[M, 16]`.

    The sums are one more matrix product, so the floating-point units only scale, exponentiate and take maxima.
    """
    peak, shift, shrink = raise_peak(peak, scores, scale)
    weights = exponentials(scores, scale, shift[:, None]).to(coordinates.dtype)
    return peak, multiply(weights, coordinates, moments * shrink[:, None], PRECISION)


@triton.jit
def log_sum_exp(peak, total, scale):
    """`[M]` base-2 log-sum-exp of the scaled scores; +inf for a row without keys."""
    shift = tl.where(peak == float("-inf"), 0.0, peak) * scale
    return tl.where(total == 0.0, float("inf"), shift + tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def gradient_planes(grad_x, grad_y, mean_x, mean_y, grad_level):
    """What the product with coordinate rows (1, x, y, 1, x, y, 0, 0) needs to give (g.(p' - e) + l) / norm.

    float16 keeps eleven bits, so each number is held as its rounding (lanes 0 to 2) and the rest (lanes 3 to 5).

    Args:
        grad_x, grad_y: `[M]` gradient g of the displacement.
        mean_x, mean_y: `[M]` expected position e. grad_level: `[M]` gradient l of the log-sum-exp.

    Returns:
        planes `[M, 8]` float32 and norm `[M]`, the largest of |g_x|, |g_y| and |l|; rows of norm 0 give zeros.
    """
    norm = tl.maximum(tl.maximum(tl.abs(grad_x), tl.abs(grad_y)), tl.abs(grad_level))
    divisor = tl.where(norm < _SMALLEST_NORMAL, 1.0, norm)
    x = grad_x / divisor
    y = grad_y / divisor
    constant = grad_level / divisor - (x * mean_x + y * mean_y)
    lanes = tl.arange(0, GRADIENT_LANES)[None, :]
    exact = tl.where(lanes % 3 == 0, constant[:, None], tl.where(lanes % 3 == 1, x[:, None], y[:, None]))
    rounded = exact.to(tl.float16).to(tl.float32)
    return tl.where(lanes < 3, rounded, tl.where(lanes < 6, exact - rounded, 0.0)), norm


@triton.jit
def gradient_shift(statistics, norm, gradient_range):
    """`[M]` log-sum-exp less the logarithm of norm / gradient_range.

    In the exponent of the softmax the size of a row's gradient costs nothing for an element, and dlogit, relative to
    the largest gradient, keeps within float16's range.
    """
    flat = norm < _SMALLEST_NORMAL
    return statistics - tl.where(flat, float("-inf"), tl.log2(tl.where(flat, 1.0, norm / gradient_range)))


@triton.jit
def head_scores(
    q, k, q_tokens, k_tokens, q_kept, k_kept, q_strides, k_strides, q_group, k_group, first_head, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[M, N]` raw scores summed over `heads` heads from `first_head` on: one product over the folded axis heads * D.

    Args:
        q, k: pointers to the batch entry; the head and dim axes are walked by their strides, nothing is copied.
        q_group, k_group: how many heads share one head of q, or of k.
    """
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    scores = tl.zeros([q_tokens.shape[0], k_tokens.shape[0]], tl.float32)
    for index in range(0, heads * chunks):
        head = first_head + index // chunks
        dims = (index % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
        q_tile = load_tile(q + wide(head // q_group) * q_strides[1], q_tokens, dims, q_strides, q_kept, GUARD, D)
        k_tile = load_tile(k + wide(head // k_group) * k_strides[1], k_tokens, dims, k_strides, k_kept, GUARD, D)
        scores = multiply(q_tile, tl.trans(k_tile), scores, PRECISION)
    return scores


@triton.jit
def weighted_scale(scale, common, WEIGHTED: tl.constexpr):
    """The factor of scores of `weighted_queries`, with the one number that its heads have in common."""
    if WEIGHTED:
        return scale * tl.load(common)
    else:
        return scale


@triton.jit
def is_nan(values):
    return values != values  # noqa: PLR0124


@triton.jit
def all_defined(tile):
    """`[T]` which rows of a `[T, D]` tile hold neither NaN nor infinity."""
    return tl.min((tl.abs(tile.to(tl.float32)) < float("inf")).to(tl.int32), 1) > 0


@triton.jit
def better_match(best, best_token, undefined_token, scores, tokens, kept):
    """One step of the running argmax with the rules of `torch.argmax`: lowest index of equals, the first NaN wins.

    Args:
        best: `[M]` largest score so far, -inf at the start.
        best_token: `[M]` its token; undefined_token: `[M]` the first token of a NaN score; both start at `no_token()`.
        scores: `[M, N]`; tokens: `[M or 1, N]`, in any order; kept: `[M or 1, N]`.
    """
    undefined = is_nan(scores) & kept
    kept = kept & (undefined == 0)
    candidates = tl.where(kept, scores, float("-inf"))
    tile_best = tl.max(candidates, 1)
    first = tl.min(tl.where(kept & (candidates == tile_best[:, None]), tokens, _NO_TOKEN), 1)
    undefined_token = tl.minimum(undefined_token, tl.min(tl.where(undefined, tokens, _NO_TOKEN), 1))
    # A first token stands even at -inf: every allowed score may be -inf.
    improved = (tile_best > best) | ((tile_best == best) & (first < best_token))
    return tl.where(improved, tile_best, best), tl.where(improved, first, best_token), undefined_token


@triton.jit
def no_token(count: tl.constexpr):
    """`[count]` of the index that stands for no token at all."""
    return tl.full([count], _NO_TOKEN, tl.int32)
