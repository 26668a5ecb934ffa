"""Parts of the tokens that do not fit, shards that cannot be merged, and what the kernels do not take yet."""

from __future__ import annotations

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
        ([result], [lse[:1]], r"without the last axis, \[2, 3\], got \[1, 3\]"),
        ([result.long()], [lse], "results must be floating-point tensors, got torch.int64"),
        ([result], [lse.double()], "must be torch.float32 there, as the operations return them, got torch.float64"),
        ([result.half()], [lse.half()], "must be torch.float32 there, .* got torch.float16"),
        ([result], [None], "lses must be floating-point tensors, got NoneType"),
    ):
        with pytest.raises(ValueError, match=names):
            ops.merge(results, lses)
    assert ops.merge([result.bfloat16()], [lse]).dtype == torch.bfloat16


def test_the_kernels_refuse_parts_and_auto_takes_streaming(monkeypatch, caplog):
    from corrdit.ops import backends

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, GRID.tokens, 8, generator=generator)
    part = q[:, :, GRID.video_slice][:, :, :10]
    for arguments, options, reason in (
        ((part, q), {"queries": (0, 10)}, "whole token axis"),
        ((q[:, :, GRID.frame_slice(1)], q), {"query_frames": [1]}, "whole token axis"),
        ((q, part), {"keys": (0, 10)}, "whole token axis"),
        ((q, q[:, :2]), {}, "as many key heads as query heads, got 2 and 4"),
        ((q, q), {"return_lse": True}, "no log-sum-exp"),
    ):
        with pytest.raises(ValueError, match=f'backend="triton" cannot run: .*{reason}.*use backend="streaming"'):
            ops.soft_displacement(*arguments, GRID, backend="triton", **options)
        ops.soft_displacement(*arguments, GRID, **options)
    backends._automatic.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends._automatic("cuda", torch.bfloat16, "the kernels take the whole token axis") == "streaming"
    assert "whole token axis" in caplog.text
    backends._automatic.cache_clear()
