"""Guidance away from the model's own prediction without cross-frame attention.

Source: DiffTrack (arXiv 2506.17220), cross-attention guidance (CAG).

With c and u the conditional and unconditional predictions, p the conditional one with perturbed layers, w the scale of
classifier-free guidance and s that of this guidance, the sampler is to use

    u + w (c - u) + s (c - p).

Adding s (c - p) to both u and c gives exactly that, whatever w is and whenever the pipeline decides on it; and c alone
gives c + s (c - p) where there is no classifier-free guidance. So the pipeline's own code stays as it is. Where a
pipeline adds multiples of further differences c - d (LTX-2), d is moved by the same, and the differences stay.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.presets import GuidancePreset, Preset
from corrdit.integrations.diffusers.backbones.published_models import default_layers, guidance_preset
from corrdit.integrations.diffusers.guidance.guided_forwards import GuidedForwards, GuidedSamples
from corrdit.integrations.diffusers.guidance.options import (
    GuidanceOptions,
    Heads,
    checked_heads,
    checked_layers,
    model_heads,
)
from corrdit.integrations.diffusers.guidance.perturbed_pass import prediction_of
from corrdit.integrations.diffusers.host.forwards import transformers_of
from corrdit.integrations.diffusers.host.steps import PipelineSteps, branches_of
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of

_guided_transformers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class CrossAttentionGuidance:
    """Guide a video pipeline away from what it predicts when chosen layers lose their cross-frame attention.

    ```python
    with CrossAttentionGuidance(pipe, layers=(13, 17, 21), scale=1.0):
        pipe(prompt, guidance_scale=6)
    ```

    The pipeline is not changed and the model is as before when the block ends; inside, it serves one thread. Each
    guided step costs one more forward of the conditional sample alone, which starts at the first perturbed layer.

    Args:
        pipe: a diffusers video pipeline (or a backbone), with or without classifier-free guidance.
        layers: attention layers to perturb, counted over all blocks in the order they run, negative ones from the
            last. For a backbone, or with a preset, they may be left out.
        scale: s, in predictions of the model; 0 runs the pipeline as if there were no guidance, bit for bit.
        start: share of the denoising steps before guidance begins.
        stop: share of the denoising steps after which it ends.
        renormalize: True removes cross-frame keys before the softmax, False drops their weights after it. None means
            what the preset says: True, or for published ones what the released code does: False with classifier-free
            guidance, True without.
        span: frames `|i - j| <= span` count as a token's own.
        perturbation: "cross_frame"; "identity", where a video token sees itself and the text only (perturbed-attention
            guidance, arXiv 2403.17377); or "skip", where the blocks of the layers are left out (spatiotemporal skip
            guidance, arXiv 2411.18664).
        heads: head or heads to perturb, the same in every layer or by layer; None for all.
        adaptive_scale: the scale falls by this for each timestep from the noisiest, down to 0, as in diffusers'
            perturbed-attention pipelines.
        preset: a `Preset` in place of the backbone's, or "published" for the published layers and variant of this
            model. It gives layers and variant.
        backend: of `corrdit.ops.frame_local_attention`.

    Raises:
        ValueError: settings out of range, a pipeline or model that cannot be guided (with the reason), a model under
            another guidance; during generation, attention that is not full, an odd batch under
            classifier-free guidance, a share of the steps that holds none, or a forward with gradients enabled.
    """

    def __init__(
        self,
        pipe: Any,
        layers: int | Iterable[int] | None = None,
        scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        renormalize: bool | None = None,
        span: int = 0,
        perturbation: str = "cross_frame",
        heads: Heads = None,
        adaptive_scale: float = 0.0,
        preset: Preset | str | None = None,
        backend: str = "auto",
    ) -> None:
        self.pipe = _pipeline_of(pipe)
        self.options = GuidanceOptions(
            scale=scale,
            start=start,
            stop=stop,
            renormalize=renormalize,
            span=span,
            perturbation=perturbation,
            adaptive_scale=adaptive_scale,
            backend=backend,
        )
        self._transformers = transformers_of(self.pipe)
        transformer = self._transformers[0]
        count = min(len(layout_of(each).attention_modules(each)) for each in self._transformers)
        name = type(transformer).__name__
        self.preset = _guidance_of(pipe, transformer, preset)
        given = _layers_of(self.preset, preset, name) if layers is None else layers
        self.layers = checked_layers(given, count, name)
        self.heads = checked_heads(heads, self.layers, model_heads(transformer), perturbation)
        self._forwards = [
            GuidedForwards(each, self.layers, self.heads, self.options, self._wanted, self._finished)
            for each in self._transformers
        ]
        self._steps = PipelineSteps(self.pipe)
        self._shift: torch.Tensor | None = None
        self._open: ExitStack | None = None

    def __enter__(self) -> CrossAttentionGuidance:
        if self._open is not None:
            raise ValueError("this guidance is already open; leave its block first, or make another")
        self._steps = PipelineSteps(self.pipe)
        self._shift = None
        for transformer, forwards in zip(self._transformers, self._forwards, strict=True):
            if transformer in _guided_transformers:
                raise ValueError(
                    f"this {type(transformer).__name__} is already under a guidance; leave its block first, or give "
                    "all layers to one"
                )
            forwards.check()
        with ExitStack() as stack:
            for transformer, forwards in zip(self._transformers, self._forwards, strict=True):
                _guided_transformers.add(transformer)
                stack.callback(_guided_transformers.discard, transformer)
                stack.enter_context(forwards.attach())
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
        self._shift = None
        if stack is not None:
            stack.close()

    def _renormalizes(self) -> bool:
        for chosen in (self.options.renormalize, self.preset.renormalize):
            if chosen is not None:
                return chosen
        return not self._steps.guided

    def _scale_now(self, call: ForwardCall) -> float:
        """s at the step in progress; 0 where it is not guided."""
        options, steps = self.options, self._steps
        if not options.scale or not options.includes(steps.step, steps.count):
            return 0.0
        if not options.adaptive_scale:
            return options.scale
        current = getattr(self.pipe, "_current_timestep", None)
        timestep = float(torch.as_tensor(call.timestep if current is None else current).max())
        count = int(self.pipe.scheduler.config.num_train_timesteps)
        schedule = torch.as_tensor(self.pipe.scheduler.timesteps)
        low, high = float(schedule.min()), float(schedule.max())
        if low < 0 or high > count + 1:
            raise ValueError(
                f"adaptive_scale falls with timesteps of 0 to {count}, and those of this {type(self.pipe).__name__} go "
                f"from {low:.3g} to {high:.3g}; leave adaptive_scale at 0"
            )
        return options.scale_at(timestep, count)

    def _wanted(self, layout: TransformerLayout, call: ForwardCall) -> GuidedSamples | None:
        """The conditional samples of a guided call."""
        steps = self._steps
        steps.advance(call)
        if steps.call == 0:
            self._shift = None
        if steps.step >= steps.count:
            raise ValueError(
                f"the {type(self.pipe).__name__} goes through its {steps.count} steps more than once, as it does for a "
                "video that it makes in windows; guidance knows one pass, so ask for a video that fits a window"
            )
        branches = branches_of(layout, call, steps)
        scale = self._scale_now(call) if branches.keys() != {"uncond"} else 0.0
        if scale and torch.is_grad_enabled():
            raise ValueError(
                "a forward with gradients ran under guidance; guidance is for sampling, which pipelines do without, "
                "and does not go together with optimising through the model (MotionTransfer): leave its block first"
            )
        if not branches and not layout.compared_calls:
            raise ValueError(
                f"the pipeline calls its transformer {steps.call + 1} times in step {steps.step}; guidance knows a "
                "conditional and an unconditional call"
            )
        if not scale or not branches:
            return None
        return GuidedSamples(branches["cond"], scale, self._renormalizes())

    def _finished(self, output: object, shift: torch.Tensor | None) -> object:
        if shift is not None:
            self._shift = shift
        return None if self._shift is None else _shifted(output, self._shift)


def _shifted(output: object, shift: torch.Tensor) -> object:
    """The transformer's output with the same shift added to every branch in it."""
    prediction = prediction_of(output)
    branches = prediction.unflatten(0, (-1, shift.shape[0])).to(shift.dtype)
    moved: object = (branches + shift).flatten(0, 1).to(prediction.dtype)
    if isinstance(output, tuple):
        return ([moved] if isinstance(output[0], list) else moved, *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: moved})
    raise ValueError(f"the transformer returned a {type(output).__name__}; guidance needs a tuple or a model output")


