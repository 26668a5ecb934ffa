"""What is read of the transformer for tracking: queries and keys of chosen layers, steps and heads, made one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from corrdit import ops
from corrdit.grid import TokenGrid
from corrdit.tracking.filtering import low_pass, without_channels
from corrdit.tracking.options import ReadingOptions
from corrdit.tracking.released_costs import bfloat16_rows

SMALL_FRAME = 256
"""Tokens of a frame up to which whole cost maps on a CPU cost less than streaming over their rows."""

Captured = tuple[Tensor, Tensor, Tensor | None]
Capturing = Callable[[Tensor, Tensor, TokenGrid, Tensor | None], Captured]


@dataclass(frozen=True)
class Reading(ReadingOptions):
    """Options of reading with all that a backbone and its preset say filled in.

    Args:
        layers: attention layers, at least one.
        timesteps: timesteps of the forward passes, at least one.
        steps: denoising steps of the timesteps, non-negative; needed with `inversion` and `denoise_from`.
        head_weights: as the option; None for equal weights.
    """

    layers: tuple[int, ...] = ()
    timesteps: tuple[float, ...] = ()
    _: KW_ONLY
    inference_steps: int = 1
    noise: bool = False
    heads: str = "probabilities"

    @property
    def votes(self) -> bool:
        """Whether every head gives cost maps of its own."""
        return self.combine == "median"

    @property
    def passes(self) -> int:
        """Forward passes for a batch of latents."""
        passes, start = len(self.timesteps), self.denoise_from
        if self.inversion is not None:
            passes += self.inference_steps - (min(self.steps) if start is None else start)
        return passes if start is None else passes + max(self.steps) - start

    def layer_weights(self, heads: int) -> tuple[tuple[float, ...], ...]:
        """The weights of the `heads` heads of each layer.

        Raises:
            ValueError: weights for another number of heads, all of them zero, or different weights for layers whose
                channels are joined.
        """
        layers = len(self.layers)
        given = self.head_weights or (1.0,) * heads
        if len(given) not in (heads, heads * layers):
            together = f" (or {heads * layers} for its {layers} layers)" if layers > 1 else ""
            raise ValueError(
                f"head_weights has {len(given)} weights, but the layer has {heads} heads{together}; give one for each"
            )
        spread = given if len(given) == heads * layers else given * layers
        if not all(0 <= weight < math.inf for weight in spread) or not any(spread):
            raise ValueError(f"head_weights must be finite, not negative and not all zero, got {list(spread)}")
        parts = tuple(spread[start : start + heads] for start in range(0, heads * layers, heads))
        if self.fusion == "channels" and len(set(parts)) > 1:
            raise ValueError('fusion="channels" joins heads of equal number: give head_weights for one layer')
        return parts


class ReadBackbone(Protocol):
    """A video transformer whose queries and keys are read."""

    heads: int

    @property
    def token_stride(self) -> tuple[int, int]: ...

    def timestep(self, step: int, inference_steps: int) -> float: ...

    def encode_frames(self, video: Tensor, *, height: int, width: int) -> Tensor: ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: float) -> Tensor: ...

    def forward(
        self, latents: Tensor, timestep: float, operations: Mapping[int, Capturing]
    ) -> Mapping[int, Captured]: ...


class SteppingBackbone(Protocol):
    """One that brings latents to other steps along the model's own path."""

    def inverted(
        self,
        latents: Tensor,
        steps: Sequence[int],
        inference_steps: int,
        *,
        rule: str = ...,
        image: Tensor | None = ...,
    ) -> Iterable[tuple[int, Tensor]]: ...

    def denoised(
        self, latents: Tensor, start: int, steps: Sequence[int], inference_steps: int, *, image: Tensor | None = ...
    ) -> Iterable[tuple[int, Tensor]]: ...


class TokenPair(NamedTuple):
    """Queries and keys `[B, H, F * S, D]` of the video tokens and how they are combined.

    Attributes:
        grid: of the tokens, without text.
        key_mask: bool `[B, F * S]` or None.
        weights: of the heads; None for equal ones.
        scale: factor of the products.
    """

    q: Tensor
    k: Tensor
    grid: TokenGrid
    key_mask: Tensor | None
    weights: list[float] | None
    scale: float


def read_tokens(
    backbone: ReadBackbone, latents: Tensor, reading: Reading, grid_size: tuple[int, int], noise: Tensor | None = None
) -> TokenPair:
    """Queries and keys of all layers and timesteps of a reading, made one pair.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        latents: `[F, C, h, w]` or `[B, F, C, h, w]`.
        reading: what to read.
        grid_size: (height, width) of the expected token grid.
        noise: in the shape of the latents, for readings with noise.

    Raises:
        ValueError: a token grid of another size, or what `Reading.layer_weights` refuses.
    """
    weights = reading.layer_weights(backbone.heads)
    parts: list[Captured] = []
    used: list[float] = []
    image = image_given(backbone, latents, reading.image)
    brought = latents_at_steps(backbone, latents, reading, noise, image)
    for timestep, given in zip(reading.timesteps, brought, strict=True):
        operations = {
            layer: _capture(part, grid_size, reading) for layer, part in zip(reading.layers, weights, strict=True)
        }
        captured = backbone.forward(given, timestep, operations, **image)
        parts += [captured[layer] for layer in reading.layers]
        used += [weight for part in weights for weight in part if weight > 0]
    axis = 1 if reading.fusion == "heads" else 3
    first = parts[0][0]
    if any(part[0].shape[2:] != first.shape[2:] for part in parts):
        raise ValueError("the layers have heads of different sizes; they cannot be read together")
    q, k = first, parts[0][1]
    if len(parts) > 1:
        q, k = torch.cat([part[0] for part in parts], axis), torch.cat([part[1] for part in parts], axis)
    if reading.fusion == "channels":
        used = [weight for weight in weights[0] if weight > 0]
    frames = first.shape[2] // (grid_size[0] * grid_size[1])
    scale = reading.temperature * first.shape[-1] ** -0.5
    equal = all(weight == used[0] for weight in used)
    return TokenPair(q, k, TokenGrid(frames, *grid_size), parts[0][2], None if equal else used, scale)


