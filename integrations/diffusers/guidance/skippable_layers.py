"""Video transformers made fit for the guiders of diffusers that skip parts of layers.

`PerturbedAttentionGuidance` (PAG), `SkipLayerGuidance` (SLG; with `skip_attention` alone STG) and `AutoGuidance` look
up in tables of diffusers what a skipped layer returns, in which most attention processors of video transformers, and
some of their blocks, are missing. Here processors and blocks stand in the tables for as long as a block lasts.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from diffusers.hooks._common import _ATTENTION_CLASSES
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from torch import Tensor
from torch.nn import Module

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.guidance.perturbations import SubstituteAttention, identity_attention
from corrdit.integrations.diffusers.host.attention import DelegatingProcessor, Interceptors, processors_wrapped
from corrdit.integrations.diffusers.host.forwards import Arguments, transformers_of, watched_forwards
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of


class SkippableProcessor(DelegatingProcessor):
    """Drop-in attention processor that diffusers' hooks may skip.

    Where they skip its scores (PAG), a video token sees itself and the text only, under any attention backend. Their
    own mode knows scaled_dot_product_attention alone, and takes the text's attention away, too.

    Args:
        inner: the processor it delegates to.
        grid: gives the token axis of the forward in progress.
    """

    def __init__(self, inner: object, grid: Callable[[], TokenGrid]) -> None:
        super().__init__(inner)
        self._grid = grid

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output."""
        if _scores_are_skipped(attn):
            interceptors = (*interceptors, SubstituteAttention(identity_attention, self._grid(), None))
        return self.delegated(interceptors, attn, *args, **kwargs)


@contextlib.contextmanager
def layer_skipping(model: Any) -> Iterator[None]:
    """Inside, diffusers' guiders that skip parts of layers run on a video model; behind it all is as it was.

    ```python
    with layer_skipping(pipe):
        pipe.update_components(guider=PerturbedAttentionGuidance(perturbed_guidance_layers=[13]))
        pipe(...)
    ```

    The perturbed prediction is that of `CrossAttentionGuidance` with `perturbation="identity"` for PAG, and with "skip"
    for whole layers. A layer whose attention alone is skipped (STG) goes on with what the attention was given, as in
    diffusers. Of models with two lists of blocks (HunyuanVideo) a `LayerSkipConfig` names one as `fqn`. Open a capture
    of the same model round it, not inside.

    Args:
        model: a diffusers video pipeline, or a bare transformer.

    Raises:
        ValueError: a model that is not known.
    """
    with contextlib.ExitStack() as stack:
        for transformer in transformers_of(model):
            _make_skippable(transformer, layout_of(transformer), stack)
        yield


def _make_skippable(transformer: Module, layout: TransformerLayout, stack: contextlib.ExitStack) -> None:
    modules = layout.attention_modules(transformer)
    running: list[ForwardCall] = []

    def before(call: ForwardCall, arguments: Arguments) -> None:
        running[:] = [call]

    stack.enter_context(watched_forwards(transformer, layout, before, lambda output: None))
    stack.enter_context(
        processors_wrapped(
            modules, range(len(modules)), lambda layer, inner: SkippableProcessor(inner, lambda: running[0].grid)
        )
    )
    given = _given if layout.text is None else _given_with_text
    for kind in {type(module.processor) for module in modules}:
        _registered(stack, AttentionProcessorRegistry, kind, AttentionProcessorMetadata(given))
    for name in layout.block_lists(transformer):
        for block in transformer.get_submodule(name).children():
            _mark_kinds_of_attention(block, modules, stack)
            metadata = _block_metadata(type(block), layout)
            if metadata is not None:
                _registered(stack, TransformerBlockRegistry, type(block), metadata)


def _mark_kinds_of_attention(block: Module, modules: list[Module], stack: contextlib.ExitStack) -> None:
    """Says of attention modules whether they are self-attention, which diffusers asks and some do not say."""
    for part in block.modules():
        if isinstance(part, _ATTENTION_CLASSES) and not hasattr(part, "is_cross_attention"):
            part.is_cross_attention = all(part is not module for module in modules)  # type: ignore[assignment]
            stack.callback(delattr, part, "is_cross_attention")


def _block_metadata(kind: type[Module], layout: TransformerLayout) -> TransformerBlockMetadata | None:
    """How the outputs of a block follow its inputs; None where its arguments do not say."""
    names = inspect.signature(kind.forward).parameters
    # Blocks with a stream of audio (LTX-2) return it as their second output, which the hook cannot be told.
    if "hidden_states" not in names or "audio_hidden_states" in names:
        return None
    if layout.text is None:
        return TransformerBlockMetadata(return_hidden_states_index=0)
    return TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)


def _registered(stack: contextlib.ExitStack, registry: Any, kind: type, metadata: object) -> None:
    """A class in one of diffusers' tables until the stack closes; one that is there already stays as it is."""
    try:
        registry.get(kind)
    except ValueError:
        registry.register(kind, metadata)
        stack.callback(registry._registry.pop, kind, None)


def _scores_are_skipped(attn: Module) -> bool:
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    return any(isinstance(hook, AttentionProcessorSkipHook) and hook.skip_attention_scores for hook in hooks.values())


def _given(attn: Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    """What a skipped attention module of video alone returns."""
    return hidden_states


def _given_with_text(
    attn: Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """What a skipped attention module of video and text returns."""
    return hidden_states, encoder_hidden_states
