"""What a motion transfer hands back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from corrdit.integrations.diffusers.motion_transfer.stored import StoredMotion


@dataclass
class TransferResult:
    """A new video with the motion of a reference.

    Args:
        video: uint8 `[T, H, W, 3]`.
        losses: float64 `[guided steps, optimisation steps]`, each before the optimiser's step; NaN where the gradient
            of an earlier step was used again. `[0, 0]` where nothing was optimised.
        flows: motion of the reference by block: hard displacement (dx, dy) in tokens between all frames, int64
            `[F, F, h, w, 2]` (from frame, to frame, row, column); empty where there was no reference.
        reference: the reference as the model was given it, uint8 `[T, H, W, 3]`; None where there was none.
        optimised: what was optimised, to be saved and injected into other generations; None where nothing was.
        seed: of the run's random numbers.
        region: bool `[F, h, w]`, the tokens whose motion was wanted; None for all.
        resumed_after: denoising steps that an earlier run had finished; 0 for a run from the beginning.
        guided: the denoising steps that were guided.
    """

    video: np.ndarray
    losses: np.ndarray
    flows: dict[int, torch.Tensor] = field(default_factory=dict)
    reference: np.ndarray | None = None
    optimised: StoredMotion | None = None
    seed: int = 0
    region: torch.Tensor | None = None
    resumed_after: int = 0
    guided: range = range(0)

    @property
    def flow(self) -> torch.Tensor:
        """`flows` of the first block.

        Raises:
            ValueError: there was no reference.
        """
        if not self.flows:
            raise ValueError("there was no reference in this run, so there is no motion flow")
        return next(iter(self.flows.values()))


def as_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames `[T, H, W, 3]` in 0..1 as uint8."""
    frames = np.asarray(frames)
    if not np.isfinite(frames).all():
        raise ValueError(
            "the pipeline made frames that are NaN; take another precision, a smaller guidance_scale or, where "
            "something is optimised, a smaller learning_rate"
        )
    return (frames * 255).round().clip(0, 255).astype(np.uint8)
