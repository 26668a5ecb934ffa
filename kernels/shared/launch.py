"""What stands between a host function and a kernel: checks, the architecture, the launch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from corrdit.kernels.requirements import has_no_contents, unfit_machine, unfit_tensor
from corrdit.kernels.shared import configs
from corrdit.kernels.shared.primitives import INTERPRETED

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# What `ahead_of_time` puts here is called in place of every launch, and names the architecture to compile for.
Compiler = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_compiler: tuple[str, Compiler] | None = None


class SavedContext(FunctionCtx):
    """What torch hands to an operator's gradient, with the attributes that it has in fact."""

    options: list[object]
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


def refuse_second_derivative(operation: str) -> Callable[..., None]:
    """What stands for the gradient of an operation's gradient."""

    def refuse(ctx: FunctionCtx, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"{operation} on Triton kernels is differentiable once; for a second derivative use "
            'backend="reference", whose every step is differentiable'
        )

    return refuse


def autocast_off(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within it, autocast has no say in what a host function computes itself: a gradient may be taken under it."""
    if tensor.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


@contextlib.contextmanager
def compile_only(architecture: str, compiler: Compiler) -> Iterator[None]:
    """Within it, host functions of meta or fake tensors hand each launch to `compiler` instead of a device."""
    global _compiler  # noqa: PLW0603
    before, _compiler = _compiler, (architecture, compiler)
    try:
        yield
    finally:
        _compiler = before


def _compiler_of(tensor: Tensor) -> tuple[str, Compiler] | None:
    """What stands for the launches of a call: of one with contents nothing does, another thread's perhaps."""
    return _compiler if _compiler is not None and has_no_contents(tensor) else None


def check_device(tensor: Tensor) -> None:
    """Raises a RuntimeError that names the reason where the kernels cannot run on a tensor's device."""
    kind = tensor.device.type
    if _compiler_of(tensor) is None and (reason := _unfit_device(str(tensor.device))):
        raise RuntimeError(f'the Triton kernels got {kind} tensors: {reason}; use backend="streaming"')


def _unfit_device(device: str) -> str | None:
    return unfit_machine(device, bool(INTERPRETED.value))


# It asks the file system, which cannot be traced.
_unfit_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_tensors(*tensors: Tensor) -> None:
    """Raises a ValueError for a dtype or a head_dim the kernels do not take."""
    for tensor in tensors:
        if reason := unfit_tensor(tensor.dtype, tensor.shape[-1]):
            raise ValueError(f'{reason}; use backend="streaming" or backend="reference"')


def choose_tiles(kernel: str, tensor: Tensor, guarded: bool = False) -> configs.Tiles:
    """The tiles of a kernel for q of `[..., D]` on its device; `guarded` as in `configs.tiles`."""
    if compiling := _compiler_of(tensor):
        architecture = compiling[0]
    elif tensor.device.type == "cuda":
        architecture = configs.table_of(torch.cuda.get_device_capability(tensor.device))
    else:
        architecture = configs.INTERPRETER
    return configs.tiles(kernel, architecture, tensor.shape[-1], tensor.element_size(), guarded)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, tiles: configs.Tiles, **options: Any) -> None:
    """Runs `kernel` over `grid` on the device of its first argument."""
    options.update(num_warps=tiles.warps, num_stages=tiles.stages)
    if compiling := _compiler_of(arguments[0]):
        compiling[1](kernel, grid, arguments, options)
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def canonical(q: Tensor, logit_scale: float) -> tuple[Tensor, float]:
    """The same logits by a factor above 0, which the running maxima need.

    Returns:
        q and logit_scale; q negated where the factor is negative, and zeroed where it is 0.
    """
    if logit_scale > 0:
        return q, logit_scale
    return (q * 0.0, 1.0) if logit_scale == 0 else (-q, -logit_scale)


def natural_log_sum_exp(statistics: Tensor) -> Tensor:
    """Base e from the kernels' base 2, whose rows without keys have +inf: -inf here, without a gradient."""
    return torch.where(statistics == float("inf"), float("-inf"), statistics * LN_2)


def unequal_weights(weights: Tensor | None) -> Tensor | None:
    """The weights, None where they are equal by construction: one number expanded over the heads.

    Equal weights take the kernels without factors of the queries; reading the values would wait for the device.
    """
    return None if weights is None or weights.stride(0) == 0 else weights


def wanted_gradients(ctx: SavedContext, count: int) -> list[bool]:
    """Which of the first `count` inputs of an operator need a gradient."""
    return list(ctx.needs_input_grad[:count])


def given(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """What an operator gives, which must be tensors: one without elements for each gradient that is not wanted."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def taken(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The other way."""
    return tuple(gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True))


def tile_count(size: int, tile: int) -> int:
    return -(-size // tile)
