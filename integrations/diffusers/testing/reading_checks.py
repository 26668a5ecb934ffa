"""Whether what is read is what the model uses: output, attention, token order, text, masks, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from corrdit.integrations.diffusers.testing.subject import (
    AttentionRecord,
    AttentionRecorder,
    LayerRead,
    Subject,
    small_scalar,
)

ATTENTION_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5


def check_grid(subject: Subject) -> None:
    """`Backbone.grid` is the grid the operation is given, up to the length of the prompt."""
    read = subject.read((0,))[0]
    height, width = subject.latents.shape[-2:]
    grid = subject.backbone.grid(subject.latents.shape[1], height, width)
    assert grid == read.grid, f"backbone.grid gives {grid}, the forward has {read.grid}"
    assert read.q.shape[2] == grid.tokens, f"the grid has {grid.tokens} tokens, queries have {read.q.shape[2]}"


def check_output_unchanged(subject: Subject) -> None:
    """The model's output is bit-identical with and without a capture of every layer."""
    from corrdit.integrations.diffusers.captures import capture

    plain = subject.prediction()
    with capture(subject.transformer, layers=subject.layers, operation=small_scalar):
        captured = subject.prediction()
    difference = (plain.float() - captured.float()).abs().max().item()
    assert torch.equal(plain, captured), f"capturing changes the model's output by up to {difference:.3g}"
    fired: list[int] = []
    with capture(
        subject.transformer,
        layers=subject.layers,
        operation=small_scalar,
        callback=lambda s, layer, r: fired.append(layer),
    ):
        subject.prediction()
    assert fired == list(subject.layers), f"layers {subject.layers} ran in the order {fired}"


def check_attention_reproduced(subject: Subject) -> None:
    """softmax(q k^T) v with the queries and keys that were read is the model's own attention output, in every layer."""
    with AttentionRecorder(subject.modules) as recorder:
        reads = subject.read()
    for layer, records in zip(subject.layers, recorder.records, strict=True):
        read = reads[layer]
        value, output = _joined(records, read.q.shape[2])
        expected = _attention(read, value)
        valid = _valid_queries(read)
        error = (expected - output.float()).abs().amax(dim=(1, 3))[valid].max() / output.float().abs().max()
        assert error < ATTENTION_TOLERANCE, (
            f"layer {layer}: attention from the queries and keys read is off by {error:.2g} of the model's own"
        )


def check_token_order(subject: Subject) -> None:
    """Changing the latents under one token changes that token's query in the first layer, and no other."""
    base = subject.read((0,))[0]
    grid = base.grid
    _, patch_h, patch_w = subject.backbone.layout().patch_size(subject.transformer)
    places = [(0, 0, 0), (grid.frames - 1, grid.height - 1, grid.width - 1), (1 % grid.frames, 1, 2 % grid.width)]
    if getattr(subject.backbone, "takes_image", False):
        places = places[1:]
    for frame, row, column in places:
        latents = subject.latents.clone()
        latents[:, frame, :, row * patch_h : (row + 1) * patch_h, column * patch_w : (column + 1) * patch_w] += 1
        changed = _changed_tokens(base, subject.read((0,), latents=latents)[0])
        expected = {grid.token(frame, row, column)}
        assert changed == expected, (
            f"latents of (frame {frame}, row {row}, column {column}) are token {sorted(expected)} by the grid, "
            f"but the queries that change are {_short(changed)}"
        )


def check_text_position(subject: Subject) -> None:
    """Changing the prompt changes queries of the grid's text tokens; with text elsewhere, of no token at all.

    Where the prompt also enters through the time embedding (Mochi), all queries may change.
    """
    base = subject.read((0,))[0]
    text = dict(subject.text)
    text["encoder_hidden_states"] = text["encoder_hidden_states"] + 1
    changed = _changed_tokens(base, subject.read((0,), text=text)[0])
    slots = set(range(base.grid.tokens)[base.grid.text_slice])
    used = slots if base.key_mask is None else {slot for slot in slots if bool(base.key_mask[0, slot])}
    assert used <= changed, f"queries of text tokens {_short(used - changed)} do not depend on the prompt"
    strays = changed - slots
    everything = len(changed) == len(used) + base.grid.video_tokens
    assert not strays or everything, (
        f"the prompt changes queries of tokens {_short(strays)}, which are not text by the grid"
    )


