"""Muon for the matrices of a transformer's blocks and AdamW for everything else, as one optimiser.

Muon: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the update is scaled to the
size of AdamW's as in J. Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982, section 2.2), so that
both parts share a learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix [m, n] near U V^T of its singular value decomposition, by Newton-Schulz iterations (Jordan et al.).

    The singular values come out between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    current = matrix.T if tall else matrix
    current = current / (current.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = current @ current.T
        current = torch.addmm(current, torch.addmm(gram, gram, gram, beta=b, alpha=c), current, beta=a)
    return current.T if tall else current


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `orthogonal=True` (matrices only) take Muon's step, the others AdamW's.

    matrices, others: parameters of the two kinds; learning_rate of both, times `matrix_rate` for the matrices;
    weight_decay is decoupled and leaves vectors alone.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        others: list[Tensor],
        learning_rate: float,
        *,
        matrix_rate: float = 1.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        if any(matrix.ndim != 2 for matrix in matrices):
            raise ValueError("Muon updates matrices; give other shapes among `others`")
        groups = [
            {"params": matrices, "orthogonal": True, "lr": learning_rate * matrix_rate, "weight_decay": weight_decay},
            {"params": [one for one in others if one.ndim > 1], "weight_decay": weight_decay},
            {"params": [one for one in others if one.ndim <= 1], "weight_decay": 0.0},
        ]
        defaults = {"lr": learning_rate, "orthogonal": False, "momentum": momentum, "betas": betas}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; `closure` computes the loss first, as Lightning does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            if group["orthogonal"]:
                for weight in weights:
                    average = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    average.lerp_(weight.grad, 1 - group["momentum"])
                    update = orthogonalised(weight.grad.lerp(average, group["momentum"]))
                    weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))
            elif weights:
                self._step_others(weights, [weight.grad for weight in weights], group["lr"], group["betas"])
        return loss

    def _step_others(
        self, weights: list[Tensor], gradients: list[Tensor], rate: float, betas: tuple[float, float]
    ) -> None:
        first_decay, second_decay = betas
        states = [self.state[weight] for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            if not state:
                state |= {"first": torch.zeros_like(weight), "second": torch.zeros_like(weight), "step": 0}
            state["step"] += 1
        first, second = ([state[name] for state in states] for name in ("first", "second"))
        torch._foreach_lerp_(first, gradients, 1 - first_decay)
        torch._foreach_mul_(second, second_decay)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - second_decay)
        for weight, mean, square, state in zip(weights, first, second, states, strict=True):
            size = (square / (1 - second_decay ** state["step"])).sqrt_().add_(1e-8)
            weight.addcdiv_(mean, size, value=-rate / (1 - first_decay ** state["step"]))
