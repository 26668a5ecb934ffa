"""The one place that sees a model's calls of attention: processors that delegate to the one they replace.

The stock processor runs unchanged. Most families call diffusers' `dispatch_attention_fn`, by which the attention
backend is chosen: the processor's `__call__` runs with a private copy of its module's globals in which that name is
ours, so every backend can be seen and nothing global is changed. The others call `scaled_dot_product_attention` itself,
which a local `TorchFunctionMode` sees (where somebody assigned another function to it, the copy of the globals holds
ours). What nobody changes is passed on as it was given, so the model's output stays the same to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

SCALED_DOT_PRODUCT_ATTENTION = torch._C._nn.scaled_dot_product_attention
DISPATCHERS = ("dispatch_attention_fn", "_dispatch_attention_fn")
"""What diffusers (and plug-ins that bring processors of their own) call the function that chooses the backend."""
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
"""Arguments behind query, key and value, in the order both functions take them."""


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention.

    Args:
        query, key, value: `[B, H, N, D]`.
        args, kwargs: further arguments as they were given.
        dispatched: whether the call was one of diffusers' dispatcher.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    dispatched: bool = False

    def changed(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
        """The same call of other tensors."""
        return AttentionCall(query, key, value, self.args, self.kwargs, self.dispatched)

    def masked(self, mask: Tensor | None) -> AttentionCall:
        """The same call with another mask, `[B, H, N, N]` or broadcastable to it."""
        kwargs = {**dict(zip(OPTIONS, self.args, strict=False)), **self.kwargs, "attn_mask": mask}
        return AttentionCall(self.query, self.key, self.value, (), kwargs, self.dispatched)

    def as_attended(self) -> AttentionCall:
        """The same call with query, key and value as attention computes with them: under autocast in its dtype.

        A model may give some of them in float32, such as rotated queries, and leave the cast to attention.
        """
        kind = self.query.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        wide = torch.float64
        return self.changed(*(t if t.dtype == wide else t.to(dtype) for t in (self.query, self.key, self.value)))

    @property
    def mask(self) -> Tensor | None:
        """The attention mask, broadcastable to `[B, H, N, N]`.

        Raises:
            ValueError: a mask that is no tensor.
        """
        mask = self._option("attn_mask")
        if mask is None:
            return None
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"the model gives its attention a {type(mask).__name__} instead of a mask over keys, so it is not full "
                "self-attention; sparse, block-causal and windowed attention are not supported"
            )
        # Over keys, which the dispatcher takes without the axes of heads and queries.
        return mask[:, None, None] if self.dispatched and mask.ndim == 2 else mask

    @property
    def causal(self) -> bool:
        """Whether a query sees the keys up to its own only."""
        return bool(self._option("is_causal"))

    @property
    def scale(self) -> float:
        """The factor of q.k."""
        scale = self._option("scale")
        return self.query.shape[-1] ** -0.5 if scale is None else float(scale)

    def _option(self, name: str) -> Any:
        index = OPTIONS.index(name)
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)


Attention = Callable[[AttentionCall], Tensor]
"""Computes a call: `[B, H, N, D]`."""
Interceptor = Callable[[AttentionCall, Attention], Tensor]
"""`interceptor(call, attention)` answers a call, as a rule by `attention(call)`, what would answer it otherwise."""
Interceptors = tuple[Interceptor, ...]
"""The first sees a call first."""


class DelegatingProcessor:
    """Drop-in attention processor that sees the attention calls of the processor it replaces.

    Processors may wrap each other: those that change a call come before those that read it, whichever is outside.
    A pickled or deep-copied instance is its inner processor, so a model that is saved while one is in it comes back as
    it was before.

    Args:
        inner: the processor that computes the attention.
    """

    def __new__(cls, inner: object, *args: object, **kwargs: object) -> DelegatingProcessor:
        return object.__new__(_with_argument_names(cls, type(inner)))

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        # Made here, because the compiler can follow a call of such a function and not its making.
        function = _call_of(type(inner))
        self._traced = None if function is None else _traced_view(function)

    def call(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The output of the processor for its arguments.

        Args:
            interceptors: of processors round this one; this one's come before or behind them.
            attn: the attention module.
            args, kwargs: further arguments of the processor.
        """
        return self.delegated(interceptors, attn, *args, **kwargs)

    def delegated(self, interceptors: Interceptors, attn: Module, /, *args: object, **kwargs: object) -> object:
        """The inner processor's output, whose attention calls the interceptors see."""
        inner = self.inner
        if isinstance(inner, DelegatingProcessor):
            return inner.call(interceptors, attn, *args, **kwargs)
        if not interceptors:
            return inner(attn, *args, **kwargs)
        if torch.compiler.is_compiling() and self._traced is not None:
            _traced_interceptors.append(interceptors)
            try:
                return self._traced(inner, attn, *args, **kwargs)
            finally:
                _traced_interceptors.pop()
        if not torch.compiler.is_compiling():
            view = _view_of(type(inner), interceptors)
            if view is not None:
                return view(inner, attn, *args, **kwargs)
        with intercepting(interceptors):
            return inner(attn, *args, **kwargs)

    @property
    def _attention_backend(self) -> object:
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, backend: object) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> object:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: object) -> None:
        self.inner._parallel_config = config

    def __reduce__(self) -> tuple[Callable[..., object], tuple[list[Any], int]]:
        # Of the standard library, so that the copy is loaded without this package too.
        return (operator.getitem, ([self.inner], 0))


