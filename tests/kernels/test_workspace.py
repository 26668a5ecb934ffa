"""Memory of the kernels' host functions at the shapes of published models, on tensors without any: bytes, not time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeGuard

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corrdit.kernels.displacement.soft import compute_soft_displacement, compute_soft_displacement_backward
from corrdit.kernels.frame_local.attention import compute_frame_local_attention, compute_frame_local_attention_backward
from corrdit.kernels.matching.costs import compute_cost_rows
from corrdit.kernels.matching.hard import compute_hard_displacement
from corrdit.kernels.matching.mass import compute_attention_mass
from corrdit.kernels.matching.match import compute_match
from corrdit.kernels.shared import launch
from corrdit.kernels.shared.tables import whole_frames

MIB = 2**20
# heads, head_dim, frames, height, width
SHAPES = {
    "6-frames-720p": (24, 128, 6, 45, 80),
    "cogvideox-5b": (48, 64, 13, 30, 45),
    "wan-14b-720p": (40, 128, 21, 45, 80),
    "hunyuanvideo-720p": (24, 128, 33, 45, 80),
}
EVERY_SHAPE = pytest.mark.parametrize(
    "shape", ["6-frames-720p", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SHAPES)[1:])]
)


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that exist at once, of those made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((arguments, options)) if is_tensor(tensor)}
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in given and key not in self._users:
                continue  # a view of something that was there before
            if key not in self._users:
                self._users[key] = 0
                self.live += size
                self.peak = max(self.peak, self.live)
            self._users[key] += 1
            weakref.finalize(tensor, self._leave, key, size)
        return result

    def _leave(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


def is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def extra_bytes(work: Callable[[], Any]) -> int:
    """Peak of what `work` allocates, less what it returns."""
    with launch.compile_only("9.0", lambda *launched: None), Allocations() as allocations:
        results = work()
    outputs = [results] if isinstance(results, Tensor) else list(results)
    return allocations.peak - sum(output.untyped_storage().nbytes() for output in outputs)


def scene(shape: str, count: int = 2) -> tuple[list[Tensor], tuple[int, int, int]]:
    heads, head_dim, frames, height, width = SHAPES[shape]
    size = (1, frames * height * width, heads, head_dim)
    return [torch.empty(size, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(count)], (
        frames, height, width,
    )  # fmt: skip


def whole(frames: int, height: int, width: int) -> tuple[list[int], list[int], int, int]:
    """What q and k hold of every frame, height and width."""
    return whole_frames(frames, height * width), whole_frames(frames, height * width), height, width


@EVERY_SHAPE
@pytest.mark.parametrize("folded_heads", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_soft_displacement_takes_a_fixed_workspace_and_sums(shape, folded_heads, masked):
    (q, k), (frames, height, width) = scene(shape)
    pairs = [frame for i in range(frames) for j in range(frames) for frame in (i, j)]
    mask = torch.empty(1, q.shape[2], dtype=torch.bool, device="meta") if masked else None
    options = (pairs, *whole(frames, height, width), folded_heads, 0.1, -1, "ieee")
    # Less than a single score map of a head and a pair of frames.
    assert extra_bytes(lambda: compute_soft_displacement(q, k, None, mask, None, *options)) <= 4 * MIB
    moved, statistics = compute(compute_soft_displacement, q, k, None, mask, None, *options)
    gradient = torch.empty_like(moved)
    backward = extra_bytes(
        lambda: compute_soft_displacement_backward(
            gradient, None, q, k, None, mask, None, moved, statistics, *options, [True, True]
        )
    )
    # Gradient planes and shift of each row.
    allowed = 22 * statistics.numel() + 8 * MIB
    if folded_heads:
        sums, keys = 2 * 4 * q.numel(), 2 * k.numel()
        allowed += 32 * MIB + sums + (2 + masked) * keys
    assert backward <= allowed


def test_weights_of_averaged_logits_take_one_copy_of_the_queries():
    (q, k), (frames, height, width) = scene("6-frames-720p")
    weights = torch.empty(q.shape[1], device="meta")
    options = ([0, 1], *whole(frames, height, width))
    copy = 2 * q.numel() + 4 * MIB
    soft = (weights, None, None, *options, True, 0.1, -1, "ieee")
    assert extra_bytes(lambda: compute_soft_displacement(q, k, *soft)) <= copy
    matched = (weights, None, *options, "logits", 0.1, True, 1, "ieee")
    assert extra_bytes(lambda: compute_match(q, k, *matched)) <= copy


def compute(function: Callable[..., Any], *arguments: Any) -> Any:
    with launch.compile_only("9.0", lambda *launched: None):
        return function(*arguments)


@EVERY_SHAPE
@pytest.mark.parametrize("heads", ["logits", "probabilities", "none"])
def test_matching_and_measures_take_numbers_of_tokens_and_heads(shape, heads):
    (q, k), (frames, height, width) = scene(shape)
    head_count, tokens = q.shape[1], q.shape[2]
    pairs = [frame for target in range(1, frames) for frame in (0, target)]
    chosen = torch.empty(256, dtype=torch.int64, device="meta")
    log_sums = 4 * head_count * tokens
    held = whole(frames, height, width)
    segments = [0, 0, *(number for frame in range(frames) for number in (frame * height * width, height * width))]
    assert extra_bytes(
        lambda: compute_match(q, k, None, None, pairs, *held, heads, 0.1, True, 1, "ieee")
    ) <= 8 * log_sums + 4 * MIB  # fmt: skip
    assert extra_bytes(
        lambda: compute_hard_displacement(q, k, None, None, None, pairs, *held, heads, 0.1, -1, "ieee")
    ) <= 12 * log_sums + 4 * MIB  # fmt: skip
    assert extra_bytes(
        lambda: compute_cost_rows(q, k, chosen, None, None, 0, *held, heads, 0.1, True, "ieee")
    ) <= 8 * log_sums + 4 * MIB  # fmt: skip
    assert extra_bytes(
        lambda: compute_attention_mass(q, k, chosen, None, None, 0, segments, heads, 0.1, "ieee")
    ) <= 4 * MIB  # fmt: skip


@EVERY_SHAPE
@pytest.mark.parametrize("renormalize", [True, False])
def test_frame_local_attention_takes_a_number_for_each_row(shape, renormalize):
    (q, k, v), (frames, height, width) = scene(shape, 3)
    limits = [place * height * width for frame in range(frames) for place in (frame, frame + 1)]
    layout = ([0, 0, *limits], [0, 0, *limits], 0)
    assert extra_bytes(lambda: compute_frame_local_attention(q, k, v, None, *layout, 0.1, renormalize, "ieee")) == 0
    attended, statistics = compute(compute_frame_local_attention, q, k, v, None, *layout, 0.1, renormalize, "ieee")
    gradient = torch.empty_like(attended)
    backward = extra_bytes(
        lambda: compute_frame_local_attention_backward(
            gradient, None, q, k, v, None, attended, statistics, *layout, 0.1, renormalize, "ieee", [True] * 3
        )
    )
    assert backward <= 2 * 4 * q.numel() + 4 * statistics.numel() + 4 * MIB
