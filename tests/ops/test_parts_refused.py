"""Parts of the tokens that do not fit, shards that cannot be merged, heads that take no part."""

from __future__ import annotations

import importlib

import pytest
import torch

from corrdit import TokenGrid, ops

GRID = TokenGrid(4, 3, 5, text_tokens=2)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, heads, GRID.tokens, 6, generator=generator) for heads in (4, 2)]


@pytest.mark.parametrize(
    ("part", "options", "names"),
    [
        (slice(2, 12), {"queries": (0, 11)}, r"q has 10 tokens, but queries=\(0, 11\) are 11 video tokens, or 13 with"),
        (slice(2, 12), {"queries": (5, 5)}, "stop of queries must be a whole number of at least 6, got 5"),
        (slice(2, 12), {"queries": (55, 65)}, "queries must end within the 60 video tokens"),
        (slice(2, 12), {"queries": 10}, "queries must be a list, got 10"),
        (slice(2, 12), {"queries": (1, 2, 3)}, r"queries must be \(start, stop\)"),
        (slice(2, 12), {"queries": (0, 10), "query_frames": [0]}, "give one of them"),
        (slice(2, 17), {"query_frames": []}, "at least one frame, each once"),
        (slice(2, 32), {"query_frames": [1, 1]}, "at least one frame, each once"),
        (slice(2, 17), {"query_frames": [4]}, "query_frames is frame 4"),
        (slice(2, 17), {}, "q has 15 tokens, but the grid has 62"),
        (slice(None), {"keys": (0, 10)}, r"k has 62 tokens, but keys=\(0, 10\) are 10 video tokens, or 12 with"),
        (slice(None), {"return_lse": True, "heads": "probabilities"}, "has no single softmax"),
        (slice(None), {"return_lse": "yes"}, "return_lse must be True or False"),
        (slice(None), {"key_mask": torch.ones(2, 10, dtype=torch.bool)}, r"bool tensor \[batch, tokens\] = \[2, 62\]"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(part, options, names):
    q, k = tensors()
    with pytest.raises(ValueError, match=names):
        ops.soft_displacement(q[:, :, part], k, GRID, **options)


def test_what_cannot_be_merged():
    result, lse = torch.zeros(2, 3, 2), torch.zeros(2, 3)
    for results, lses, names in (
        ([], [], "lists of one tensor a shard"),
        ([result], [lse, lse], "got 1 results and 2 lses"),
        ([result, result[:1]], [lse, lse[:1]], "one shape, dtype and device"),
        ([result, result.half()], [lse, lse], "one shape, dtype and device"),
        ([result, result.to("meta")], [lse, lse], "float32 on cpu and .*float32 on meta"),
        ([result], [lse[:1]], r"without the last axis, \[2, 3\], got \[1, 3\]"),
        ([result.long()], [lse], "results must be floating-point tensors, got torch.int64"),
        ([result], [lse.double()], "must be torch.float32 there, as the operations return them, got torch.float64"),
        ([result.half()], [lse.half()], "must be torch.float32 there, .* got torch.float16"),
        ([result], [None], "lses must be floating-point tensors, got NoneType"),
    ):
        with pytest.raises(ValueError, match=names):
            ops.merge(results, lses)
    assert ops.merge([result.bfloat16()], [lse]).dtype == torch.bfloat16


def test_auto_takes_the_kernels_for_parts_and_streaming_for_what_they_refuse(monkeypatch, caplog):
    from corrdit.ops import backends

    backends._automatic.cache_clear()
    monkeypatch.setattr(backends, "_fixed_reason", lambda device: None)
    monkeypatch.setattr(backends, "device_of", lambda tensor: "cuda")
    q = torch.zeros(1, 4, GRID.tokens, 8)
    taken: list[str] = []
    monkeypatch.setattr(
        backends, "_module", lambda name: taken.append(name) or importlib.import_module("corrdit.reference")
    )
    part = q[:, :, GRID.video_slice][:, :, :10]
    ops.soft_displacement(part, q[:, :2], GRID, queries=(0, 10), return_lse=True)
    ops.soft_displacement(q, part, GRID, keys=(0, 10))
    ops.soft_displacement(part.double(), q.double(), GRID, queries=(0, 10))
    assert taken == ["triton", "triton", "streaming"]
    assert "not float64" in caplog.text
    backends._automatic.cache_clear()


def test_heads_of_weight_0_take_no_part():
    q, k = (tensor.double() for tensor in tensors())
    for weights in ([0.0, 3.0, 0.0, 1.0], [2.0, 0.0, 0.0, 1.0], torch.tensor([0.0, 0.0, 1.0, 0.0])):
        idle = [head for head, weight in enumerate(weights) if weight == 0]
        undefined = q.clone()
        undefined[:, idle] = float("nan")
        undefined.requires_grad_()
        for heads in ("logits", "features", "probabilities"):
            for backend in ("reference", "streaming"):
                options = {"heads": heads, "head_weights": weights, "backend": backend}
                found = ops.soft_displacement(undefined, k, GRID, **options)
                torch.testing.assert_close(found, ops.soft_displacement(q, k, GRID, **options))
                (gradient,) = torch.autograd.grad(found.square().sum(), undefined)
                assert gradient.isfinite().all()
                assert (gradient[:, idle] == 0).all()