@contextlib.contextmanager
def processors_wrapped(
    modules: Sequence[Any], layers: Iterable[int], wrap: Callable[[int, object], DelegatingProcessor]
) -> Iterator[None]:
    """Processors of the attention modules of some layers replaced by `wrap(layer, processor)` inside the block.

    What something else put in their place meanwhile stays.
    """
    with contextlib.ExitStack() as stack:
        for layer in layers:
            wrapped = wrap(layer, modules[layer].processor)
            modules[layer].processor = wrapped
            stack.callback(_unwrap, modules[layer], wrapped)
        yield


def _unwrap(module: Any, wrapped: DelegatingProcessor) -> None:
    if module.processor is wrapped:
        module.processor = wrapped.inner


class intercepting(TorchFunctionMode):
    """Inside, calls of `torch.nn.functional.scaled_dot_product_attention` go through interceptors, the first first."""

    def __init__(self, interceptors: Iterable[Interceptor]) -> None:
        super().__init__()
        self._interceptors = tuple(interceptors)

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is SCALED_DOT_PRODUCT_ATTENTION:
            return _answered(SCALED_DOT_PRODUCT_ATTENTION, self._interceptors, False, *args, **(kwargs or {}))
        if func is Tensor.unflatten:
            # The method asks for its base class's, which torch.compile cannot follow under a function mode.
            func = torch.unflatten
        return func(*args, **(kwargs or {}))


def calls_dispatcher(processor_class: type) -> bool:
    """Whether a processor is known to call diffusers' dispatcher, so that attention is seen whatever its backend."""
    function = _call_of(processor_class)
    return function is not None and _dispatcher_of(function) is not None


def _answered(
    function: Callable[..., Tensor], interceptors: Interceptors, dispatched: bool, *args: Any, **kwargs: Any
) -> Tensor:
    """A call of attention, as the interceptors have it; the dispatcher's tensors are `[B, N, H, D]`."""
    tensors = [args[index] if len(args) > index else kwargs.pop(name) for index, name in enumerate(_TENSORS)]
    query, key, value = [tensor.transpose(1, 2) for tensor in tensors] if dispatched else tensors
    output = _computed(function, interceptors, AttentionCall(query, key, value, args[3:], kwargs, dispatched))
    return output.transpose(1, 2) if dispatched else output


def _computed(function: Callable[..., Tensor], interceptors: Interceptors, call: AttentionCall) -> Tensor:
    if interceptors:
        return interceptors[0](call, functools.partial(_computed, function, interceptors[1:]))
    tensors = (call.query, call.key, call.value)
    if not call.dispatched:
        return function(*tensors, *call.args, **call.kwargs)
    output = function(*(tensor.transpose(1, 2) for tensor in tensors), *call.args, **call.kwargs)
    return output.transpose(1, 2)


_TENSORS = ("query", "key", "value")
_traced_interceptors: list[Interceptors] = []
"""Of the processors the compiler is inside of; a compiled graph is shared by processors, so none can hold its own."""


def _traced(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return _answered(function, _traced_interceptors[-1], True, *args, **kwargs)


def _call_of(processor_class: type) -> FunctionType | None:
    function = processor_class.__call__  # type: ignore[operator]
    return function if isinstance(function, FunctionType) else None


def _dispatcher_of(function: FunctionType) -> str | None:
    """The dispatcher's name in the code of a processor, None where it does not call it."""
    used = set(function.__code__.co_names) & function.__globals__.keys()
    return next((name for name in DISPATCHERS if name in used), None)


def _view_of(processor_class: type, interceptors: Interceptors) -> Callable[..., object] | None:
    """A processor's `__call__` whose attention calls the interceptors see; None where a function mode has to."""
    function = _call_of(processor_class)
    if function is None:
        return None
    dispatcher = _dispatcher_of(function)
    if dispatcher is not None:
        original = function.__globals__[dispatcher]
        return _with_globals(function, {dispatcher: functools.partial(_answered, original, interceptors, True)})
    assigned = F.scaled_dot_product_attention
    if assigned is SCALED_DOT_PRODUCT_ATTENTION:
        return None
    names = [name for name in function.__code__.co_names if function.__globals__.get(name) is F]
    functional = _Functional(functools.partial(_answered, assigned, interceptors, False))
    return _with_globals(function, dict.fromkeys(names, functional)) if names else None


@functools.cache
def _traced_view(function: FunctionType) -> Callable[..., object] | None:
    dispatcher = _dispatcher_of(function)
    if dispatcher is None:
        return None
    return _with_globals(function, {dispatcher: functools.partial(_traced, function.__globals__[dispatcher])})


def _with_globals(function: FunctionType, changes: Mapping[str, object]) -> FunctionType:
    scope = {**function.__globals__, **changes}
    # By it the compiler would look names up in the module itself.
    scope.pop("__name__", None)
    view = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    view.__kwdefaults__ = function.__kwdefaults__
    return view


class _Functional:
    """`torch.nn.functional` with another scaled_dot_product_attention."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> object:
        return getattr(F, name)


_classes: dict[tuple[type, type], type] = {}


def _with_argument_names(base: type, inner: type) -> type:
    """`base` with the argument names of `inner.__call__`.

    Attention modules pass on only the keyword arguments they find in the signature of the processor's `__call__`; a
    processor that takes `**kwargs` would silently lose the rotary embedding.
    """
    if (base, inner) not in _classes:

        def __call__(self: DelegatingProcessor, attn: Module, *args: object, **kwargs: object) -> object:
            return self.call((), attn, *args, **kwargs)

        __call__.__signature__ = inspect.signature(inner.__call__)  # type: ignore[attr-defined, operator]
        body = {"__call__": __call__, "__module__": base.__module__, "__doc__": base.__doc__}
        _classes[base, inner] = type(base.__name__, (base,), body)
    return _classes[base, inner]
