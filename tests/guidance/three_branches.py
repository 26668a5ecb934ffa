"""Guided predictions computed the plain way: three whole forwards, attention maps written out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from corrdit.integrations.diffusers.layouts import ForwardCall, forward_arguments, layout_of

Weights = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""`weights(logits, key_frame [N], text_tokens) -> [B, H, N, N]`; key_frame is -1 for text."""


def cross_frame(renormalize: bool, span: int = 0) -> Weights:
    def weights(logits: torch.Tensor, frame: torch.Tensor, text_tokens: int) -> torch.Tensor:
        far = (frame[:, None] - frame[None, :]).abs() > span
        far &= (frame[:, None] >= 0) & (frame[None, :] >= 0)
        if renormalize:
            return logits.masked_fill(far, -torch.inf).softmax(-1)
        return logits.softmax(-1).masked_fill(far, 0.0)

    return weights


def identity(logits: torch.Tensor, frame: torch.Tensor, text_tokens: int) -> torch.Tensor:
    other = ~torch.eye(len(frame), dtype=torch.bool)
    other &= (frame[:, None] >= 0) & (frame[None, :] >= 0)
    return logits.masked_fill(other, -torch.inf).softmax(-1)


@contextlib.contextmanager
def perturbed(
    transformer: torch.nn.Module, layers: tuple[int, ...], call: ForwardCall, weights: Weights, heads: Any = None
):
    """Inside, the attention of these layers is written out with `weights`, in these heads."""
    true_attention = torch.nn.functional.scaled_dot_product_attention
    modules = [layout_of(transformer).attention_modules(transformer)[layer] for layer in layers]
    active: list[torch.nn.Module] = []

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **further: Any) -> torch.Tensor:
        full = true_attention(query, key, value, attn_mask=attn_mask, **further)
        if not active:
            return full
        tokens = query.shape[2]
        text = tokens - call.grid.video_tokens
        frame = torch.arange(call.grid.frames).repeat_interleave(call.grid.tokens_per_frame)
        parts = [torch.full((text,), -1), frame] if call.grid.text_first else [frame, torch.full((text,), -1)]
        logits = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
        if attn_mask is not None:
            allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -1000
            logits = logits.masked_fill(~allowed, -torch.inf)
        # Rows of padding of which no key is left give 0, as SDPA has it.
        output = (weights(logits, torch.cat(parts), text).nan_to_num() @ value.double()).to(value.dtype)
        chosen = range(query.shape[1]) if heads is None else heads
        mixed = full.clone()
        mixed[:, list(chosen)] = output[:, list(chosen)]
        return mixed

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(lambda module, args: active.append(module)).remove)
            stack.callback(module.register_forward_hook(lambda module, args, output: active.clear()).remove)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        yield


class Recorder:
    """Keeps what the model returned unguided in each step of a pipeline run, and what the scheduler was given."""

    def __init__(self, pipe: Any, batch: int, guided: bool) -> None:
        self.pipe, self.batch, self.guided = pipe, batch, guided
        self.calls: list[list[tuple[torch.nn.Module, dict[str, Any], torch.Tensor]]] = [[]]
        self.predictions: list[torch.Tensor] = []
        self.scales: list[float] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Enter before the guidance, so that the model's own output is seen."""
        transformers = [self.pipe.transformer, getattr(self.pipe, "transformer_2", None)]
        step = self.pipe.scheduler.step
        with contextlib.ExitStack() as stack:
            for transformer in filter(None, transformers):
                stack.callback(transformer.register_forward_hook(self._forward, with_kwargs=True).remove)
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(self.pipe.scheduler, "step", self._step(step))
            yield

    def _forward(self, transformer: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments = forward_arguments(transformer, args, kwargs)
        self.calls[-1].append((transformer, arguments, output[0].clone()))

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(prediction: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.predictions.append(prediction.clone())
            self.scales.append(float(self.pipe.guidance_scale))
            self.calls.append([])
            return step(prediction, *args, **kwargs)

        return recorded

    def expected(
        self, index: int, layers: tuple[int, ...], scale: float, weights: Weights, heads: Any = None
    ) -> torch.Tensor:
        """u + w (c - u) + s (c - p) of step `index`, every branch a forward of its own."""
        calls = self.calls[index]
        transformer, arguments, output = calls[0]
        layout = layout_of(transformer)
        if layout.guidance == "batched":
            uncond, cond = output.chunk(2) if self.guided else (None, output)
            arguments = {name: self._conditional(name, value) for name, value in arguments.items()}
        else:
            cond, uncond = output, calls[1][2] if self.guided else None
        call = layout.read_call(transformer, arguments)
        with torch.no_grad(), perturbed(transformer, layers, call, weights, heads):
            without = transformer.forward(**arguments)[0]
        shift = scale * (cond.double() - without.double())
        if uncond is None:
            return cond + shift
        w = 5.0 if "HunyuanVideo" in type(self.pipe).__name__ else self.scales[index]
        return uncond.double() + w * (cond.double() - uncond.double()) + shift

    def _conditional(self, name: str, value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.shape[:1] == (2 * self.batch,) and self.guided
        return value[self.batch :] if batched else value


def check_outputs(
    pipe: Any, generation: dict[str, Any], guidance: Any, layers: tuple[int, ...], scale: float, uncond: Any = None
) -> int:
    """Every forward of a guided run returns what it returned unguided plus s (c - p); returns their number.

    `uncond(index)` says whether forward `index` is an unconditional one of its own; a batch of two branches is told by
    the pipeline's own `do_classifier_free_guidance`.
    """
    plain: list[tuple[torch.nn.Module, dict[str, Any], torch.Tensor, bool]] = []
    guided: list[torch.Tensor] = []

    def before(transformer: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments = forward_arguments(transformer, args, kwargs)
        # Kandinsky 5 denoises the very tensor it gives.
        arguments = {
            key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
        }
        batched = layout_of(transformer).guidance == "batched"
        if batched:
            guided = getattr(pipe, "do_classifier_free_guidance", None)
            batched = pipe.guidance_scale > 1 if guided is None else guided
        plain.append((transformer, arguments, output[0].clone(), batched))

    def after(transformer: torch.nn.Module, args: Any, output: Any) -> None:
        guided.append(output[0].clone())

    with contextlib.ExitStack() as stack:
        stack.callback(pipe.transformer.register_forward_hook(before, with_kwargs=True).remove)
        with guidance:
            stack.callback(pipe.transformer.register_forward_hook(after).remove)
            pipe(**generation)
    shift = torch.zeros(())
    for index, ((transformer, arguments, output, batched), actual) in enumerate(zip(plain, guided, strict=True)):
        if uncond is None or not uncond(index):
            half = len(output) // 2 if batched else 0
            conditional = {
                name: value[half:] if isinstance(value, torch.Tensor) and len(value) == 2 * half else value
                for name, value in arguments.items()
            }
            call = layout_of(transformer).read_call(transformer, conditional)
            with torch.no_grad(), perturbed(transformer, layers, call, cross_frame(True)):
                without = transformer.forward(**conditional)[0]
            shift = scale * (output[half:].double() - without.double())
            assert shift.abs().max() > 0
        assert_close(actual, (output.unflatten(0, (-1, len(shift))).double() + shift).flatten(0, 1))
    return len(guided)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest error over largest value."""
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < tolerance, f"relative error {error:.2e}"
