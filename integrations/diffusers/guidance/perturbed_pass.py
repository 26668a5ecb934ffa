"""The second forward: one branch of the batch again, from the first perturbed layer on.

Up to that layer the perturbed sample equals the one it is a copy of. So what the last block before it returned is kept
in the pipeline's own forward, and the blocks of this prefix return it in the second forward instead of computing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.guidance.perturbations import AttentionFunction, PerturbingProcessor
from corrdit.integrations.diffusers.host.attention import processors_wrapped
from corrdit.integrations.diffusers.host.forwards import (
    Arguments,
    Forward,
    Replacement,
    replaced_forward,
    uncompiled,
    watched_output,
)
from corrdit.integrations.diffusers.host.steps import map_tensors, rows_of
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout
from corrdit.integrations.diffusers.processors import CorrespondenceProcessor


class PerturbedPass:
    """Keeps the prefix of one transformer's forwards and runs the second ones.

    Args:
        transformer: the model.
        layout: of its family.
        layers: perturbed attention layers, sorted and non-negative.
        heads: perturbed heads by layer; a layer that is not named is perturbed in all heads.

    Raises:
        ValueError: blocks and attention layers that do not correspond one to one.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        layout: TransformerLayout,
        layers: tuple[int, ...],
        heads: Mapping[int, tuple[int, ...]],
    ) -> None:
        self._transformer = transformer
        self._layers, self._heads = layers, dict(heads)
        self._modules = layout.attention_modules(transformer)
        names = layout.block_lists(transformer)
        self._lists = [list(transformer.get_submodule(name).children()) for name in names]
        self._blocks = [block for blocks in self._lists for block in blocks]
        _check_correspondence(transformer, self._blocks, self._modules)
        self._rows: slice | None = None
        self._kept: dict[int, object] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, listen to the ends of the prefix."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.forget)
            for index in self._prefix_ends():
                stack.enter_context(watched_output(self._blocks[index], functools.partial(self._keep, index)))
            yield

    def keep_prefix(self, rows: slice, batch: int) -> None:
        """Keep these samples of the next forward, which has so many."""
        self._kept.clear()
        # The blocks of a forward that packs one sample (Cosmos 3) have no batch to take it from.
        self._rows = rows if batch > 1 else slice(None)

    def forget(self) -> None:
        """Let go of what was kept."""
        self._kept.clear()
        self._rows = None

    def run(
        self,
        arguments: Arguments,
        call: ForwardCall,
        rows: slice,
        attention: AttentionFunction | None,
    ) -> torch.Tensor:
        """The prediction for these samples with perturbed layers.

        Args:
            arguments: of the forward whose prefix was kept, by name.
            call: the same forward.
            rows: the samples.
            attention: of the perturbed layers; None leaves their blocks out (they return what they are given).

        Raises:
            ValueError: attention that cannot be perturbed.
        """
        count = len(range(*rows.indices(call.batch)))
        chosen = rows_of(arguments, rows, call.batch)
        with contextlib.ExitStack() as stack:
            stack.callback(self.forget)
            stack.enter_context(_reading_suspended(self._modules))
            for index, block in enumerate(self._blocks[: self._layers[0]]):
                stack.enter_context(replaced_forward(block, self._kept_output(index)))
            for layer in self._layers:
                block = self._blocks[layer]
                if attention is None:
                    stack.enter_context(replaced_forward(block, functools.partial(_leave_out, block)))
                else:
                    stack.enter_context(uncompiled(block))
            if attention is not None:
                perturbing = functools.partial(self._perturbing, attention, call.grid, count)
                stack.enter_context(processors_wrapped(self._modules, self._layers, perturbing))
            return prediction_of(self._transformer.forward(**chosen))

    def check_left_out(self) -> None:
        """Raises ValueError where the blocks of the perturbed layers cannot be left out."""
        for layer in self._layers:
            _check_can_be_left_out(self._blocks[layer])

    def _prefix_ends(self) -> list[int]:
        """The last block before the first perturbed one, and the last of each list of blocks that ends earlier."""
        first = self._layers[0]
        lengths = [len(blocks) for blocks in self._lists]
        ends = [sum(lengths[: position + 1]) - 1 for position in range(len(lengths))]
        return [end for end in ends if end < first - 1] + ([first - 1] if first else [])

    def _keep(self, index: int, output: object) -> None:
        if self._rows is None:
            return
        # Of an earlier list only the shape matters: everything computed from it is replaced by the last end.
        copy = torch.clone if index == self._layers[0] - 1 else _placeholder
        self._kept[index] = map_tensors(output, lambda tensor: copy(tensor[self._rows]))

    def _kept_output(self, index: int) -> Replacement:
        """What block `index` of the prefix returns: the output of the first end at or after it."""
        end = next(end for end in self._prefix_ends() if end >= index)

        def kept(original: Forward, args: object, kwargs: object) -> object:
            return self._kept[end]

        return kept

    def _perturbing(
        self, attention: AttentionFunction, grid: TokenGrid, batch: int, layer: int, inner: object
    ) -> PerturbingProcessor:
        return PerturbingProcessor(inner, attention, grid, self._heads.get(layer), batch)


@contextlib.contextmanager
def _reading_suspended(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, a capture of the same model reads nothing: its results are those of the pipeline's own forward."""
    processors = [module.processor for module in modules if isinstance(module.processor, CorrespondenceProcessor)]
    requests = [processor._request for processor in processors]
    try:
        for processor in processors:
            processor._request = None
        yield
    finally:
        for processor, request in zip(processors, requests, strict=True):
            processor._request = request


def prediction_of(output: Any) -> torch.Tensor:
    """The prediction in what a transformer's forward returned, of one video where it returns a list of them."""
    prediction: torch.Tensor | list[torch.Tensor] = output[0]
    return prediction[0] if isinstance(prediction, list) else prediction


def _check_can_be_left_out(block: torch.nn.Module) -> None:
    """Raises ValueError for a block of which diffusers does not say how its outputs follow its inputs."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        TransformerBlockRegistry.get(type(block))
    except ValueError:
        raise ValueError(
            f"diffusers does not say which outputs of {type(block).__name__} belong to which inputs, so such blocks "
            'cannot be left out; use perturbation="cross_frame" or "identity"'
        ) from None


def _leave_out(block: torch.nn.Module, original: Forward, args: tuple[object, ...], kwargs: Arguments) -> object:
    """The block's inputs in the form of its outputs, by diffusers' own table of blocks."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    metadata = TransformerBlockRegistry.get(type(block))

    def given(which: str) -> object:
        # In older versions of diffusers they had these names in every block.
        name = getattr(metadata, f"{which}_argument_name", which)
        return metadata._get_parameter_from_args_kwargs(name, args, kwargs)

    hidden = given("hidden_states")
    if metadata.return_encoder_hidden_states_index is None:
        return hidden
    text = given("encoder_hidden_states")
    return (hidden, text) if metadata.return_hidden_states_index == 0 else (text, hidden)


def _check_correspondence(
    transformer: torch.nn.Module, blocks: list[torch.nn.Module], modules: list[torch.nn.Module]
) -> None:
    # Blocks behind the layers (Motif-Video's decoder) run as they are.
    if len(blocks) < len(modules) or any(
        all(module is not part for part in block.modules()) for block, module in zip(blocks, modules, strict=False)
    ):
        raise ValueError(
            f"{type(transformer).__name__} has {len(blocks)} blocks and {len(modules)} self-attention layers that do "
            "not belong to each other one by one, so a second forward cannot start at a layer; correct block_lists "
            "and attention_modules of its layout"
        )


def _placeholder(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the tensor's shape that take no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)
