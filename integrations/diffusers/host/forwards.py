"""Watching, wrapping and replacing forwards for as long as a block lasts, and leaving one early."""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from corrdit.integrations.diffusers.compatibility import has_compiled_blocks, is_offloaded
from corrdit.integrations.diffusers.host.parallel import token_group
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, forward_arguments

_ABSENT = object()
_blocks: weakref.WeakKeyDictionary[torch.nn.Module, list[OneThread]] = weakref.WeakKeyDictionary()
"""In which transformers are at the moment."""
Arguments = dict[str, Any]
"""Of a forward, by name."""
Forward = Callable[..., Any]
Replacement = Callable[[Forward, tuple[object, ...], Arguments], object]
"""`replacement(original, args, kwargs)` gives the output of the module."""


class EarlyExit(Exception):
    """Raised out of the last layer that is needed; caught where the transformer was called."""


class RemovableHook:
    """A forward hook that does nothing in a pickled or copied module, which is loaded without this package too."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, str]]:
        # What the standard library has that takes all arguments and does nothing.
        return (getattr, (contextlib.nullcontext(), "__exit__"))


class ReplacedForward:
    """A forward in place of another, which a pickled or copied module has again.

    Args:
        original: what it stands for.
        replacement: computes its output.
    """

    def __init__(self, original: Forward, replacement: Replacement) -> None:
        functools.update_wrapper(self, original)
        self._original, self._replacement = original, replacement

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._replacement(self._original, args, kwargs)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[list[Forward], int]]:
        return (operator.getitem, ([self._original], 0))


def transformers_of(model: object) -> list[torch.nn.Module]:
    """The transformers of a pipeline (Wan 2.2 has two), or the transformer itself."""
    if isinstance(model, torch.nn.Module):
        return [model]
    found = (getattr(model, name, None) for name in ("transformer", "transformer_2"))
    return [transformer for transformer in found if isinstance(transformer, torch.nn.Module)]


@contextlib.contextmanager
def watched_forwards(
    transformer: torch.nn.Module,
    layout: TransformerLayout,
    before: Callable[[ForwardCall, Arguments], None],
    after: Callable[[Any], object],
) -> Iterator[None]:
    """Inside the block, hear of every forward of a transformer.

    Args:
        transformer: to be watched.
        layout: of its family.
        before: `before(call, arguments by name)`.
        after: `after(output)`, with None after an exception; what it returns, unless None, is the output.

    Raises:
        ValueError: as `OneThread`; and out of the transformer, where a second thread calls it.
    """

    def begin(module: torch.nn.Module, args: tuple[object, ...], kwargs: Arguments) -> None:
        thread.check()
        arguments = forward_arguments(transformer, args, kwargs)
        before(layout.read_call(transformer, arguments), arguments)

    def end(module: torch.nn.Module, args: tuple[object, ...], output: object) -> object:
        # It follows a refused forward of another thread, too.
        return after(output) if thread.calls() else None

    with contextlib.ExitStack() as stack:
        thread = stack.enter_context(OneThread(transformer))
        stack.callback(transformer.register_forward_pre_hook(RemovableHook(begin), with_kwargs=True).remove)
        stack.callback(transformer.register_forward_hook(RemovableHook(end), always_call=True).remove)
        yield


class OneThread(contextlib.AbstractContextManager["OneThread"]):
    """A block in which the forwards of a transformer come from one thread, whichever calls it first.

    Of another thread, the steps and results of its run would be taken for those of the first.

    Raises:
        ValueError: on entering, where another thread has entered one and not left it.
    """

    def __init__(self, transformer: torch.nn.Module) -> None:
        self._transformer = transformer
        self._entered = threading.get_ident()
        self._caller: int | None = None

    def __enter__(self) -> OneThread:
        blocks = _blocks.setdefault(self._transformer, [])
        if any(block._entered != self._entered for block in blocks):
            raise self._refusal()
        blocks.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _blocks[self._transformer].remove(self)

    def calls(self) -> bool:
        """Whether it is this thread whose forwards belong to the block."""
        self._caller = threading.get_ident() if self._caller is None else self._caller
        return self._caller == threading.get_ident()

    def check(self) -> None:
        """Raises ValueError in another thread."""
        if not self.calls():
            raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(
            f"this {type(self._transformer).__name__} is in use in another thread (by a capture, a guidance or a "
            "transfer), and serves one at a time; let that end first, or load the model once for each thread"
        )


@contextlib.contextmanager
def watched_output(block: torch.nn.Module, see: Callable[[Any], object]) -> Iterator[None]:
    """Inside, `see(output)` follows every forward of a block; what it returns, unless None, is the output.

    It is no part of the graph of a block that was compiled in place.
    """
    compiled = block._compiled_call_impl
    if compiled is None:
        handle = block.register_forward_hook(RemovableHook(lambda module, args, output: see(output)))
        try:
            yield
        finally:
            handle.remove()
        return

    def call(*args: object, **kwargs: object) -> object:
        output = compiled(*args, **kwargs)
        seen = see(output)
        return output if seen is None else seen

    with _attribute(block, "_compiled_call_impl", call):
        yield


@contextlib.contextmanager
def replaced_forward(module: torch.nn.Module, replacement: Replacement, *, round_hooks: bool = False) -> Iterator[None]:
    """Inside, the module computes `replacement(original, args, kwargs)`, uncompiled; the hooks round it still run.

    Where diffusers' hooks (group offloading) wrap the forward, what they wrap is replaced, so that they run, too. With
    `round_hooks` they are part of the original instead: a replacement that runs the module several times needs them
    round each, or the first run would take the weights away from the others.
    """
    registry = None if round_hooks else getattr(module, "_diffusers_hook", None)
    holder: Any = registry._fn_refs[0] if registry is not None and registry._fn_refs else module
    with _attribute(holder, "forward", ReplacedForward(holder.forward, replacement)), uncompiled(module):
        yield


@contextlib.contextmanager
def uncompiled(module: torch.nn.Module) -> Iterator[None]:
    """Inside, a module that was compiled in place runs as written."""
    if module._compiled_call_impl is None:
        yield
        return
    with _attribute(module, "_compiled_call_impl", None):
        yield


@contextlib.contextmanager
def leaving_after(transformer: torch.nn.Module, layout: TransformerLayout, layer: int) -> Iterator[bool]:
    """Inside the block, forwards of the transformer end after attention layer `layer`.

    Normally the processor raises `EarlyExit` there, which is caught round the transformer's own forward; the call then
    returns None. Hooks that offload or spread tokens would miss the end of their module's forward, and compiled code
    cannot raise: there the blocks behind the layer are left out instead, and the call returns a prediction of no use.

    Yields:
        Whether the processor of the layer is to raise `EarlyExit`.
    """
    if is_offloaded(transformer) or has_compiled_blocks(transformer) or token_group(transformer) is not None:
        with contextlib.ExitStack() as stack:
            first, count = 0, len(layout.attention_modules(transformer))
            for name in layout.block_lists(transformer):
                original = transformer.get_submodule(name)
                blocks = dict(enumerate(original.children(), first))
                first += len(blocks)
                stack.callback(setattr, transformer, name, original)
                # Blocks behind the layers (Motif-Video's decoder) stay: the model counts them from the last.
                kept = [block for index, block in blocks.items() if not layer < index < count]
                setattr(transformer, name, torch.nn.ModuleList(kept))
            yield False
        return
    with replaced_forward(transformer, _until_read):
        yield True


def _until_read(forward: Forward, args: tuple[object, ...], kwargs: Arguments) -> object:
    try:
        return forward(*args, **kwargs)
    except EarlyExit:
        return None


@contextlib.contextmanager
def frozen(transformer: torch.nn.Module) -> Iterator[None]:
    """Weights without gradients inside the block.

    Raises:
        ValueError: weights made in inference mode, through which no gradient goes.
    """
    if any(weight.is_inference() for weight in transformer.parameters()):
        raise ValueError(
            f"the weights of this {type(transformer).__name__} were made in inference mode, where nothing can be "
            "optimised through them; load the model outside torch.inference_mode()"
        )
    trained = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextlib.contextmanager
def weights_kept_for_backward(model: object) -> Iterator[None]:
    """Inside, a backward pass later finds the weights of a model as they were in its forward.

    Autograd saves a weight as the parameter itself, whose contents the hooks of group offloading and layerwise casting
    exchange behind each forward. An alias of the contents stays as it is.
    """
    exchanged = any(hasattr(part, "_diffusers_hook") for own in transformers_of(model) for part in own.modules())
    with (
        torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _itself)
        if exchanged
        else contextlib.nullcontext()
    ):
        yield


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@contextlib.contextmanager
def _attribute(holder: torch.nn.Module, name: str, value: object) -> Iterator[None]:
    own = holder.__dict__.get(name, _ABSENT)
    holder.__dict__[name] = value
    try:
        yield
    finally:
        if own is _ABSENT:
            del holder.__dict__[name]
        else:
            holder.__dict__[name] = own
