"""Reading queries and keys of chosen layers and steps while a pipeline or transformer runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from corrdit.arguments import choice, flag, resolved_index, whole_indices
from corrdit.display import outline, table_html
from corrdit.integrations.diffusers.compatibility import check_processor, check_transformer, has_compiled_blocks
from corrdit.integrations.diffusers.host.attention import processors_wrapped
from corrdit.integrations.diffusers.host.forwards import (
    Arguments,
    leaving_after,
    transformers_of,
    watched_forwards,
    weights_kept_for_backward,
)
from corrdit.integrations.diffusers.host.layers import Layers, layer_count, layer_list
from corrdit.integrations.diffusers.host.parallel import check_spread
from corrdit.integrations.diffusers.host.skipped import Firings, run_whole
from corrdit.integrations.diffusers.host.steps import PipelineSteps, TransformerSteps, branches_of
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of
from corrdit.integrations.diffusers.processors import (
    CorrespondenceProcessor,
    Operation,
    ReadRequest,
    named_operations,
    without_leftover,
)
from corrdit.integrations.diffusers.text_attention import TextAttention

BRANCHES = ("cond", "uncond", "both")
CaptureCallback = Callable[[int, int, Any], None]


def capture(
    model: Any,
    *,
    layers: Layers,
    steps: int | Iterable[int] | None = None,
    operation: Operation | Mapping[str, Operation],
    branch: str | None = None,
    callback: CaptureCallback | None = None,
    keep_graph: bool = False,
    early_exit: bool = False,
    on_skip: str = "error",
    attention: str = "self",
) -> Capture:
    """Run an operation on the queries and keys of chosen layers at chosen steps, changing nothing else.

    ```python
    with capture(pipe, layers=[17], steps=[-1], operation=operation) as captured:
        pipe(prompt)
    captured[49, 17]
    ```

    Args:
        model: a diffusers video pipeline (or a backbone, for its pipeline), or a bare transformer. Blocks may be
            compiled one by one; their queries and keys then live until the end of the forward. Inside the block its
            forwards come from one thread; a model that several threads share is loaded once for each. Under diffusers'
            context parallelism (`enable_parallelism`) every process opens the same capture, and has all tokens in it.
        layers: indices over all attention blocks in the order they run (HunyuanVideo: dual, then single);
            negative ones count from the last; or "all".
        steps: denoising steps of the pipeline's loop, negative ones counted from the last; None for every step.
            For a bare transformer a step is a distinct timestep in the order of calls, and none may be negative.
        operation: `operation(q, k, grid, key_mask) -> tensors` with q, k `[B, H, N, D]` after normalisation and rotary
            embedding, text included, `grid` the `TokenGrid` of the layer and key_mask bool `[B, N]` or None; or a dict
            of them by name, whose results are then a dict. It must not write to q and k nor return a part of them.
        branch: "cond", "uncond" or "both" of classifier-free guidance, whether the pipeline puts the two into one
            batch or calls twice; results of "both" are {"cond": ..., "uncond": ...}. None means "cond" for a pipeline
            and the whole batch, as given, for a bare transformer.
        callback: `callback(step, layer, result)`, called as soon as a result is there; results are then not kept.
            With "both", two calls of the model give two callbacks.
        keep_graph: leave results attached to the autograd graph.
        early_exit: for a bare transformer only: stop each forward once the last of `layers` has been read; the call
            then returns nothing of use.
        on_skip: what is done where a step cache or a replaced forward left out a layer that was to be read: "error", or
            "compute" to run the model's own forward beside it, without gradients, up to the last such layer. The run
            itself stays as it is with the cache, to the bit.
        attention: "self", or "cross" for attention from the video to the text: then q is `[B, H, F * S, D]` of the
            video, k `[B, H, T, D]` of the text's tokens as the model has them (padding included), key_mask `[B, T]` and
            grid a `corrdit.grid.CrossGrid`. In families whose text lies in the token axis of self-attention these are
            parts of it, and a softmax over the T keys is the model's, renormalised over the text.

    Returns:
        A context manager which is a mapping from (step, layer) to results; `captured[-1, -1]` counts both from the
        last, as `steps` and `layers` do.

    Raises:
        ValueError: for what cannot be read (unknown or unsupported model, parallelism, feature caches, whole-model
            compilation, attention that a processor neither sends through diffusers' dispatcher nor computes by
            scaled_dot_product_attention), indices out of range, a model already captured, and, when the block ends
            without an exception, a requested result that never came, with what left it out where that is known (a
            cache, a replaced forward). With `steps=None` a run that was interrupted (`pipe._interrupt`) is no error.
    """
    if not isinstance(model, torch.nn.Module) and hasattr(model, "pipe"):
        model = model.pipe
    wanted = layer_list(layers)
    return Capture(
        model,
        operations=dict.fromkeys(range(layer_count(model)) if wanted == "all" else wanted, named_operations(operation)),
        steps=None if steps is None else whole_indices("steps", steps),
        named=isinstance(operation, Mapping),
        branch=branch,
        callback=callback,
        keep_graph=keep_graph,
        early_exit=early_exit,
        on_skip=on_skip,
        attention=attention,
    )


class Capture(Mapping[tuple[int, int], Any]):
    """Results by (step, layer); made by `capture`, filled while its block is open, readable after it.

    A pickled or deep-copied instance is a dict of its results, without the model.

    Args:
        model: a diffusers video pipeline, or a bare transformer.
        operations: operations by name for each layer.
        steps: steps to read, or None for all.
        named: whether results are kept by operation name even for one operation.
        branch: as for `capture`.
        callback: as for `capture`.
        keep_graph: as for `capture`.
        early_exit, on_skip, attention: as for `capture`.
    """

    def __init__(
        self,
        model: Any,
        *,
        operations: Mapping[int, Mapping[str, Operation]],
        steps: list[int] | None = None,
        named: bool = False,
        branch: str | None = None,
        callback: CaptureCallback | None = None,
        keep_graph: bool = False,
        early_exit: bool = False,
        on_skip: str = "error",
        attention: str = "self",
    ) -> None:
        if branch is not None and branch not in BRANCHES:
            raise ValueError(f'branch must be "cond", "uncond" or "both", got {branch!r}')
        if callback is not None and not callable(callback):
            raise ValueError(f"callback must be a function callback(step, layer, result), got {callback!r}")
        self._models = [(transformer, layout_of(transformer)) for transformer in transformers_of(model)]
        self._pipe = None if isinstance(model, torch.nn.Module) else model
        if not self._models or not (self._pipe is None or hasattr(model, "scheduler")):
            raise ValueError(
                "capture needs a diffusers video pipeline (with .transformer and .scheduler) or its transformer, got "
                f"{type(model).__name__}"
            )
        self._branch = branch or ("cond" if self._pipe is not None else None)
        self._steps = steps
        self._named, self._callback, self._keep_graph = named, callback, flag("keep_graph", keep_graph)
        if self._pipe is not None and flag("early_exit", early_exit):
            raise ValueError(
                "early_exit would leave the pipeline without a prediction; capture pipe.transformer instead"
            )
        if self._pipe is None and any(step < 0 for step in steps or ()):
            raise ValueError(
                f"steps {steps}: a bare transformer does not say how many steps there are, so they cannot be counted "
                "from the last; give non-negative steps, or capture the pipeline"
            )
        self._early_exit = flag("early_exit", early_exit)
        self._of_text = choice("attention", attention, ("self", "cross")) == "cross"
        self._computes = choice("on_skip", on_skip, ("error", "compute")) == "compute"
        self._said = {"steps": steps, "branch": branch, "keep_graph": keep_graph, "early_exit": early_exit}
        self._said |= {"on_skip": on_skip, "attention": attention}
        self._operations = self._resolved_layers(operations)
        self._last_step: int | None = None
        self._results: dict[tuple[int, int], Any] = {}
        self._firings = Firings(self._operations)
        self._counter: PipelineSteps | TransformerSteps = TransformerSteps()
        self._open: ExitStack | None = None

    def __enter__(self) -> Capture:
        if self._open is not None:
            raise ValueError("this capture is already open; make another with capture(...)")
        self._counter = TransformerSteps() if self._pipe is None else PipelineSteps(self._pipe)
        self._firings = Firings(self._operations)
        settings = self._said | {"layers": {str(layer): list(names) for layer, names in self._operations.items()}}
        for transformer, layout in self._models:
            check_spread(transformer, layout, settings)
            self._check(transformer, layout)
        with ExitStack() as stack:
            for transformer, layout in self._models:
                if self._keep_graph:
                    stack.enter_context(weights_kept_for_backward(transformer))
                self._attach(transformer, layout, stack)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self._firings.check(self._counter, steps=self._steps, branch=self._branch, pipe=self._pipe)

    def close(self) -> None:
        """Restore the model, without asking whether every result came; the end of the block does both."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self._results[self._resolved(key)]
        except KeyError:
            kept = ", ".join(map(str, self._results)) or "none"
            hint = "; results went to the callback" if self._callback is not None else ""
            if not self._firings.calls:
                hint = "; the model has not run inside the block: with capture(...) as captured: pipe(...)"
            raise KeyError(f"no result for (step, layer) {key}; there are {kept}{hint}") from None

    def _resolved(self, key: tuple[int, int]) -> tuple[int, int]:
        """The key with a negative step and layer counted from the last, as `steps` and `layers` count them."""
        step, layer = key
        if step < 0 and self._last_step is not None:
            step += 1 + self._last_step
        return step, layer + self._layers if layer < 0 else layer

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        model = type(self._models[0][0] if self._pipe is None else self._pipe).__name__
        return f"<Capture of {model}: {', '.join(map(str, self._results)) or 'no results'}>"

    def _repr_html_(self) -> str:
        return table_html(repr(self)[1:-1], {str(place): outline(result) for place, result in self._results.items()})

    def __reduce__(self) -> tuple[type[dict[tuple[int, int], object]], tuple[object]]:
        return (dict, (self._results,))

    def clear(self) -> None:
        """Forget the results so far, to run the model again inside the same block."""
        self._results.clear()

    def _resolved_layers(self, operations: Mapping[int, Mapping[str, Operation]]) -> dict[int, Mapping[str, Operation]]:
        count = min(len(layout.attention_modules(transformer)) for transformer, layout in self._models)
        self._layers = count
        model, resolved = type(self._models[0][0]).__name__, dict[int, Mapping[str, Operation]]()
        for layer, by_name in operations.items():
            index = resolved_index("layer", layer, count, f"{model}, which has {count} attention layers")
            if resolved.setdefault(index, by_name) is not by_name:
                raise ValueError(
                    f"layers {index} and {index - count} are the same one of {count}; give its operations together, "
                    "as a dict of them by name"
                )
        return dict(sorted(resolved.items()))

    def _check(self, transformer: torch.nn.Module, layout: TransformerLayout) -> None:
        check_transformer(transformer, caches=self._computes, spread=True)
        for module in self._modules(layout, transformer):
            if getattr(module.processor, "captured", False):
                raise ValueError(
                    f"this {type(transformer).__name__} is already being captured; give all layers, steps and "
                    "operations to one capture, or close the other first"
                )
            check_processor(without_leftover(module.processor), spread=True)

    def _attach(self, transformer: torch.nn.Module, layout: TransformerLayout, stack: ExitStack) -> None:
        processors: dict[int, CorrespondenceProcessor] = {}
        modules = self._modules(layout, transformer)

        def reading(layer: int, inner: object) -> CorrespondenceProcessor:
            processors[layer] = CorrespondenceProcessor(without_leftover(inner), None, None)
            processors[layer].captured = True
            stack.callback(processors[layer].release)
            return processors[layer]

        stack.enter_context(processors_wrapped(modules, self._operations, reading))
        stop = False
        if self._early_exit:
            stop = stack.enter_context(leaving_after(transformer, layout, max(self._operations)))

        given: list[Arguments] = []

        def before(call: ForwardCall, arguments: Arguments) -> None:
            if self._keep_graph:
                # Autocast keeps the casts of what is optimised, and does not see that a step has changed it in place.
                torch.clear_autocast_cache()
            given[:] = [arguments] if self._computes else []
            for layer, request in self.requests(layout, call, stop).items():
                processors[layer].arm(self._reading(layout, request, call, arguments))

        def after(output: object) -> None:
            try:
                for processor in processors.values():
                    processor.collect_compiled()
                # One that an exception ended skipped nothing.
                ended = output is not None or (self._early_exit and self._firings.last_came)
                if ended and given and self._firings.awaited:
                    self._compute_skipped(transformer, processors, given.pop())
                self._firings.note_skipped(self._counter.step, transformer, modules if ended else None)
            finally:
                for processor in processors.values():
                    processor.disarm()

        stack.enter_context(watched_forwards(transformer, layout, before, after))

    def _modules(self, layout: TransformerLayout, transformer: torch.nn.Module) -> list[Any]:
        """The attention modules that are read from."""
        return TextAttention(layout).modules(transformer) if self._of_text else layout.attention_modules(transformer)

    def _reading(
        self, layout: TransformerLayout, request: ReadRequest, call: ForwardCall, arguments: Arguments
    ) -> ReadRequest:
        if not self._of_text:
            return request
        text = TextAttention(layout)
        operations = text.operations(request.operations)
        return dataclasses.replace(request, grid=text.grid(call, arguments), operations=operations)

    def _rows(self, layout: TransformerLayout, call: ForwardCall) -> tuple[tuple[str | None, slice], ...]:
        """The branches of this call that are wanted and where they are in the batch."""
        if self._branch is None:
            return ((None, slice(0, call.batch)),)
        available = branches_of(layout, call, self._counter)
        if self._branch == "both":
            return tuple(available.items())
        return ((None, available[self._branch]),) if self._branch in available else ()

    def _wanted(self, step: int) -> bool:
        if self._steps is None:
            return True
        count = self._counter.count
        if count is None:
            return step in self._steps
        among = f"this run, which has {count} steps"
        return step in {resolved_index("step", wanted, count, among) for wanted in self._steps}

    def requests(self, layout: TransformerLayout, call: ForwardCall, stop: bool) -> dict[int, ReadRequest]:
        """Takes note of a call of a transformer, and says what each layer has to hand over in it."""
        self._counter.advance(call)
        self._firings.calls += 1
        step, count = self._counter.step, self._counter.count
        self._last_step = step if count is None else count - 1
        rows = self._rows(layout, call) if self._wanted(step) else ()
        self._firings.awaited = set(self._operations) if rows else set()
        if not rows:
            return {}
        return {
            layer: ReadRequest(
                grid=call.grid,
                operations=operations,
                named=self._named,
                rows=rows,
                keep_graph=self._keep_graph,
                deliver=functools.partial(self._deliver, step, layer),
                stop=stop and layer == max(self._operations),
                batch=call.batch,
            )
            for layer, operations in self._operations.items()
        }

    def _deliver(self, step: int, layer: int, result: Any) -> None:
        key = (step, layer)
        self._firings.came(key)
        if self._callback is not None:
            self._callback(step, layer, result)
            return
        if key in self._results:
            earlier = self._results[key]
            if self._branch != "both" or earlier.keys() & result.keys():
                raise ValueError(
                    f"(step, layer) {key} was read twice: the model ran again inside one capture; open a capture for "
                    "each run, call .clear() between them, or give callback=; for a loop of your own that calls the "
                    "transformer twice a step, give branch='cond', 'uncond' or 'both'"
                )
            result = {**earlier, **result}
        self._results[key] = result

    def _compute_skipped(
        self, transformer: torch.nn.Module, processors: Mapping[int, CorrespondenceProcessor], arguments: Arguments
    ) -> None:
        """Runs the model's own forward for the layers that are still awaited."""
        missing = set(self._firings.awaited)
        for layer, processor in processors.items():
            if layer not in missing:
                processor.disarm()
        if not has_compiled_blocks(transformer):
            processors[max(missing)].leave_when_read()
        run_whole(transformer, arguments)
        for layer in missing:
            processors[layer].collect_compiled()
