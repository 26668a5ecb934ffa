"""corrdit's kernels on fake tensors: their host functions run and make what they make, and launch nothing.

Work is the least that the operation needs: each product of queries and keys once forward, three times backward (the
scores again, and the gradients in both). The kernels may do more.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from corrdit.kernels.requirements import planned_gpu

ARCHITECTURE = "9.0"
"""Whose tiles are taken. A few tables of the kernels' workspace have the size of a tile."""


def kernel_functions() -> dict[str, Callable[..., Any]]:
    """The host function by operator; empty where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from corrdit.kernels.displacement import soft
    from corrdit.kernels.frame_local import attention
    from corrdit.kernels.matching import costs, hard, mass, match

    functions: tuple[Callable[..., Any], ...] = (
        soft.compute_soft_displacement,
        soft.compute_soft_displacement_backward,
        attention.compute_frame_local_attention,
        attention.compute_frame_local_attention_backward,
        hard.compute_hard_displacement,
        match.compute_match,
        costs.compute_cost_rows,
        mass.compute_attention_mass,
    )
    return {f"corrdit::{function.__name__.removeprefix('compute_')}": function for function in functions}


def _pairs_of_frames(q: Tensor, pairs: list[int], height: int, width: int) -> float:
    batch, heads, _, channels = q.shape
    return 2.0 * batch * heads * channels * (height * width) ** 2 * (len(pairs) // 2)


def _rows(q: Tensor, k: Tensor, tokens: Tensor, *options: object) -> float:
    batch, heads, count, channels = k.shape
    return 2.0 * batch * heads * channels * count * tokens.shape[-1]


def _attention(q: Tensor, k: Tensor, *options: object) -> float:
    batch, heads, count, channels = q.shape
    return 4.0 * batch * heads * channels * count * k.shape[2]


KERNEL_FLOP: dict[str, Callable[..., float]] = {
    "corrdit::soft_displacement": lambda q, k, w, m, c, pairs, qs, ks, h, wd, *o: _pairs_of_frames(q, pairs, h, wd),
    "corrdit::soft_displacement_backward": lambda g, level, q, k, w, m, c, d, s, pairs, qs, ks, h, wd, *o: (
        3 * _pairs_of_frames(q, pairs, h, wd)
    ),
    "corrdit::hard_displacement": lambda q, k, w, m, c, pairs, qs, ks, h, wd, *o: _pairs_of_frames(q, pairs, h, wd),
    "corrdit::match": lambda q, k, w, m, pairs, qs, ks, h, wd, *o: _pairs_of_frames(q, pairs, h, wd),
    "corrdit::cost_rows": _rows,
    "corrdit::attention_mass": _rows,
    "corrdit::frame_local_attention": _attention,
    "corrdit::frame_local_attention_backward": lambda gradient, level, q, k, *options: 2.5 * _attention(q, k),
}
"""Floating-point operations by operator, from its arguments."""


@contextlib.contextmanager
def kernels_planned() -> Iterator[None]:
    """Inside, `backend="auto"` takes the kernels and their launches do nothing; streaming where there is no triton."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from corrdit.kernels.shared.launch import compile_only

    with planned_gpu(), compile_only(ARCHITECTURE, _launch_nothing):
        yield


def _launch_nothing(*arguments: object) -> None:
    """What stands for a launch."""
