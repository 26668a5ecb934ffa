"""The attention processor that reads queries and keys by delegating to the processor it replaces.

The tensors of the processor's call of attention are the queries and keys after normalisation and rotary embedding, text
included, in the order the model uses and before an attention backend quantises them; they go to an operation and are
freed. `host.attention` says how the call is seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.attention_inputs import AttentionInputs, calls_of_layer
from corrdit.integrations.diffusers.compatibility import check_attention_backend, check_processor
from corrdit.integrations.diffusers.host.attention import Attention, AttentionCall, DelegatingProcessor, Interceptors
from corrdit.integrations.diffusers.host.forwards import EarlyExit
from corrdit.integrations.diffusers.host.parallel import KEPT_GRAPH_IS_SPREAD, token_group
from corrdit.integrations.diffusers.result_guard import released, saved_tensors_kept_apart, unchanged

Operation = Callable[[Tensor, Tensor, Any, Tensor | None], Any]
"""`operation(q, k, grid, key_mask)`: q, k `[B, H, N, D]`, key_mask bool `[B, N]` or None; tensors out."""


@dataclass
class ReadRequest:
    """What one attention layer has to hand over in the forward that is running.

    Args:
        grid: the layer's token axis.
        operations: operation by name.
        named: whether results are kept by operation name even for one operation.
        rows: (branch, slice of the batch) to read; the branch is None where results are not told apart by branch.
        keep_graph: whether results stay attached to the autograd graph.
        deliver: takes the result.
        stop: whether nothing after this layer is needed.
        batch: samples of the forward; attention over fewer (a cache dropped a branch) is not read. None for any.
    """

    grid: TokenGrid | CrossGrid
    operations: Mapping[str, Operation]
    named: bool
    rows: tuple[tuple[str | None, slice], ...]
    keep_graph: bool
    deliver: Callable[[object], None]
    stop: bool = False
    batch: int | None = None


class CorrespondenceProcessor(DelegatingProcessor):
    """Drop-in attention processor: the inner processor's output, and an operation on its queries and keys.

    ```python
    block.attn1.processor = CorrespondenceProcessor(block.attn1.processor, grid, operation)
    model(...)
    block.attn1.processor.result
    block.attn1.processor = block.attn1.processor.inner
    ```

    A pickled or deep-copied instance is its inner processor, so a model that is saved while it is being read comes
    back as it was before.

    Args:
        inner: the processor of a self-attention module, as `module.processor` holds it.
        grid: the module's token axis; its number of tokens is checked at every forward. Text tokens that a family
            drops sample by sample (Mochi) count: pass the padded length.
        operation: `operation(q, k, grid, key_mask) -> tensors`, with q and k `[B, H, N, D]` after normalisation and
            rotary embedding and key_mask bool `[B, N]` or None, or a dict of such operations by name. It must neither
            write to q and k nor return a part of them.
        keep_graph: leave the result attached to the autograd graph.

    Attributes:
        inner: the processor that computes the attention.
        result: of the latest forward; a dict if `operation` was one.
        captured: whether an open capture put it in.

    Raises:
        ValueError: arguments that do not fit; at the forward, a token count other than the grid's, a module that is
            not self-attention, attention that cannot be seen (`capture` says which), or an operation that wrote to q
            or k or returned a part of them.
    """

    def __init__(
        self,
        inner: object,
        grid: TokenGrid | None,
        operation: Operation | Mapping[str, Operation] | None,
        *,
        keep_graph: bool = False,
    ) -> None:
        if not callable(inner) or isinstance(inner, type):
            raise ValueError(
                "CorrespondenceProcessor needs the attention processor it delegates to, as module.processor holds it, "
                f"got {inner!r}"
            )
        if isinstance(inner, Module) and hasattr(inner, "processor"):
            raise ValueError(
                f"CorrespondenceProcessor wraps a processor, and {type(inner).__name__} is the attention module; give "
                "its .processor"
            )
        super().__init__(inner)
        self.captured = False
        self._request: ReadRequest | None = None
        self._compiled_reads: list[AttentionInputs] = []
        self._compiled_text_mask: Tensor | None = None
        self._result: object = None
        self._fired = False
        # A capture makes processors without either and arms them before the forwards it wants.
        if grid is not None or operation is not None:
            if not isinstance(grid, TokenGrid):
                raise ValueError(f"CorrespondenceProcessor needs a TokenGrid, got {grid!r}")
            self._request = ReadRequest(
                grid=grid,
                operations=named_operations(operation),  # type: ignore[arg-type]
                named=isinstance(operation, Mapping),
                rows=((None, slice(None)),),
                keep_graph=keep_graph,
                deliver=self._keep,
            )

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output; queries and keys go to the operation."""
        request = self._request
        if request is None:
            return self.delegated(interceptors, attn, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._call_while_compiling(interceptors, attn, *args, **kwargs)
        if _recomputing():
            return self.delegated(interceptors, attn, *args, **kwargs)
        hidden_states = args[0] if args else kwargs["hidden_states"]
        assert isinstance(hidden_states, Tensor)
        # Without a batch where a forward packs one sample (Cosmos 3).
        batch = hidden_states.shape[0] if hidden_states.ndim > 2 else 1
        gathered = calls_of_layer(batch, request.grid, _text_mask(kwargs))
        group = token_group(self)
        if group is not None and request.keep_graph:
            raise ValueError(KEPT_GRAPH_IS_SPREAD)

        def observe(call: AttentionCall, attention: Attention) -> Tensor:
            inputs = AttentionInputs.of_call(call).whole(group).over_all_tokens(request.grid)
            if inputs is None:
                return attention(call)
            if gathered.add(inputs):
                self._fire(request, gathered.joined())
            # Where the forward ends here the real output is never used; but a checkpointed block runs again in backward
            # and has to make the same graph then.
            return torch.empty_like(call.query) if request.stop and not torch.is_grad_enabled() else attention(call)

        try:
            output = self.delegated((*interceptors, observe), attn, *args, **kwargs)
        except (AttributeError, RuntimeError, TypeError) as error:
            # Before the attention only the inner processor has run; inside a capture it is the module's own.
            if gathered.samples or self.captured or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{type(self.inner).__name__} fails on this {type(attn).__name__} before its attention is reached "
                f"({type(error).__name__}: {error}); wrap the processor that the module itself holds: "
                "module.processor = CorrespondenceProcessor(module.processor, grid, operation)"
            ) from error
        if not gathered.complete:
            check_attention_backend(self.inner)
            raise ValueError(
                f"{type(self.inner).__name__} did not call scaled_dot_product_attention for every sample (seen "
                f"{gathered.samples} of {gathered.batch}), so its queries and keys cannot be read; use a model whose "
                "self-attention is one softmax over all tokens, with a native attention backend"
            )
        return output

    def _call_while_compiling(
        self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object
    ) -> object:
        # Queries and keys become outputs of the compiled graph; the operation runs when they are collected.
        reads: list[AttentionInputs] = []

        def collect(call: AttentionCall, attention: Attention) -> Tensor:
            reads.append(AttentionInputs.of_call(call))
            return attention(call)

        output = self.delegated((*interceptors, collect), attn, *args, **kwargs)
        self._compiled_reads = reads
        self._compiled_text_mask = _text_mask(kwargs)
        return output

    def arm(self, request: ReadRequest) -> None:
        """Hand over queries and keys in the forwards that follow.

        Raises:
            ValueError: the inner processor's attention cannot be read.
        """
        check_processor(self.inner, spread=True)
        self._request = request

    def leave_when_read(self) -> None:
        """End the forward that follows once this layer has handed over its queries and keys."""
        if self._request is not None:
            self._request = dataclasses.replace(self._request, stop=True)

    def disarm(self) -> None:
        """Pass everything through."""
        self._request = None
        self._compiled_reads = []

    def release(self) -> None:
        """Belong to no open capture any more."""
        self.captured = False
        self.disarm()

    @property
    def passes_through(self) -> bool:
        """Whether it reads nothing and belongs to no open capture."""
        return self._request is None and not self.captured

    def collect_compiled(self) -> None:
        """Run the operation on what a compiled block read; does nothing if there is nothing to collect."""
        reads, self._compiled_reads = self._compiled_reads, []
        if not reads or self._request is None:
            return
        group, grid = token_group(self), self._request.grid
        joined = (inputs.whole(group).over_all_tokens(grid) for inputs in reads)
        whole = [inputs for inputs in joined if inputs is not None]
        batch = sum(inputs.query.shape[0] for inputs in whole)
        gathered = calls_of_layer(batch, self._request.grid, self._compiled_text_mask)
        for inputs in whole:
            gathered.add(inputs)
        self._fire(self._request, gathered.joined())

    @property
    def result(self) -> Any:
        """What the operation returned in the latest forward.

        Raises:
            ValueError: the processor has not been called since it was made.
        """
        self.collect_compiled()
        if not self._fired:
            raise ValueError(
                "this CorrespondenceProcessor has no result: no forward has gone through it; assign it to "
                "module.processor of a self-attention module and run the model first"
            )
        return self._result

    def _keep(self, result: object) -> None:
        self._result = result
        self._fired = True

    def _fire(self, request: ReadRequest, inputs: AttentionInputs) -> None:
        if request.batch is not None and len(inputs.query) < request.batch:
            return
        results: dict[str | None, object] = {}
        with _operation_context(request, inputs.query):
            for branch, rows in request.rows:
                q, k = inputs.query[rows], inputs.key[rows]
                key_mask = None if inputs.key_mask is None else inputs.key_mask[rows]
                if not request.keep_graph:
                    q, k = q.detach(), k.detach()
                by_name = {}
                for name, operation in request.operations.items():
                    with unchanged(q, k, name):
                        by_name[name] = released(operation(q, k, request.grid, key_mask), q, k, request.keep_graph)
                results[branch] = by_name if request.named else next(iter(by_name.values()))
        request.deliver(results.get(None, results))
        if request.stop:
            raise EarlyExit


