"""A video read once in every layer at chosen steps, and then asked about any point of any frame."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corrdit import ops
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.arguments import resolved_index
from corrdit.geometry import nearest_tokens, pixels_to_tokens, tokens_to_pixels
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.integrations.diffusers.analysis.video_pictures import prompt_words
from corrdit.integrations.diffusers.analysis.videos import analysis_axes, encoded_video, given_latents
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.progress import progress_or_bar
from corrdit.tracking.peaks import refined_peaks
from corrdit.tracking.readings import image_given
from corrdit.video import as_frames
from corrdit.video.frames import VideoLike

Read = tuple[Tensor, Tensor, TokenGrid, Tensor | None]
"""Queries, keys, their grid and the mask of the keys."""


class Setting(NamedTuple):
    """Which attention answers.

    Attributes:
        layer: attention layer.
        step: denoising step.
        head: one head, or None for the mean over heads.
    """

    layer: int
    step: int
    head: int | None = None


@dataclass(frozen=True, eq=False)
class PointAnswer:
    """What one setting says about a point.

    Args:
        costs: float32 `[F, h, w]`, cost map in every frame that was read, its own included; what `ops.cost_rows` gives.
        xy: `[F, 2]`, the most alike place of each frame, (x, y) in pixels of the video.
        words: attention of the point on each word of the prompt, float32 `[W]`, from the softmax over all tokens.
        frames: attention of the point on each frame, float32 `[F]`, from the same softmax.
    """

    costs: Tensor
    xy: np.ndarray
    words: Tensor
    frames: Tensor


class Exploration:
    """Queries and keys of a video, to be asked about points; made by `explore`.

    Attributes:
        frames: uint8 `[F, H, W, 3]`, the frames that were read, at their own size.
        layers, steps: what was read.
        heads: of a layer.
        preferred_layer: the one of the backbone's preset, or the last that was read.
        words: of the prompt.
    """

    def __init__(
        self,
        backbone: Backbone,
        frames: np.ndarray,
        scale: tuple[float, float],
        read: Mapping[tuple[int, int], Read],
        words: Sequence[str],
        places: Sequence[int],
        options: AnalysisOptions,
    ) -> None:
        self.frames = frames
        self.layers = tuple(sorted({layer for layer, _ in read}))
        self.steps = tuple(sorted({step for _, step in read}))
        self.heads = backbone.heads
        preset = backbone.preset.reading.layer % backbone.layers
        self.preferred_layer = preset if preset in self.layers else self.layers[-1]
        self.words = tuple(words)
        self._places, self._scale, self._read, self._options = tuple(places), scale, read, options
        self._stride = backbone.token_stride

    def token(self, x: float, y: float, grid: TokenGrid) -> Tensor:
        """Flat token int64 `[1]` of a frame that holds the point (x, y) in pixels of the video."""
        point = torch.tensor([[x, y]], dtype=torch.float32) * torch.tensor(self._scale)
        return nearest_tokens(pixels_to_tokens(point, self._stride), (grid.height, grid.width))

    def ask(self, frame: int, x: float, y: float, setting: Setting) -> PointAnswer:
        """Where a point is found in every frame, and what it attends to.

        Args:
            frame: of `frames`.
            x, y: in pixels of the video.
            setting: layer, step and head.

        Raises:
            ValueError: a frame, point, layer, step or head that was not read.
        """
        height, width = self.frames.shape[1:3]
        frame = resolved_index("frame", frame, len(self.frames), "the frames read")
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"the point ({x}, {y}) is outside of the frames of {width} x {height} pixels")
        if (setting.layer, setting.step) not in self._read:
            raise ValueError(
                f"layer {setting.layer} at step {setting.step} was not read; read were layers "
                f"{', '.join(map(str, self.layers))} at steps {', '.join(map(str, self.steps))}"
            )
        q, k, grid, key_mask = self._read[setting.layer, setting.step]
        if setting.head is not None:
            head = resolved_index("head", setting.head, self.heads, "the layer")
            q, k = q[:, head : head + 1], k[:, head : head + 1]
        token = self.token(x, y, grid)
        execution = self._options.execution
        costs = ops.cost_rows(
            q, k, grid, token, source=frame, bidirectional=self._options.bidirectional, key_mask=key_mask, **execution
        )[0, 0].cpu()
        mass = ops.attention_mass(q, k, grid, token, source=frame, key_mask=key_mask, **execution)
        peaks, _ = refined_peaks(costs, radius=1)
        xy = tokens_to_pixels(peaks, self._stride) / torch.tensor(self._scale)
        words = self._word_weights(q, k, grid, key_mask, grid.token(frame, 0, 0) + int(token))
        return PointAnswer(costs, xy.numpy(), words, mass.frames[0, 0].cpu())

    def _word_weights(self, q: Tensor, k: Tensor, grid: TokenGrid, key_mask: Tensor | None, row: int) -> Tensor:
        """`[W]`, mean over heads; nothing where the text is not among the tokens."""
        places = [place for place in self._places if place < grid.text_tokens]
        if not places:
            return torch.zeros(0)
        logits = torch.einsum("hd,hnd->hn", q[0, :, row].float(), k[0].float()) * q.shape[-1] ** -0.5
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[0], float("-inf"))
        return logits.softmax(-1).mean(0)[[grid.text_slice.start + place for place in places]].cpu()


def _keep(read: dict[tuple[int, int], Read], step: int, layer: int, name: str, result: Read) -> None:
    read[layer, step] = result


def explore(
    backbone: Backbone,
    video: VideoLike,
    *,
    layers: Iterable[int] | None = None,
    steps: Iterable[int] | None = None,
    prompt: str = "",
    options: AnalysisOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exploration:
    """Read a video: one forward of the model for each step, of which the queries and keys of all layers are kept.

    Args:
        backbone: of `load_backbone`.
        video: anything `corrdit.video.as_frames` takes.
        layers: attention layers, negative ones from the last; None for all.
        steps: denoising steps, negative ones from the last; None for the step of the backbone's preset.
        prompt: what the video shows, for the attention on its words.
        options: see `AnalysisOptions`; its layers and steps are those given here.
        progress: called with (steps done, steps in all).

    Raises:
        ValueError: as `analyze_video`.
    """
    options = replace(
        options or AnalysisOptions(),
        layers=None if layers is None else tuple(layers),
        steps=(backbone.preset.reading.step,) if steps is None else tuple(steps),
        features=False,
    )
    given = as_frames(video)
    frames = np.asarray(given[0 : len(given)])
    table = analysis_axes(backbone, options)
    seen = np.ones((len(frames), 1), dtype=bool)
    encoded = encoded_video(backbone, frames, np.zeros((len(frames), 1, 2), np.float32), seen, options)
    words, places = prompt_words(backbone, prompt)
    text = backbone.encoded_prompt(prompt) if words else None
    read: dict[tuple[int, int], Read] = {}
    report = progress_or_bar(progress, "steps")
    timesteps = dict(zip(table.steps, table.timesteps, strict=True))
    for done, (step, latents) in enumerate(given_latents(backbone, encoded.latents, timesteps, options), start=1):
        reading_forward(
            backbone,
            latents,
            timesteps[step],
            layers=table.layers,
            operation=lambda q, k, grid, key_mask: (q.clone(), k.clone(), grid, key_mask),
            feature_operation=None,
            deliver=functools.partial(_keep, read, step),
            text=text,
            image=image_given(backbone, encoded.latents).get("image"),
        )
        report(done, len(timesteps))
    shown = [group[len(group) // 2] for group in encoded.truth.frame_map]
    return Exploration(backbone, encoded.frames[shown], encoded.scale, read, words, places, options)