def _guidance_of(pipe: object, transformer: torch.nn.Module, preset: Preset | str | None) -> GuidancePreset:
    """Settings of the preset given, of a backbone's own, or without layers of any for a bare pipeline."""
    if isinstance(preset, Preset):
        return replace(preset.guidance, layers=preset.guidance.layers or (preset.reading.layer,))
    if preset is not None and preset != "published":
        raise ValueError(f'preset must be "published", a Preset or None, got {preset!r}')
    if preset is None and isinstance(pipe, Backbone):
        return replace(pipe.preset.guidance, layers=default_layers(pipe))
    return GuidancePreset() if preset is None else guidance_preset(transformer) or GuidancePreset(renormalize=None)


def _layers_of(guidance: GuidancePreset, preset: Preset | str | None, name: str) -> tuple[int, ...]:
    if guidance.layers is not None:
        return guidance.layers
    if preset is None:
        raise ValueError('no layers to perturb were given; give layers=(...), a backbone, or preset="published"')
    raise ValueError(
        f'preset="published" has no layers for this {name}: they are published for CogVideoX-2B and 5B; give '
        "layers=(...)"
    )


def _pipeline_of(pipe: Any) -> Any:
    inner = getattr(pipe, "pipe", pipe)
    if isinstance(inner, torch.nn.Module) or not isinstance(getattr(inner, "transformer", None), torch.nn.Module):
        raise ValueError(
            "guidance needs a diffusers video pipeline (with .transformer and .scheduler), whose steps it counts, got "
            f"{type(pipe).__name__}"
        )
    if not hasattr(inner, "scheduler"):
        raise ValueError(f"{type(inner).__name__} has no scheduler, so its denoising steps cannot be counted")
    return inner