def named_operations(operation: Operation | Mapping[str, Operation]) -> dict[str, Operation]:
    """An operation, or operations by name, as a checked dict.

    Raises:
        ValueError: not callable, or an empty dict.
    """
    operations = dict(operation) if isinstance(operation, Mapping) else {"operation": operation}
    if not operations:
        raise ValueError("operation is an empty dict; give at least one operation(q, k, grid, key_mask)")
    for name, candidate in operations.items():
        if not callable(candidate):
            raise ValueError(
                f"operation {name!r} must be a function operation(q, k, grid, key_mask) -> tensors, got {candidate!r}"
            )
    return operations


@contextlib.contextmanager
def _operation_context(request: ReadRequest, query: Tensor) -> Iterator[None]:
    """Gradients only if asked for, the tensors' own precision, and nothing saved in a checkpointed block."""
    if request.keep_graph and not torch.is_grad_enabled():
        warnings.warn(
            "keep_graph=True, but this forward runs without autograd (torch.no_grad(), the call of a pipeline, or "
            "reentrant checkpointing), so results have no graph; call the transformer itself with autograd on",
            UserWarning,
            stacklevel=2,
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(request.keep_graph and torch.is_grad_enabled()))
        stack.enter_context(torch.autocast(query.device.type, enabled=False))
        if request.keep_graph:
            stack.enter_context(saved_tensors_kept_apart())
        yield


def without_leftover(processor: object) -> object:
    """The processor itself, or what a closed capture's processor passes everything to.

    A model can be given such a processor back: `saved = transformer.attn_processors` inside the capture, or the copy
    that `fuse_qkv_projections` keeps there, put back after it.
    """
    while isinstance(processor, CorrespondenceProcessor) and processor.passes_through:
        processor = processor.inner
    return processor


def _recomputing() -> bool:
    """Whether this call is gradient checkpointing's second forward, which runs inside the backward pass."""
    return torch._C._current_graph_task_id() != -1


def _text_mask(arguments: Mapping[str, object]) -> Tensor | None:
    """The `[B, T]` mask of a family that drops text padding before it calls attention (Mochi)."""
    mask = arguments.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
