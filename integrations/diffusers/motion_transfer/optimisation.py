"""The inner optimisation of one guided denoising step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from corrdit.integrations.diffusers.transfer_settings import TransferSettings

LARGEST_LOSS_SCALE = 2.0**16
"""Where loss scaling for half precision begins, as `torch.amp.GradScaler` does."""

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
Leaves = dict[str, Tensor]
LossFunction = Callable[[Leaves], Tensor]


class DivergedError(ValueError):
    """The loss or its gradient became NaN or infinite.

    Attributes:
        step: denoising step, from 0.
        iteration: step of the optimiser in it, from 0.
        last_good: what was optimised, as it was before, by name.
        losses: all losses so far, `[guided steps][optimisation steps]`; the last step's end with the one that diverged.
    """

    def __init__(self, message: str, step: int, iteration: int, last_good: Leaves) -> None:
        super().__init__(message)
        self.step = step
        self.iteration = iteration
        self.last_good = last_good
        self.losses: list[list[float]] = []


@dataclass
class OptimiserMemory:
    """What is carried from one guided step to the next.

    Args:
        gradients: the latest, by name, for steps that use it again.
        loss_scale: factor of the loss in half precision.
    """

    gradients: Leaves = field(default_factory=dict)
    loss_scale: float = LARGEST_LOSS_SCALE


def optimised(
    start: Mapping[str, Tensor],
    loss_of: LossFunction,
    settings: TransferSettings,
    step: int,
    memory: OptimiserMemory,
    *,
    half_precision: bool,
    within: Tensor | None = None,
) -> tuple[Leaves, list[float]]:
    """Some steps of the optimiser on the loss.

    Args:
        start: what is optimised, by name, in any precision; the optimiser works in float32 (float64).
        loss_of: the loss of leaves, a scalar, differentiable.
        settings: of the transfer.
        step: denoising step, from 0.
        memory: carried between the guided steps; changed.
        half_precision: scale the loss, because gradients pass through float16. A gradient that overflows is computed
            again with a smaller scale.
        within: factor of the gradients, in the shape of the leaves; None for 1.

    Returns:
        The optimised leaves, detached, and the loss before each step of the optimiser (NaN where an earlier gradient
        was used again, and no loss computed).

    Raises:
        DivergedError: a loss, a gradient or a result that is not finite.
    """
    leaves = {
        name: value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True).requires_grad_(True)
        for name, value in start.items()
    }
    optimiser = OPTIMISERS[settings.optimizer](leaves.values(), lr=settings.rate(step))
    again = (step - settings.guided_window.start) % settings.gradient_interval != 0 and bool(memory.gradients)
    losses: list[float] = []
    for iteration in range(settings.optimisation_steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(step, iteration)
        if again or iteration % settings.optimiser_interval:
            losses.append(math.nan)
            gradients = memory.gradients
        else:
            loss, gradients = _gradients(leaves, loss_of, memory, half_precision)
            losses.append(loss)
            if within is not None:
                gradients = {name: gradient * within.to(gradient) for name, gradient in gradients.items()}
            if not math.isfinite(loss) or not _finite(gradients):
                what = f"the loss became {loss}" if not math.isfinite(loss) else "the gradient is not finite"
                raise _diverged(what, settings, step, losses, leaves)
        before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for name, leaf in leaves.items():
            leaf.grad = gradients[name].to(leaf).clone()
        optimiser.step()
        if not _finite(leaves):
            raise _diverged(f"the optimised {' and '.join(leaves)} became infinite", settings, step, losses, before)
        memory.gradients = gradients
    if settings.gradient_interval == 1:
        memory.gradients = {}
    return {name: leaf.detach() for name, leaf in leaves.items()}, losses


@contextlib.contextmanager
def _nothing_cast_kept() -> Iterator[None]:
    """Inside, autocast casts anew every time: a kept cast of a leaf would outlive the step that changes the leaf."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


def _finite(tensors: Leaves) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _diverged(
    what: str, settings: TransferSettings, step: int, losses: list[float], last_good: Leaves
) -> DivergedError:
    iteration = len(losses) - 1
    error = DivergedError(
        f"{what} at denoising step {step}, optimisation step {iteration}; the state before it is kept. Take a smaller "
        f"learning_rate than {settings.learning_rate} or another precision",
        step,
        iteration,
        {name: leaf.detach().clone() for name, leaf in last_good.items()},
    )
    error.losses = [losses]
    return error


def _gradients(
    leaves: Leaves, loss_of: LossFunction, memory: OptimiserMemory, half_precision: bool
) -> tuple[float, Leaves]:
    """Loss and gradients; in half precision the scale of the loss falls until the gradients fit."""
    while True:
        scale = memory.loss_scale if half_precision else 1.0
        with torch.enable_grad(), _nothing_cast_kept():
            loss = loss_of(leaves)
            value = float(loss.detach())
            if not math.isfinite(value):
                return value, {}
            with torch.autocast(loss.device.type, enabled=False):  # the backward pass has the precision of the forward
                found = torch.autograd.grad(loss * scale, list(leaves.values()))
        gradients = {name: gradient / scale for name, gradient in zip(leaves, found, strict=True)}
        if scale <= 1 or all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            return value, gradients
        memory.loss_scale = scale / 2
