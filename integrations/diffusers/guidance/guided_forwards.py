"""Forwards of one transformer, each followed by a perturbed one where guidance wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from corrdit.integrations.diffusers.compatibility import check_processor, check_transformer
from corrdit.integrations.diffusers.guidance.options import GuidanceOptions
from corrdit.integrations.diffusers.guidance.perturbed_pass import PerturbedPass, prediction_of
from corrdit.integrations.diffusers.host.forwards import Arguments, watched_forwards
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of


@dataclass(frozen=True)
class GuidedSamples:
    """Which samples of a forward are guided, and how.

    Args:
        rows: the samples.
        scale: s, above 0.
        renormalize: as for `CrossAttentionGuidance`.
    """

    rows: slice
    scale: float
    renormalize: bool


class GuidedForwards:
    """Listens to the forwards of a transformer and runs the perturbed ones behind them.

    Args:
        transformer: the model.
        layers: perturbed attention layers, sorted and non-negative.
        heads: perturbed heads by layer.
        options: of the guidance.
        wanted: `wanted(layout, call)` before a forward: the samples to guide, or None.
        finished: `finished(output, shift)` after it, not after an exception: the output to go on with, or None for the
            model's own. The shift is s (c - p) of the wanted samples, or None.

    Raises:
        ValueError: blocks and attention layers that do not correspond one to one.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        layers: tuple[int, ...],
        heads: Mapping[int, tuple[int, ...]],
        options: GuidanceOptions,
        wanted: Callable[[TransformerLayout, ForwardCall], GuidedSamples | None],
        finished: Callable[[object, torch.Tensor | None], object],
    ) -> None:
        self._transformer, self._layers, self._options = transformer, layers, options
        self._wanted, self._finished = wanted, finished
        self._layout = layout_of(transformer)
        self._pass = PerturbedPass(transformer, self._layout, layers, heads)
        self._guided: tuple[GuidedSamples, ForwardCall, Arguments] | None = None
        self._attached = ExitStack()
        self._once = False

    def check(self) -> None:
        """Raises ValueError, with the reason, where the transformer cannot be guided now."""
        modules = self._layout.attention_modules(self._transformer)
        try:
            check_transformer(self._transformer)
            for layer in self._layers:
                check_processor(modules[layer].processor)
        except ValueError as error:
            raise ValueError(f"this model cannot be guided: {error}") from error
        if self._options.perturbation == "skip":
            self._pass.check_left_out()

    def attach(self, *, once: bool = False) -> ExitStack:
        """Listen until the result closes; with `once` to one forward, also one that ends in an exception."""
        self._once, self._guided = once, None
        with ExitStack() as attached:
            attached.enter_context(self._pass.watching())
            attached.enter_context(watched_forwards(self._transformer, self._layout, self._before, self._after))
            self._attached = attached.pop_all()
        return self._attached

    def _before(self, call: ForwardCall, arguments: Arguments) -> None:
        self._guided = None
        self._pass.forget()
        samples = self._wanted(self._layout, call)
        if samples is not None:
            self._guided = (samples, call, arguments)
            self._pass.keep_prefix(samples.rows, call.batch)

    def _after(self, output: object) -> object:
        guided, self._guided = self._guided, None
        try:
            if output is None:
                return None
            shift = None
            if guided is not None:
                samples, call, arguments = guided
                attention = self._options.attention(samples.renormalize)
                perturbed = self._pass.run(arguments, call, samples.rows, attention)
                shift = _shift(prediction_of(output)[samples.rows], perturbed, samples.scale)
            return self._finished(output, shift)
        finally:
            self._pass.forget()
            if self._once:
                self._attached.close()


def _shift(conditional: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    """s (c - p), in float32 at least."""
    precise = torch.promote_types(conditional.dtype, torch.float32)
    return scale * (conditional.to(precise) - perturbed.to(precise))
