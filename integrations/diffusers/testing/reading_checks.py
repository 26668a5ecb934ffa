"""Whether what is read is what the model uses: output, attention, token order, text, masks, gradients, and steps and
branches of a whole guided generation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.captures import capture
from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.layouts import forward_arguments
from corrdit.integrations.diffusers.testing.subject import (
    AttentionRecorder,
    LayerRead,
    Subject,
    copy_of_inputs,
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
    plain = subject.prediction()
    with subject.captured():
        captured = subject.prediction()
    difference = (plain.float() - captured.float()).abs().max().item()
    assert torch.equal(plain, captured), f"capturing changes the model's output by up to {difference:.3g}"
    fired: list[int] = []
    with subject.captured(callback=lambda step, layer, result: fired.append(layer)):
        subject.prediction()
    assert fired == list(subject.layers), f"layers {subject.layers} ran in the order {fired}"


def check_attention_reproduced(subject: Subject) -> None:
    """softmax(q k^T) v with the queries and keys that were read is the model's own attention output, in every layer."""
    with AttentionRecorder(subject.modules) as recorder:
        reads = subject.read()
    for layer, records in zip(subject.layers, recorder.records, strict=True):
        q, k, key_mask = reads[layer].q, reads[layer].k, reads[layer].key_mask
        value, output = (
            torch.cat([F.pad(part, (0, 0, 0, q.shape[2] - part.shape[2])) for part in parts]).float()
            for parts in zip(*records, strict=True)
        )
        valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
        logits = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
        expected = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(dim=-1) @ value
        error = (expected - output).abs().amax(dim=(1, 3))[valid].max() / output.abs().max()
        assert error < ATTENTION_TOLERANCE, (
            f"layer {layer}: attention from the queries and keys read is off by {error:.2g} of the model's own"
        )


def check_token_order(subject: Subject) -> None:
    """Changing the latents under one token changes that token's query in the first layer, and no other.

    In three sizes, one of them not square and one with an odd number of latent frames; a few places of the first, one
    of the others.
    """
    for number, sized in enumerate(subject.sizes()):
        base = sized.read((0,), early_exit=True)[0]
        grid = base.grid
        places = [(grid.frames - 1, grid.height - 1, grid.width - 1)]
        if not number:
            first = [] if sized.backbone.takes_image else [(0, 0, 0)]
            places += [*first, (1 % grid.frames, 1, 2 % grid.width)]
        for place in places:
            _check_token(sized, base, place)


def _check_token(subject: Subject, base: LayerRead, place: tuple[int, int, int]) -> None:
    frame, row, column = place
    _, patch_h, patch_w = subject.backbone.layout().patch_size(subject.transformer)
    latents = subject.latents.clone()
    latents[:, frame, :, row * patch_h : (row + 1) * patch_h, column * patch_w : (column + 1) * patch_w] += 1
    changed = _changed_tokens(base, subject.read((0,), latents=latents, early_exit=True)[0])
    grid = base.grid
    expected = {grid.token(frame, row, column)}
    assert changed == expected, (
        f"latents of (frame {frame}, row {row}, column {column}) are token {sorted(expected)} by the grid of "
        f"{grid.frames} frames of {grid.height} x {grid.width}, but the queries that change are {_short(changed)}"
    )


def check_text_position(subject: Subject) -> None:
    """Changing the prompt changes queries of the grid's text tokens; with text elsewhere, of no token at all.

    Where the prompt also enters through the time embedding (Mochi), all queries may change.
    """
    base = subject.read((0,))[0]
    # Other channels, and not a shift of all, which a normalisation would take out again.
    text = {name: value.flip(-1) if value.ndim == 3 else value for name, value in subject.text.items()}
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
    mask = subject.backbone.layout().text_mask(subject.arguments())
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
    transformer: Any = subject.transformer
    if not getattr(transformer, "_supports_gradient_checkpointing", False):
        return
    layer = max(0, subject.backbone.layers - 2)
    plain, plain_gradient = _gradient(subject, layer, early_exit=False)
    before = transformer.gradient_checkpointing
    transformer.enable_gradient_checkpointing()
    try:
        for early_exit in (False, True):
            result, gradient = _gradient(subject, layer, early_exit=early_exit)
            _assert_same(plain, result, plain_gradient, gradient, f"checkpointing (early_exit={early_exit})")
    finally:
        if not before:
            transformer.disable_gradient_checkpointing()


def check_generation(backbone: Backbone, generation: Mapping[str, Any]) -> None:
    """First and last step, both branches: the queries read are those of the sample with that branch's prompt.

    The branch is recognised independently of the capture, by comparing the prompt each forward was given with the
    arguments whose names begin with `prompt_embeds` and `negative_prompt_embeds`; the queries are compared with those
    of the same forward repeated.
    """
    plain, calls, last = _recorded_generation(backbone, generation)
    layer = backbone.layers - 1
    with capture(backbone.pipe, layers=[layer], steps=[0, -1], operation=copy_of_inputs, branch="both") as captured:
        again = _generated(backbone, generation)
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(again)), "capturing changes the generated latents"
    assert set(captured) == {(0, layer), (last, layer)}, (
        f"steps [0, -1] of a run of {last + 1} steps are kept as {sorted(captured)}"
    )
    for step, _ in captured:
        for branch, name in (("cond", "prompt_embeds"), ("uncond", "negative_prompt_embeds")):
            expected = _queries_of_prompt(backbone, calls, step, layer, _prompt_as_given(backbone, generation, name))
            given = captured[step, layer].get(branch)
            assert given is not None, f"step {step} has no {branch!r} result"
            assert given.q.shape == expected.shape, (
                f"step {step}: {branch!r} has queries {tuple(given.q.shape)}, the model {tuple(expected.shape)}"
            )
            assert torch.equal(given.q, expected), f"step {step}: {branch!r} is not the sample that was given {name}"