def check_masks(subject: Subject) -> None:
    """The key mask removes exactly the prompt's padding, and what stands there does not reach other tokens."""
    mask = subject.text.get("encoder_attention_mask")
    reads = subject.read()
    for layer, read in reads.items():
        expected = torch.ones(read.q.shape[0], read.q.shape[2], dtype=torch.bool)
        if mask is not None and read.grid.text_tokens:
            expected[:, read.grid.text_slice] = mask.bool().cpu()
        given = torch.ones_like(expected) if read.key_mask is None else read.key_mask.cpu()
        assert given.shape == expected.shape, f"layer {layer}: key_mask is {tuple(given.shape)}, not [B, N]"
        assert given.dtype == torch.bool, f"layer {layer}: key_mask is {given.dtype}, not bool"
        wrong = int((given != expected).sum())
        assert not wrong, f"layer {layer}: {wrong} entries of key_mask differ from the prompt's padding"


def check_early_exit(subject: Subject) -> None:
    """Leaving after the last layer needed gives the same results and gradients as the full forward."""
    layer = max(0, subject.backbone.layers - 2)
    full, full_gradient = _gradient(subject, layer, early_exit=False)
    early, early_gradient = _gradient(subject, layer, early_exit=True)
    _assert_same(full, early, full_gradient, early_gradient, "early exit")
    assert full_gradient.abs().sum() > 0, "the result does not depend on the latents"


def check_gradient_checkpointing(subject: Subject) -> None:
    """With gradient checkpointing the operation fires once and the gradients stay the same."""
    transformer = subject.transformer
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        return
    layer = max(0, subject.backbone.layers - 2)
    plain, plain_gradient = _gradient(subject, layer, early_exit=False)
    with _checkpointing(transformer):
        for early_exit in (False, True):
            result, gradient = _gradient(subject, layer, early_exit=early_exit)
            _assert_same(plain, result, plain_gradient, gradient, f"checkpointing (early_exit={early_exit})")


def _gradient(subject: Subject, layer: int, early_exit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from corrdit.integrations.diffusers.captures import capture

    latents = subject.latents.clone().requires_grad_()
    calls: list[int] = []

    def counted(q: Any, k: Any, grid: Any, key_mask: Any) -> torch.Tensor:
        calls.append(layer)
        return small_scalar(q, k, grid, key_mask)

    def backward() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(captured[0, layer], latents)
        return gradient

    captured = capture(subject.transformer, layers=[layer], operation=counted, keep_graph=True, early_exit=early_exit)
    # Backward once with the processors still in place and once after they are gone: both have to work.
    with torch.enable_grad():
        with captured:
            subject.transformer(**subject.arguments(latents=latents))
            gradient = None if early_exit else backward()
        gradient = backward() if gradient is None else gradient
    result = captured[0, layer]
    assert len(calls) == 1, f"the operation ran {len(calls)} times for one forward and its backward"
    return result.detach(), gradient


def _assert_same(
    result: torch.Tensor, other: torch.Tensor, gradient: torch.Tensor, other_gradient: torch.Tensor, where: str
) -> None:
    assert torch.equal(result, other), f"{where} changes the result from {result.item():.8g} to {other.item():.8g}"
    error = (gradient - other_gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
    assert error < GRADIENT_TOLERANCE, f"{where} changes the gradient by {error:.2g} of its largest value"


@contextmanager
def _checkpointing(transformer: Any) -> Iterator[None]:
    before = transformer.gradient_checkpointing
    transformer.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            transformer.disable_gradient_checkpointing()


def _joined(records: list[AttentionRecord], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, tokens - tensor.shape[2]))

    return torch.cat([padded(r.value) for r in records]), torch.cat([padded(r.output) for r in records])


def _attention(read: LayerRead, value: torch.Tensor) -> torch.Tensor:
    logits = read.q.float() @ read.k.float().transpose(-1, -2) * read.q.shape[-1] ** -0.5
    if read.key_mask is not None:
        logits = logits.masked_fill(~read.key_mask[:, None, None, :], -torch.inf)
    return logits.softmax(dim=-1) @ value.float()


def _valid_queries(read: LayerRead) -> torch.Tensor:
    if read.key_mask is None:
        return torch.ones(read.q.shape[0], read.q.shape[2], dtype=torch.bool, device=read.q.device)
    return read.key_mask


def _changed_tokens(base: LayerRead, other: LayerRead) -> set[int]:
    """Tokens of the first sample whose queries or keys differ."""
    differs = (base.q[0] != other.q[0]).any(dim=-1).any(dim=0) | (base.k[0] != other.k[0]).any(dim=-1).any(dim=0)
    return set(differs.nonzero().flatten().tolist())


def _short(tokens: set[int]) -> str:
    listed = sorted(tokens)
    return f"{listed[:8]}" + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
