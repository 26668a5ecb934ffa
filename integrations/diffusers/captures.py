"""Reading queries and keys of chosen layers and steps while a pipeline or transformer runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from corrdit.arguments import flag, resolved_index, whole_indices
from corrdit.integrations.diffusers.compatibility import check_processor, check_transformer, what_skips
from corrdit.integrations.diffusers.host.attention import processors_wrapped
from corrdit.integrations.diffusers.host.forwards import (
    Arguments,
    leaving_after,
    transformers_of,
    watched_forwards,
    weights_kept_for_backward,
)
from corrdit.integrations.diffusers.host.steps import PipelineSteps, TransformerSteps, branches_of
from corrdit.integrations.diffusers.layouts import ForwardCall, TransformerLayout, layout_of
from corrdit.integrations.diffusers.processors import (
    CorrespondenceProcessor,
    Operation,
    ReadRequest,
    named_operations,
    without_leftover,
)

BRANCHES = ("cond", "uncond", "both")
CaptureCallback = Callable[[int, int, Any], None]


def capture(
    model: Any,
    *,
    layers: int | Iterable[int],
    steps: int | Iterable[int] | None = None,
    operation: Operation | Mapping[str, Operation],
    branch: str | None = None,
    callback: CaptureCallback | None = None,
    keep_graph: bool = False,
    early_exit: bool = False,
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
            forwards come from one thread; a model that several threads share is loaded once for each.
        layers: indices over all attention blocks in the order they run (HunyuanVideo: dual, then single);
            negative ones count from the last.
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

    Returns:
        A context manager which is a mapping from (step, layer), both non-negative, to results.

    Raises:
        ValueError: for what cannot be read (unknown or unsupported model, parallelism, feature caches, whole-model
            compilation, attention that a processor neither sends through diffusers' dispatcher nor computes by
            scaled_dot_product_attention), indices out of range, a model already captured, and, when the block ends
            without an exception, a requested result that never came, with what left it out where that is known (a
            cache, a replaced forward). With `steps=None` a run that was interrupted (`pipe._interrupt`) is no error.
    """
    if not isinstance(model, torch.nn.Module) and hasattr(model, "pipe"):
        model = model.pipe
    return Capture(
        model,
        operations=dict.fromkeys(whole_indices("layers", layers), named_operations(operation)),
        steps=None if steps is None else whole_indices("steps", steps),
        named=isinstance(operation, Mapping),
        branch=branch,
        callback=callback,
        keep_graph=keep_graph,
        early_exit=early_exit,
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
        early_exit: as for `capture`.
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
        self._operations = self._resolved_layers(operations)
        self._results: dict[tuple[int, int], Any] = {}
        self._fired: set[tuple[int, int]] = set()
        self._awaited: set[int] = set()
        self._skipped: dict[tuple[int, int], str | None] = {}
        self._calls_seen = 0
        self._counter: PipelineSteps | TransformerSteps = TransformerSteps()
        self._open: ExitStack | None = None

    def __enter__(self) -> Capture:
        if self._open is not None:
            raise ValueError("this capture is already open; make another with capture(...)")
        self._counter = TransformerSteps() if self._pipe is None else PipelineSteps(self._pipe)
        self._calls_seen = 0
        self._fired.clear()
        self._awaited.clear()
        self._skipped.clear()
        for transformer, layout in self._models:
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
            self._check_fired()

    def close(self) -> None:
        """Restore the model, without asking whether every result came; the end of the block does both."""
        stack, self._open = self._open, None
        if stack is not None:
            stack.close()

    def __getitem__(self, key: tuple[int, int]) -> Any:
        try:
            return self._results[key]
        except KeyError:
            kept = ", ".join(map(str, self._results)) or "none"
            hint = "; results went to the callback" if self._callback is not None else ""
            if not self._calls_seen:
                hint = "; the model has not run inside the block: with capture(...) as captured: pipe(...)"
            raise KeyError(f"no result for (step, layer) {key}; there are {kept}{hint}") from None

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        model = type(self._models[0][0] if self._pipe is None else self._pipe).__name__
        return f"<Capture of {model}: {', '.join(map(str, self._results)) or 'no results'}>"

    def __reduce__(self) -> tuple[type[dict[tuple[int, int], object]], tuple[object]]:
        return (dict, (self._results,))

    def clear(self) -> None:
        """Forget the results so far, to run the model again inside the same block."""
        self._results.clear()

    def _resolved_layers(self, operations: Mapping[int, Mapping[str, Operation]]) -> dict[int, Mapping[str, Operation]]:
        count = min(len(layout.attention_modules(transformer)) for transformer, layout in self._models)
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
        check_transformer(transformer)
        for module in layout.attention_modules(transformer):
            if getattr(module.processor, "captured", False):
                raise ValueError(
                    f"this {type(transformer).__name__} is already being captured; give all layers, steps and "
                    "operations to one capture, or close the other first"
                )
            check_processor(without_leftover(module.processor))

    def _attach(self, transformer: torch.nn.Module, layout: TransformerLayout, stack: ExitStack) -> None:
        processors: dict[int, CorrespondenceProcessor] = {}
        modules = layout.attention_modules(transformer)

        def reading(layer: int, inner: object) -> CorrespondenceProcessor:
            processors[layer] = CorrespondenceProcessor(without_leftover(inner), None, None)
            processors[layer].captured = True
            stack.callback(processors[layer].release)
            return processors[layer]

        stack.enter_context(processors_wrapped(modules, self._operations, reading))
        stop = False
        if self._early_exit:
            stop = stack.enter_context(leaving_after(transformer, layout, max(self._operations)))

        def before(call: ForwardCall, arguments: Arguments) -> None:
            if self._keep_graph:
                # Autocast keeps the casts of what is optimised, and does not see that a step has changed it in place.
                torch.clear_autocast_cache()
            for layer, request in self.requests(layout, call, stop).items():
                processors[layer].arm(request)

        def after(output: object) -> None:
            try:
                for processor in processors.values():
                    processor.collect_compiled()
                self._note_skipped(transformer, modules, output is not None)
            finally:
                for processor in processors.values():
                    processor.disarm()

        stack.enter_context(watched_forwards(transformer, layout, before, after))

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
        self._calls_seen += 1
        step = self._counter.step
        rows = self._rows(layout, call) if self._wanted(step) else ()
        self._awaited = set(self._operations) if rows else set()
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
        self._fired.add(key)
        self._awaited.discard(layer)
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

    def _note_skipped(self, transformer: torch.nn.Module, modules: Sequence[torch.nn.Module], returned: bool) -> None:
        """Layers that a forward was to read, and which it went past; one that an exception ended skipped nothing."""
        left_early = self._early_exit and max(self._operations) not in self._awaited
        skipped, self._awaited = self._awaited, set()
        if not (returned or left_early):
            return
        for layer in skipped:
            self._skipped[self._counter.step, layer] = what_skips(transformer, modules[layer])

    def _check_fired(self) -> None:
        if self._skipped:
            causes = sorted({cause for cause in self._skipped.values() if cause is not None})
            reason = _SKIPPED.format(f"{' and '.join(causes)} left them out") if causes else _REPLACED
            raise ValueError(f"the capture never fired for {_keys(sorted(self._skipped))}: {reason}")
        wanted, count = self._steps, self._counter.count
        if wanted is not None and count is not None:
            wanted = [step % count for step in wanted if -count <= step < count] if self._calls_seen else wanted
        elif count is not None and self._calls_seen and self._counter.step + 1 < count and not self._interrupted:
            raise ValueError(
                f"the capture never fired for steps {self._counter.step + 1} to {count - 1}: {self._ended()}, before "
                f"its {count} steps were done (something that calls the transformer at some steps only, for instance a "
                "step cache); give the steps that run, or switch it off for the capture"
            )
        missing = [
            (step, layer)
            for layer in self._operations
            for step in (wanted if wanted is not None else [None])
            if not any(fired == layer and step in (None, at) for at, fired in self._fired)
        ]
        if missing:
            raise ValueError(f"the capture never fired for {_keys(missing)}: {self._reason(missing)}")

    def _reason(self, missing: list[tuple[int | None, int]]) -> str:
        if not self._calls_seen:
            return "the transformer did not run inside the block; call the pipeline or the transformer there"
        if any(step is not None and step > self._counter.step for step, _ in missing):
            return self._ended()
        if self._branch == "uncond":
            return "the run used no classifier-free guidance, so it has no unconditional branch; raise guidance_scale"
        return _REPLACED

    @property
    def _interrupted(self) -> bool:
        return bool(getattr(self._pipe, "interrupt", False))

    def _ended(self) -> str:
        interrupted = "; it was interrupted after step {0}" if self._interrupted else ""
        return ("the run ended after step {0}" + interrupted).format(self._counter.step)


_SKIPPED = (
    "{}, so their queries and keys do not exist; switch it off for the capture (transformer.disable_cache() for the "
    "caches of diffusers)"
)
_REPLACED = (
    "the layer ran without this processor (something replaced the attention processors inside the block, for instance "
    "fuse_qkv_projections(), or left layers out)"
)


def _keys(missing: Sequence[tuple[int | None, int]]) -> str:
    shown = [f"layer {layer}" if step is None else f"(step {step}, layer {layer})" for step, layer in missing[:6]]
    return ", ".join(shown) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