def _gradient(subject: Subject, layer: int, early_exit: bool) -> tuple[torch.Tensor, torch.Tensor]:
    latents = subject.latents.clone().requires_grad_()
    calls: list[int] = []

    def counted(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: torch.Tensor | None) -> torch.Tensor:
        calls.append(layer)
        return small_scalar(q, k, grid, key_mask)

    captured = subject.captured(counted, layers=[layer], keep_graph=True, early_exit=early_exit)
    # Backward once with the processors still in place and once after they are gone: both have to work.
    with torch.enable_grad():
        with captured:
            subject.run(latents)
            gradient = None if early_exit else torch.autograd.grad(captured[0, layer], latents)[0]
        if gradient is None:
            (gradient,) = torch.autograd.grad(captured[0, layer], latents)
    assert len(calls) == 1, f"the operation ran {len(calls)} times for one forward and its backward"
    return captured[0, layer].detach(), gradient


def _assert_same(
    result: torch.Tensor, other: torch.Tensor, gradient: torch.Tensor, other_gradient: torch.Tensor, where: str
) -> None:
    assert torch.equal(result, other), f"{where} changes the result from {result.item():.8g} to {other.item():.8g}"
    error = (gradient - other_gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
    assert error < GRADIENT_TOLERANCE, f"{where} changes the gradient by {error:.2g} of its largest value"


def _changed_tokens(base: LayerRead, other: LayerRead) -> set[int]:
    """Tokens of the first sample whose queries or keys differ."""
    differs = (base.q[0] != other.q[0]).any(dim=-1).any(dim=0) | (base.k[0] != other.k[0]).any(dim=-1).any(dim=0)
    return set(differs.nonzero().flatten().tolist())


def _short(tokens: set[int]) -> str:
    listed = sorted(tokens)
    return f"{listed[:8]}" + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


@dataclass(frozen=True)
class RecordedCall:
    """One forward of a generation, with its transformer, arguments and loop iteration."""

    transformer: torch.nn.Module
    arguments: dict[str, Any]
    step: int


def _recorded_generation(
    backbone: Backbone, generation: Mapping[str, object]
) -> tuple[torch.Tensor, list[RecordedCall], int]:
    """The generated latents, all forwards, and the last step's number."""
    calls: list[RecordedCall] = []
    timesteps: list[float] = []

    def record(transformer: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
        arguments = forward_arguments(transformer, args, kwargs)
        timestep = float(torch.as_tensor(arguments["timestep"]).max())
        if timestep not in timesteps:
            timesteps.append(timestep)
        kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
        calls.append(RecordedCall(transformer, kept, timesteps.index(timestep)))

    with ExitStack() as stack:
        for transformer in transformers_of(backbone.pipe):
            stack.callback(transformer.register_forward_pre_hook(record, with_kwargs=True).remove)
        plain = _generated(backbone, generation)
    return plain, calls, len(timesteps) - 1


def _generated(backbone: Backbone, generation: Mapping[str, object]) -> torch.Tensor:
    """The latents of one generation; a generator among the arguments starts anew."""
    arguments = dict(generation)
    source = arguments.get("generator")
    if isinstance(source, torch.Generator):
        arguments["generator"] = torch.Generator(source.device).manual_seed(source.initial_seed())
    # Some pipelines draw the latents of an image from the global numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return backbone.pipe(**arguments).frames


@torch.no_grad()
def _prompt_as_given(backbone: Backbone, generation: Mapping[str, Any], name: str) -> torch.Tensor:
    """A prompt of a generation as the transformer is given it."""
    embeds: torch.Tensor = next(generation[key] for key in generation if key.startswith(name))
    if not hasattr(backbone.pipe, "connectors"):
        return embeds
    # The connectors of LTX-2 see a batch of both, and pad it to the same length.
    mask = generation[name.replace("embeds", "attention_mask")]
    connected: torch.Tensor = backbone.pipe.connectors(embeds, mask, padding_side="left")[0]
    return connected


@torch.no_grad()
def _queries_of_prompt(
    backbone: Backbone, calls: list[RecordedCall], step: int, layer: int, prompt: torch.Tensor
) -> torch.Tensor:
    """Queries `[1, H, N, D]` of the sample of this step that was given this prompt."""
    for call in calls:
        if call.step != step:
            continue
        given = call.arguments["encoder_hidden_states"].float()
        rows = [row for row in range(len(given)) if torch.equal(given[row].flatten(), prompt.float().flatten())]
        if rows:
            with capture(call.transformer, layers=[layer], operation=copy_of_inputs) as captured:
                call.transformer(**call.arguments)
            return captured[0, layer].q[rows[:1]]
    raise AssertionError(f"no forward of step {step} was given one of the two prompts; was the generation guided?")
