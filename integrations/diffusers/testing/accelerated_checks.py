"""Whether a model is read as well when it runs as people run theirs: offloaded, quantised, compiled, cached and so on.

Each check changes a copy of the transformer.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Linear, Module

from corrdit.integrations.diffusers.testing.reading_checks import check_attention_reproduced, check_output_unchanged
from corrdit.integrations.diffusers.testing.restoring_checks import unchanged
from corrdit.integrations.diffusers.testing.subject import LayerRead, Skipped, Subject

VALUE_TOLERANCE = 1e-4
BACKEND_TOLERANCE = 1e-2
"""Of models that compute in bfloat16 inside (Kandinsky 5), where another order of sums rounds otherwise."""
LORA_RANK = 2
FAILS_ITSELF = "the model itself fails when it runs so"
NO_GROUPS = "this diffusers offloads groups only where there is an accelerator"
"""It is one before 0.42."""


@dataclass(frozen=True)
class Acceleration:
    """One of the ways to run a model.

    Args:
        change: `change(transformer)` makes the transformer run so as long as its block lasts, or raises `Skipped`.
        advice: what an adapter has to look after.
        same_values: whether the model computes the same as without; where it does not, what is read is compared with
            its own attention.
        tolerance: between the same values, of the largest.
    """

    change: Callable[[Module], contextlib.AbstractContextManager[object]]
    advice: str
    same_values: bool = True
    tolerance: float = VALUE_TOLERANCE

    def __call__(self, subject: Subject) -> None:
        """Raises AssertionError, with what was found and the advice, where the model is not read as it should be."""
        accelerated = replace(subject, model=copy.deepcopy(subject.transformer))
        plain = subject.read() if self.same_values else {}
        try:
            with self.change(accelerated.transformer):
                _assert_runs(accelerated)
                with unchanged(accelerated.transformer, "a capture"):
                    self._read(accelerated, plain)
        except Skipped:
            raise
        except Exception as error:
            raise AssertionError(f"{_said(error)}; {self.advice}") from error

    def _read(self, accelerated: Subject, plain: dict[int, LayerRead]) -> None:
        check_output_unchanged(accelerated)
        reads = accelerated.read()
        if self.same_values:
            _assert_alike(reads, plain, "the model as it is", self.tolerance)
        else:
            check_attention_reproduced(accelerated)
        some = accelerated.layers[: max(1, len(accelerated.layers) - 1)]
        early = accelerated.read(some, early_exit=True)
        _assert_alike(early, {layer: reads[layer] for layer in some}, "the whole forward")


def _assert_runs(subject: Subject) -> None:
    """Raises `Skipped` where the model fails without anything of ours."""
    try:
        subject.prediction()
    except Exception as error:
        raise Skipped(f"{FAILS_ITSELF} ({_said(error)})") from error


def check_step_cache(subject: Subject) -> None:
    """A forward that a cache answers is noticed, and its queries and keys can be computed beside it."""
    plain = subject.read()
    cached = replace(subject, model=_answering_again(copy.deepcopy(subject.transformer)))
    first = cached.prediction()
    advice = (
        "the layout has to find batch, grid and timestep in the arguments of the transformer's own class, "
        "and its forward has to run without what was put round it"
    )
    try:
        cached.read()
        raise AssertionError("a capture of a forward that a cache answered did not notice that no layer ran")
    except ValueError as error:
        if "never fired" not in str(error):
            raise AssertionError(f"{_said(error)}; {advice}") from error
    try:
        reads = cached.read(on_skip="compute")
        _assert_alike(reads, plain, "the model without a cache")
    except Exception as error:
        raise AssertionError(f"{_said(error)}; {advice}") from error
    assert torch.equal(first, cached.prediction()), "computing what a cache left out changes what the cache answers"


def _answering_again(model: Module) -> Module:
    """The model, which computes once and then gives the same answer."""
    answers: list[object] = []
    own = model.forward

    def forward(self: Module, *args: object, **kwargs: object) -> object:
        if not answers:
            answers.append(own(*args, **kwargs))
        return answers[0]

    model.forward = types.MethodType(forward, model)
    return model


def _assert_alike(
    reads: dict[int, LayerRead], others: dict[int, LayerRead], what: str, tolerance: float = VALUE_TOLERANCE
) -> None:
    for layer, other in others.items():
        read = reads[layer]
        assert read.grid == other.grid, f"layer {layer} has the grid {read.grid}, and {other.grid} in {what}"
        for name in ("q", "k"):
            one, two = getattr(read, name).float(), getattr(other, name).float()
            assert one.shape == two.shape, f"{name} of layer {layer} is {tuple(one.shape)}, not {tuple(two.shape)}"
            error = (one - two).abs().max() / two.abs().max()
            assert error < tolerance, f"{name} of layer {layer} is off by {error:.2g} from that of {what}"


def _said(error: BaseException) -> str:
    return f"{error}" if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def _needed(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed")


@contextlib.contextmanager
def _offloaded(model: Module) -> Iterator[None]:
    _needed("accelerate")
    from accelerate import cpu_offload

    cpu_offload(model, next(model.parameters()).device)
    yield


@contextlib.contextmanager
def _offloaded_in_groups(model: Module) -> Iterator[None]:
    from diffusers.hooks import apply_group_offloading

    device = next(model.parameters()).device
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    try:
        apply_group_offloading(model, onload_device=device, offload_device=torch.device("cpu"), **options)
    except AttributeError as error:
        if torch.accelerator.is_available():
            raise
        raise Skipped(NO_GROUPS) from error
    yield


@contextlib.contextmanager
def _fused(model: Any) -> Iterator[None]:
    if not hasattr(model, "fuse_qkv_projections"):
        raise Skipped(f"{type(model).__name__} has no fuse_qkv_projections")
    try:
        model.fuse_qkv_projections()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise Skipped(f"{type(model).__name__} cannot fuse its projections ({error})") from error
    yield


@contextlib.contextmanager
def _cast(model: Module) -> Iterator[None]:
    from diffusers.hooks import apply_layerwise_casting

    patterns = getattr(model, "_skip_layerwise_casting_patterns", None) or ("norm",)
    compute = next(model.parameters()).dtype
    apply_layerwise_casting(model, torch.float8_e4m3fn, compute, skip_modules_pattern=(*patterns, "pos_embed"))
    yield


@contextlib.contextmanager
def _quantized(model: Module) -> Iterator[None]:
    _needed("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    yield


@contextlib.contextmanager
def _with_lora(model: Module) -> Iterator[None]:
    _needed("peft")
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, part in model.named_modules() if isinstance(part, Linear) and "attn" in name.lower()]
    names = linear or [name for name, part in model.named_modules() if isinstance(part, Linear)]
    inject_adapter_in_model(LoraConfig(r=LORA_RANK, target_modules=names, init_lora_weights=False), model)
    yield


@contextlib.contextmanager
def _compiled(model: Module, lists: list[str]) -> Iterator[None]:
    torch._dynamo.reset()
    for name in lists:
        for block in model.get_submodule(name).children():
            block.compile(backend="eager")
    try:
        yield
    finally:
        torch._dynamo.reset()


def check_compiled(subject: Subject) -> None:
    """Blocks that are compiled one by one are read."""
    lists = subject.backbone.layout().block_lists(subject.transformer)
    Acceleration(lambda model: _compiled(model, lists), LEFT_OUT)(subject)


@contextlib.contextmanager
def _another_backend(model: Module) -> Iterator[None]:
    from corrdit.integrations.diffusers.testing.plain_attention import plain_assigned, plain_backend, use_backend

    with plain_backend() as name, contextlib.ExitStack() as stack:
        if not use_backend(model, name):
            # Its processors call torch's function themselves, in whose place people assign another.
            stack.enter_context(plain_assigned())
        yield


LEFT_OUT = (
    "here the blocks behind the last layer that is read are left out: block_lists has to name the lists of all blocks "
    "in the order they run, and attention_modules one module of each"
)
OTHER_CLASSES = (
    "linear layers are of other classes here: attention_modules has to find modules by their place in the model"
)
ACCELERATED_CHECKS: dict[str, Callable[[Subject], None]] = {
    "offload": Acceleration(
        _offloaded,
        "between forwards the weights are away here: the layout has to take sizes from the config and the arguments",
    ),
    "group offload": Acceleration(_offloaded_in_groups, LEFT_OUT),
    "fused projections": Acceleration(
        _fused, "fusing replaces processors: attention_modules has to find modules by their place in the model"
    ),
    "layerwise casting": Acceleration(
        _cast,
        "between forwards weights have another dtype here: the layout has to take dtypes from the arguments",
        same_values=False,
    ),
    "quantized": Acceleration(_quantized, OTHER_CLASSES, same_values=False),
    "lora": Acceleration(_with_lora, OTHER_CLASSES, same_values=False),
    "compiled blocks": check_compiled,
    "attention backend": Acceleration(
        _another_backend,
        "this backend is not torch's: the processors' own __call__ has to call dispatch_attention_fn",
        tolerance=BACKEND_TOLERANCE,
    ),
    "step cache": check_step_cache,
}
"""Checks of a model that is run otherwise, by name."""
