"""The kernels against numbers computed with the released code of DiTFlow and DiffTrack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from corrdit import TokenGrid, ops

pytestmark = pytest.mark.usefixtures("large_tiles")
TEXT_TOKENS = 226  # DiTFlow's code cuts off this many


def standard_normal(seed: int, *shape: int, factor: float = 1.0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(tuple(int(n) for n in shape), dtype=np.float32)
    return torch.from_numpy(values) * factor


def assert_close(result: Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Largest error over largest value, the measure the released numbers are exact in."""
    wanted = torch.as_tensor(expected)
    assert result.shape == wanted.shape
    error = float((result.detach() - wanted).abs().max())
    assert error <= tolerance * float(wanted.abs().max()), f"error {error:.3g}"


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_motion_flow_of_ditflow(golden, case):
    numbers = golden("amf")
    heads, head_dim, frames, height, width, seed = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, height, width, text_tokens=TEXT_TOKENS, text_first=True)
    q, k = (standard_normal(s, 1, heads, grid.tokens, head_dim).requires_grad_() for s in (seed, seed + 100))
    options = {"heads": "logits", "temperature": float(numbers[f"{case}_temp"]), "backend": "triton"}
    flat = ops.soft_displacement(q * 2, k * 2, grid, **options).reshape(frames * frames, height * width, 2)
    assert_close(flat, numbers[f"{case}_soft"], 1e-5)
    hard = ops.hard_displacement(q * 2, k * 2, grid, **options)
    assert torch.equal(hard.reshape(flat.shape), torch.from_numpy(numbers[f"{case}_hard"]).long())
    dq, dk = torch.autograd.grad((flat * standard_normal(seed + 200, *flat.shape)).sum(), (q, k))
    assert_close(dq[:, :, grid.video_slice], numbers[f"{case}_dq"], 1e-4)
    assert_close(dk[:, :, grid.video_slice], numbers[f"{case}_dk"], 1e-4)
    assert not dq[:, :, grid.text_slice].any()


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_matching_of_difftrack(golden, case):
    numbers = golden("difftrack_match")
    heads, head_dim, frames, height, width, seed, _ = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, height, width)
    q, k = (
        standard_normal(s, 1, heads, frames, height * width, head_dim, factor=2.0).flatten(2, 3)
        for s in (seed, seed + 100)
    )
    for scaling, scale in (("headdim", head_dim**-0.5), ("numheads", heads**-0.5)):
        found = ops.match(q, k, grid, source=0, scale=scale, backend="triton")
        expected = torch.from_numpy(numbers[f"{case}_{scaling}_match_xy"])  # [target, batch, (x, y), row, column]
        found_token = (found.xy[..., 1] * width + found.xy[..., 0]).long().flatten(-2)
        expected_token = (expected[:, :, 1] * width + expected[:, :, 0]).long().permute(1, 0, 2, 3).flatten(-2)
        rows = ops.cost_rows(q, k, grid, range(height * width), source=0, scale=scale, backend="triton")
        corr = numbers[f"{case}_{scaling}_corr"]  # [target, batch, target token, source row, column]
        assert_close(rows[:, :, 1:].flatten(-2).permute(2, 0, 3, 1).reshape(corr.shape), corr, 1e-5)
        cost = torch.from_numpy(corr).flatten(-2).permute(1, 0, 3, 2)  # [batch, target, source token, target token]
        lost = cost.gather(-1, expected_token[..., None]) - cost.gather(-1, found_token[..., None])
        # Two keys whose released costs differ by a rounding may change places.
        assert float(lost.max()) <= 2 * torch.finfo(torch.float32).eps
        assert int((found_token != expected_token).sum()) <= 1


def test_attention_and_confidence_of_difftrack(golden):
    numbers = golden("attention_mass")
    heads, head_dim, frames, height, width, text_tokens, seed = numbers["meta"].tolist()
    grid = TokenGrid(frames, height, width, text_tokens=text_tokens, text_first=True)
    q, k = (standard_normal(s, heads, grid.tokens, head_dim, factor=2.0)[None] for s in (seed, seed + 100))
    mass = ops.attention_mass(q, k, grid, numbers["positions"].tolist(), source=0, backend="triton")
    assert_close(mass.text[0], numbers["text_sum"], 1e-5)
    assert_close(mass.frames[0], numbers["frame_mass"], 1e-5)
    assert_close(mass.text_peak[0], numbers["text_peak"], 1e-5)
    assert_close(mass.frame_peak[0], numbers["frame_peak"], 1e-5)


@pytest.mark.parametrize("case", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["renormalized", "zeroed"])
def test_attention_without_the_cross_frame_part(golden, case, variant):
    numbers = golden("cag_attention")
    batch, heads, head_dim, frames, tokens, text_tokens, seed = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, 1, tokens, text_tokens=text_tokens, text_first=True)
    q, k, v = (
        standard_normal(seed + step, batch, heads, grid.tokens, head_dim, factor=factor)
        for step, factor in ((0, 2.0), (100, 2.0), (200, 1.0))
    )
    attended = ops.frame_local_attention(q, k, v, grid, renormalize=variant == "renormalized", backend="triton")
    assert_close(attended, numbers[f"{case}_{variant}"], 1e-5)
