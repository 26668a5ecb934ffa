"""The reference and streaming backends against numbers computed with the released code of DiTFlow and DiffTrack."""

from __future__ import annotations

import pytest
import torch

from corrdit import TokenGrid, ops

pytestmark = pytest.mark.parametrize("backend", ["reference", "streaming"])
TEXT_TOKENS = 226  # DiTFlow's code cuts off this many


@pytest.mark.parametrize("case", [0, 1, 2])
def test_motion_flow_of_ditflow(golden, standard_normal, assert_close, backend, case):
    numbers = golden("amf")
    heads, head_dim, frames, height, width, seed = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, height, width, text_tokens=TEXT_TOKENS, text_first=True)
    q, k = (standard_normal(s, 1, heads, grid.tokens, head_dim).requires_grad_() for s in (seed, seed + 100))
    options = {"heads": "logits", "temperature": float(numbers[f"{case}_temp"]), "backend": backend}

    soft = ops.soft_displacement(q * 2, k * 2, grid, **options)
    flat = soft.reshape(frames * frames, height * width, 2)
    assert_close(flat, numbers[f"{case}_soft"], 1e-5)
    hard = ops.hard_displacement(q * 2, k * 2, grid, **options)
    assert torch.equal(hard.reshape(flat.shape), torch.from_numpy(numbers[f"{case}_hard"]).long())

    dq, dk = torch.autograd.grad((flat * standard_normal(seed + 200, *flat.shape)).sum(), (q, k))
    assert_close(dq[:, :, grid.video_slice], numbers[f"{case}_dq"], 1e-4)
    assert_close(dk[:, :, grid.video_slice], numbers[f"{case}_dk"], 1e-4)
    assert not dq[:, :, grid.text_slice].any()
    assert not dk[:, :, grid.text_slice].any()


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("scaling", ["headdim", "numheads"])
def test_matching_of_difftrack(golden, standard_normal, assert_close, backend, case, scaling):
    numbers = golden("difftrack_match")
    heads, head_dim, frames, height, width, seed, _ = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, height, width)
    q, k = (
        standard_normal(s, 1, heads, frames, height * width, head_dim, factor=2.0).flatten(2, 3)
        for s in (seed, seed + 100)
    )
    scale = {"headdim": head_dim, "numheads": heads}[scaling] ** -0.5

    found = ops.match(q, k, grid, source=0, scale=scale, backend=backend)
    expected = torch.from_numpy(numbers[f"{case}_{scaling}_match_xy"])  # [target, batch, (x, y), row, column]
    assert torch.equal(found.xy, expected.permute(1, 0, 3, 4, 2))

    rows = ops.cost_rows(q, k, grid, range(height * width), source=0, scale=scale, backend=backend)
    corr = torch.from_numpy(numbers[f"{case}_{scaling}_corr"])  # [target, batch, target token, source row, column]
    cost = rows[:, :, 1:].flatten(-2).permute(2, 0, 3, 1).reshape(corr.shape)
    assert_close(cost, corr, 1e-5)


def test_attention_and_confidence_of_difftrack(golden, standard_normal, assert_close, backend):
    numbers = golden("attention_mass")
    heads, head_dim, frames, height, width, text_tokens, seed = numbers["meta"].tolist()
    grid = TokenGrid(frames, height, width, text_tokens=text_tokens, text_first=True)
    q, k = (standard_normal(s, heads, grid.tokens, head_dim, factor=2.0)[None] for s in (seed, seed + 100))
    mass = ops.attention_mass(q, k, grid, numbers["positions"].tolist(), source=0, backend=backend)
    assert_close(mass.text[0], numbers["text_sum"], 1e-5)
    assert_close(mass.frames[0], numbers["frame_mass"], 1e-5)
    assert_close(mass.frames[0, :, 0], numbers["self_sum"], 1e-5)
    assert_close(mass.frames[0, :, 1:].sum(-1), numbers["cross_sum"], 1e-5)
    assert_close(mass.text_peak[0], numbers["text_peak"], 1e-5)
    assert_close(mass.frame_peak[0], numbers["frame_peak"], 1e-5)


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("variant", ["renormalized", "zeroed"])
def test_attention_without_the_cross_frame_part(golden, standard_normal, assert_close, backend, case, variant):
    numbers = golden("cag_attention")
    batch, heads, head_dim, frames, tokens, text_tokens, seed = numbers[f"{case}_meta"].tolist()
    grid = TokenGrid(frames, 1, tokens, text_tokens=text_tokens, text_first=True)
    q, k, v = (
        standard_normal(seed + step, batch, heads, grid.tokens, head_dim, factor=factor)
        for step, factor in ((0, 2.0), (100, 2.0), (200, 1.0))
    )
    attended = ops.frame_local_attention(q, k, v, grid, renormalize=variant == "renormalized", backend=backend)
    assert_close(attended, numbers[f"{case}_{variant}"], 1e-5)
