"""Cross-attention guidance as a guider of diffusers' modular pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput

from corrdit.integrations.diffusers.backbones.presets import DEFAULT_RENORMALIZE
from corrdit.integrations.diffusers.compatibility import check_processor, check_transformer
from corrdit.integrations.diffusers.guidance.cross_attention import guidance_shift
from corrdit.integrations.diffusers.guidance.options import GuidanceOptions, checked_heads, checked_layers, listed
from corrdit.integrations.diffusers.guidance.perturbed_pass import PerturbedPass, prediction_of
from corrdit.integrations.diffusers.layouts import forward_arguments, layout_of

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
        self._layers, self._heads = [] if layers is None else listed(layers), None if heads is None else listed(heads)
        if not self._layers:
            raise ValueError("layers is empty; give at least one attention layer to perturb")
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
        if self.is_conditional and self._enabled and scale:
            self._open.enter_context(_GuidedForward(self, denoiser, scale).attached())

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


class _GuidedForward:
    """One conditional forward of a denoiser and the perturbed one after it."""

    def __init__(self, owner: CrossAttentionGuider, denoiser: torch.nn.Module, scale: float) -> None:
        self._owner, self._denoiser, self._scale = owner, denoiser, scale
        self._layout = layout_of(denoiser)
        modules = self._layout.attention_modules(denoiser)
        options = owner._options
        layers = checked_layers(owner._layers, len(modules), type(denoiser).__name__)
        model_heads = int(denoiser.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
        heads = checked_heads(owner._heads, layers, model_heads, options.perturbation)
        check_transformer(denoiser)
        for layer in layers:
            check_processor(modules[layer].processor)
        self._pass = PerturbedPass(denoiser, self._layout, layers, heads)
        if options.perturbation == "skip":
            self._pass.check_left_out()
        self._attached = ExitStack()
        self._call: Any = None

    def attached(self) -> ExitStack:
        """Listen to the next forward; it stops by itself at the forward's end, also by an exception."""
        self._attached.enter_context(self._pass.watch())
        before = self._denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self._denoiser.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._attached.callback(before.remove)
        self._attached.callback(after.remove)
        return self._attached

    def _before(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = forward_arguments(denoiser, args, kwargs)
        self._arguments.pop("self")
        self._call = self._layout.read_call(denoiser, self._arguments)
        self._pass.keep_prefix(slice(0, self._call.batch))

    def _after(self, denoiser: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        try:
            if output is None or self._call is None:
                return
            options, rows = self._owner._options, slice(0, self._call.batch)
            renormalize = DEFAULT_RENORMALIZE if options.renormalize is None else options.renormalize
            perturbed = self._pass.run(self._arguments, self._call, rows, options.attention(renormalize))
            self._owner._shift = guidance_shift(prediction_of(output), perturbed, self._scale)
        finally:
            self._attached.close()
