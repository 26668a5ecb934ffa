"""What a new video is pulled towards: what is read of a video, the loss of it, and where the gradient goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from corrdit.grid import CrossGrid, TokenGrid
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

READS = ("attention", "text", "features", "prediction")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What every objective is given of a video.

    Args:
        settings: of the transfer.
        grid: the token axis of the forward.
        region: bool `[F, h, w]`, the tokens whose motion is wanted; None for all.
        words: of the prompt the video is read or made with.
    """

    settings: TransferSettings
    grid: TokenGrid
    region: Tensor | None = None
    words: PromptWords | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionReading(Reading):
    """Queries and keys of one attention layer.

    Args:
        q, k: `[1, H, N, D]`, after normalisation and rotary embedding, text included.
        key_mask: bool `[1, N]` of the keys that take part; None for all.
    """

    q: Tensor
    k: Tensor
    key_mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TextReading(Reading):
    """The attention of one layer from the video to the text: of cross-attention, or that part of joint attention.

    Args:
        q: `[1, H, F * S, D]`, of the video.
        k: `[1, H, T, D]`, of the text.
        key_mask: bool `[1, T]` of the text tokens that take part; None for all.
        text: both axes.
    """

    q: Tensor
    k: Tensor
    key_mask: Tensor | None
    text: CrossGrid


@dataclass(frozen=True, kw_only=True)
class FeatureReading(Reading):
    """The output of one block for the video tokens, features `[F, C, h, w]`."""

    features: Tensor


@dataclass(frozen=True, kw_only=True)
class PredictionReading(Reading):
    """The clean latents that the model predicts at a step.

    Args:
        clean: `[F, C, h, w]`, as the codec counts frames and channels. In the loss they depend on the noisy latents,
            while the model's prediction counts as a constant: no gradient enters the transformer.
    """

    clean: Tensor

    @property
    def latent_region(self) -> Tensor | None:
        """The region as `clean` has it: bool `[F, 1, h, w]`, None for all."""
        return None if self.region is None else at_latents(self.region, self.clean)


class MotionObjective:
    """What a transfer optimises; `method=` of `corrdit.MotionTransfer` takes any subclass or instance.

    Its `loss` is averaged over the settings' blocks (there is one prediction) and minimised at every guided step. An
    instance has no state that a run changes; what it was made with stands in its attributes, as numbers, texts, lists
    or tensors, and is written into the results' settings.

    Attributes:
        reads: "attention" gives `loss` an `AttentionReading` of each block, "text" a `TextReading`, "features" a
            `FeatureReading`, "prediction" one `PredictionReading`; None for an objective without a loss.
        moves: what its gradient may change, of "latent" and "embedding". That of a prediction reaches latents only.
        needs_reference: whether there has to be a reference video.
        injects: what of the reference's attention goes into the settings' `injection_blocks` at guided steps: some of
            "query", "key" and "value".
        velocity_kept: with "prediction", the share that is kept of what the model's velocity has across the mean
            velocity of the steps so far; 1 keeps all of it.
    """

    reads: ClassVar[str | None] = None
    moves: ClassVar[tuple[str, ...]] = ("latent", "embedding")
    needs_reference: ClassVar[bool] = True
    injects: ClassVar[tuple[str, ...]] = ("key", "value")
    velocity_kept: ClassVar[float] = 1.0

    def of_reference(self, read: Any) -> Any:
        """What the loss compares with, from the reading of the reference."""
        return read

    def loss(self, read: Any, wanted: Any) -> Tensor:
        """A differentiable scalar, float32 or float64.

        Args:
            read: of the new video, of the class that `reads` says.
            wanted: what `of_reference` gave for the same block; None where no reference is needed.
        """
        raise TypeError(f"{type(self).__name__} has no loss; write loss(self, read, wanted)")

    def check(self, settings: TransferSettings) -> None:
        """Refuse settings that do not go with the objective.

        Raises:
            ValueError: naming the setting.
        """

    def described(self) -> dict[str, object]:
        """What it was made with, by name."""
        return dict(vars(self))


def at_latents(region: Tensor, latents: Tensor) -> Tensor:
    """A region of tokens `[F, h, w]` at the size of latents `[F', C, h', w']`: bool `[F', 1, h', w']`."""
    for axis, size in zip((0, 1, 2), (latents.shape[0], *latents.shape[2:]), strict=True):
        region = region.repeat_interleave(size // region.shape[axis], dim=axis)
    return region.unsqueeze(1).to(latents.device)


def mean_within(values: Tensor, region: Tensor | None) -> Tensor:
    """Mean over all values, or those of a region that broadcasts to them."""
    if region is None:
        return values.mean()
    weights = region.to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum()


def all_finite(tensor: Tensor) -> bool:
    """Whether nothing is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())
