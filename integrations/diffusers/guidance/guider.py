"""Cross-attention guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput

from corrdit.arguments import finite_number, whole_indices
from corrdit.integrations.diffusers.backbones.presets import DEFAULT_RENORMALIZE
from corrdit.integrations.diffusers.guidance.guided_forwards import GuidedForwards, GuidedSamples
from corrdit.integrations.diffusers.guidance.options import (
    GuidanceOptions,
    checked_heads,
    checked_layers,
    model_heads,
)
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of
from corrdit.integrations.diffusers.transfer_settings import LARGEST_SCALE

TRAIN_TIMESTEPS = 1000
"""Length of the noise schedule that guiders are not told; 1000 in all supported families."""


class CrossAttentionGuider(ClassifierFreeGuidance):
    """Classifier-free guidance with cross-attention guidance on top.

    ```python
    pipe.update_components(guider=CrossAttentionGuider(guidance_scale=5.0, layers=[13, 17, 21]))
    ```

    The same prediction as `CrossAttentionGuidance` round a pipeline of its own: u + w (c - u) + s (c - p). The
    perturbed forward runs inside the conditional one's and starts at the first perturbed layer; between two forwards of
    the model nothing of the guider is left in it. Not for use inside `CrossAttentionGuidance`.

    Args:
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: of classifier-free guidance,
            as for `diffusers.ClassifierFreeGuidance`; the rescaling comes before s (c - p) is added.
        layers: attention layers to perturb, counted over all blocks, negative ones from the last.
        perturbation_scale: s; 0 is classifier-free guidance alone, bit for bit.
        perturbation_start: share of the denoising steps before it begins.
        perturbation_stop: share of the denoising steps after which it ends.
        renormalize, span, perturbation, heads, adaptive_scale, backend: as for `CrossAttentionGuidance`; heads are the
            same in every layer.

    Raises:
        ValueError: settings out of range; when a model comes, layers it does not have, what cannot be guided, or a
            share of the steps that holds none.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        layers: int | Sequence[int] = (),
        perturbation_scale: float = 1.0,
        perturbation_start: float = 0.0,
        perturbation_stop: float = 1.0,
        renormalize: bool | None = None,
        span: int = 0,
        perturbation: str = "cross_frame",
        heads: int | Sequence[int] | None = None,
        adaptive_scale: float = 0.0,
        backend: str = "auto",
    ) -> None:
        for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
            finite_number(name, value, most=LARGEST_SCALE)
        # By name: diffusers takes positional arguments for defaults when it makes a copy from the configuration.
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        # Kept as lists, which can be read for every forward, and are what a configuration file holds.
        self._layers = whole_indices("layers", () if layers is None else layers)
        self._heads = None if heads is None else whole_indices("heads", heads)
        self._options = GuidanceOptions(
            scale=perturbation_scale,
            start=perturbation_start,
            stop=perturbation_stop,
            renormalize=renormalize,
            span=span,
            perturbation=perturbation,
            adaptive_scale=adaptive_scale,
            backend=backend,
        )
        self._shift: torch.Tensor | None = None
        self._open = ExitStack()

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        """Begin a denoising step."""
        super().set_state(step, num_inference_steps, timestep)
        self._shift = None

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before a forward: the conditional one of a guided step will be followed by the perturbed one."""
        super().prepare_models(denoiser)
        self._open.close()
        scale = self._scale_now()
        if not (self.is_conditional and self._enabled and scale):
            return
        options = self._options
        count = len(layout_of(denoiser).attention_modules(denoiser))
        layers = checked_layers(self._layers, count, type(denoiser).__name__)
        heads = checked_heads(self._heads, layers, model_heads(denoiser), options.perturbation)
        renormalize = DEFAULT_RENORMALIZE if options.renormalize is None else options.renormalize

        def all_samples(layout: TransformerLayout, call: ForwardCall) -> GuidedSamples:
            return GuidedSamples(slice(0, call.batch), scale, renormalize)

        def keep(output: object, shift: torch.Tensor | None) -> None:
            self._shift = shift

        forwards = GuidedForwards(denoiser, layers, heads, options, all_samples, keep)
        forwards.check()
        self._open.enter_context(forwards.attach(once=True))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """After a forward."""
        self._open.close()
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        """The guided prediction."""
        output = super().forward(pred_cond, pred_uncond)
        if self._shift is not None:
            output.pred = (output.pred + self._shift).to(output.pred.dtype)
        return output

    def _scale_now(self) -> float:
        if not self._options.scale or not self._options.includes(self._step, self._num_inference_steps):
            return 0.0
        if not self._options.adaptive_scale:
            return self._options.scale
        return self._options.scale_at(float(self._timestep), TRAIN_TIMESTEPS)