def image_given(backbone: ReadBackbone, latents: Tensor, frames: str = "first") -> dict[str, Tensor]:
    """The argument `image` for a model that takes one: clean latents of the "first" of the frames, or of "all"."""
    if not getattr(backbone, "takes_image", False):
        return {}
    return {"image": latents if frames == "all" else latents[..., :1, :, :, :]}


def latents_at_steps(
    backbone: ReadBackbone, latents: Tensor, reading: Reading, noise: Tensor | None, image: Mapping[str, Tensor]
) -> list[Tensor]:
    """The clean latents as they are read at each step: as they are, noised, inverted or denoised."""
    start, steps, count = reading.denoise_from, reading.steps, reading.inference_steps
    if start is None and reading.inversion is None:
        return [
            latents if noise is None else backbone.add_noise(latents, noise, timestep) for timestep in reading.timesteps
        ]
    path = stepping(backbone)
    if start is None:
        found = dict(path.inverted(latents, steps, count, rule=str(reading.inversion), **image))
        return [found[step] for step in steps]
    begun = latents
    if reading.inversion is not None:
        begun = dict(path.inverted(latents, [start], count, rule=reading.inversion, **image))[start]
    elif noise is not None:
        begun = backbone.add_noise(latents, noise, backbone.timestep(start, count))
    found = dict(path.denoised(begun, start, steps, count, **image))
    return [found[step] for step in steps]


def stepping(backbone: object) -> SteppingBackbone:
    """A backbone of which it is known that it inverts and denoises.

    Raises:
        ValueError: one that does not.
    """
    if not (hasattr(backbone, "inverted") and hasattr(backbone, "denoised")):
        name = getattr(backbone, "name", "this model")
        raise ValueError(f"{name} has no way to invert or denoise latents; drop inversion and denoise_from")
    return cast(SteppingBackbone, backbone)


def _capture(weights: Sequence[float], grid_size: tuple[int, int], reading: Reading) -> Capturing:
    """An operation for `corrdit.capture`: filtered queries and keys of the video tokens and of the heads that count."""
    used = [head for head, weight in enumerate(weights) if weight > 0]

    def operation(q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None) -> Captured:
        if (grid.height, grid.width) != grid_size:
            raise ValueError(
                f"the transformer has a grid of {grid.height} x {grid.width} tokens a frame, expected {grid_size}"
            )
        if q.shape[1] != len(weights):
            raise ValueError(f"head_weights has {len(weights)} weights, but the layer has {q.shape[1]} heads")
        video, alone = grid.video_slice, grid.without_text()
        q, k = (
            low_pass(without_channels(tokens[:, used, video], reading.channels_out), alone, reading.low_pass)
            for tokens in (q, k)
        )
        if reading.matched == "keys":
            # Products of the two, scaled by D^-1/2, are cosines.
            q = k = torch.nn.functional.normalize(k.float(), dim=-1) * k.shape[-1] ** 0.25
        return q, k, None if key_mask is None else key_mask[:, video].clone()

    return operation


def cost_rows(pair: TokenPair, reading: Reading, tokens: Tensor, *, source: int) -> Tensor:
    """Cost maps on the CPU, float32 `[B, V, R, F, h, w]`, of R tokens of the source frame.

    V is the number of heads for a reading with votes, 1 otherwise. With rounding the source frame has costs of 0.
    """
    if reading.rounding != "none":
        return bfloat16_rows(
            pair.q, pair.k, pair.grid, tokens, source=source, scale=pair.scale, bidirectional=reading.bidirectional,
            key_mask=pair.key_mask,
        )  # fmt: skip
    rows = ops.cost_rows(pair.q, pair.k, pair.grid, tokens, source=source, **_common(pair, reading))
    return (rows if reading.votes else rows.unsqueeze(1)).float().cpu()


def matches_back(pair: TokenPair, reading: Reading, *, source: int) -> Tensor:
    """For each token of every frame its best token in the source frame, float32 `[B, F, h, w, 2]` on the CPU."""
    common = {**_common(pair, reading), "heads": reading.heads, "head_weights": pair.weights}
    back = [
        ops.match(pair.q, pair.k, pair.grid, source=frame, targets=[source], **common).xy[:, 0]
        for frame in range(pair.grid.frames)
    ]
    return torch.stack(back, 1).float().cpu()


def _common(pair: TokenPair, reading: Reading) -> dict[str, Any]:
    small = pair.grid.tokens_per_frame <= SMALL_FRAME and pair.q.device.type == "cpu" and reading.memory_budget is None
    return {
        "heads": "none" if reading.votes else reading.heads,
        "head_weights": None if reading.votes else pair.weights,
        "scale": pair.scale,
        "key_mask": pair.key_mask,
        "bidirectional": reading.bidirectional,
        "backend": "reference" if small and reading.backend == "auto" else reading.backend,
        "memory_budget": reading.memory_budget,
    }
