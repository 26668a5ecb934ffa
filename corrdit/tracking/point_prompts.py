"""Tracking by a painted dot: a model regenerates the video with the dot on its first frame, and the dot is looked for.

Source: Shrivastava et al., "Point Prompting: Counterfactual Tracking with Video Diffusion Models" (arXiv 2510.11715): a
dot of a distinct colour on the query's frame, the rest of the video regenerated from an intermediate noise level
(SDEdit), each prediction pushed from the one for the unmarked first frame to the one for the marked one, and the dot
found by its colour near its last place. Noise level, weight and radii here are our own; their refinement by inpainting
is left out. A tracker for comparison: every point costs a generation of the video.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from corrdit.arguments import finite_number, whole_number
from corrdit.surroundings import ordinary_defaults
from corrdit.tracking.encoding import working_size
from corrdit.tracking.queries import VideoLike, check_queries, check_video
from corrdit.tracking.tracks import Tracks

MARKER = (255, 0, 0)
LEAST_REDNESS = 0.35
"""Red above the other channels, of 1, from which a pixel is taken for the dot."""


class PromptedBackbone(Protocol):
    """What `corrdit.load_backbone` returns."""

    name: str

    @property
    def token_stride(self) -> tuple[int, int]: ...

    @property
    def preset(self) -> Any: ...

    def encode_video(self, video: Tensor, *, height: int, width: int) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: float) -> Tensor: ...

    def timestep(self, step: int, inference_steps: int) -> float: ...

    def predict(self, latents: Tensor, timestep: float, *, image: Tensor | None = ...) -> Tensor: ...

    def denoised(
        self, latents: Tensor, start: int, steps: list[int], inference_steps: int
    ) -> Iterable[tuple[int, Tensor]]: ...


class Counterfactual:
    """A backbone whose predictions are pushed from the unmarked first frame to the marked one.

    Image-to-video models are given the two as their image; for others the first frame of the latents is replaced.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        marked, unmarked: clean latents `[F, C, h, w]` of the two videos.
        noise: in their shape.
        weight: lambda: (1 + weight) times the prediction of the marked one less weight times the other.
    """

    def __init__(
        self, backbone: PromptedBackbone, marked: Tensor, unmarked: Tensor, noise: Tensor, weight: float
    ) -> None:
        self._backbone, self._noise, self._weight = backbone, noise, weight
        self._firsts = (marked[:1], unmarked[:1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def predict(self, latents: Tensor, timestep: float, *, image: Tensor | None = None) -> Tensor:
        """The combined prediction, in the shape of the latents."""
        marked, unmarked = (self._prediction(latents, timestep, first) for first in self._firsts)
        return (1 + self._weight) * marked - self._weight * unmarked

    def _prediction(self, latents: Tensor, timestep: float, first: Tensor) -> Tensor:
        if getattr(self._backbone, "takes_image", False):
            return self._backbone.predict(latents, timestep, image=first)
        pinned = self._backbone.add_noise(first, self._noise[:1], timestep).to(latents)
        return self._backbone.predict(torch.cat([pinned, latents[1:]]), timestep)


class PointPromptTracker:
    """Follows points by a dot that a video diffusion model regenerates; as `PointTracker`, forwards in time.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        strength: share of the denoising steps that are run, of 1: how much noise the video gets.
        inference_steps: of the whole schedule.
        weight: see `Counterfactual`.
        radius: of the dot in pixels of the working size; None for 1/40 of its longer side.
        search: radius in pixels of the working size round the last place in which the dot is looked for; it grows by as
            much with each frame in which there is none. None for four times the dot's.
        seed: of the noise.

    Raises:
        ValueError: a number out of range.
    """

    @ordinary_defaults()
    def __init__(
        self,
        backbone: PromptedBackbone,
        *,
        strength: float = 0.5,
        inference_steps: int = 50,
        weight: float = 3.0,
        radius: float | None = None,
        search: float | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone
        self.inference_steps = whole_number("inference_steps", inference_steps, 2)
        self.start = round(self.inference_steps * (1 - finite_number("strength", strength, above=0, most=1)))
        self.start = min(self.start, self.inference_steps - 1)
        self.weight, self.seed = finite_number("weight", weight, least=0), whole_number("seed", seed, 0)
        self.radius = None if radius is None else finite_number("radius", radius, above=0)
        self.search = None if search is None else finite_number("search", search, above=0)

    @ordinary_defaults()
    @torch.no_grad()
    def track(self, video: VideoLike, queries: object) -> Tracks:
        """Where the query points are in the frames from their own on; before it they stay, hidden.

        Args, result and errors: as `PointTracker.track`; the score is the share of the dot's pixels that were found.
        """
        clip = torch.as_tensor(check_video(video)[:])
        table = check_queries(queries, *clip.shape[:3])
        frames = len(clip)
        xy = table[None, :, 1:].repeat(frames, 1, 1)
        visible, score = torch.zeros(frames, len(table), dtype=torch.bool), torch.zeros(frames, len(table))
        for point, (frame, *place) in enumerate(table.tolist()):
            anchor = int(frame)
            visible[anchor, point], score[anchor, point] = True, 1.0
            if anchor + 1 < frames:
                found, seen, share = self._followed(clip[anchor:], place)
                xy[anchor + 1 :, point], visible[anchor + 1 :, point], score[anchor + 1 :, point] = found, seen, share
        return Tracks(xy=xy, visible=visible, score=score)

    def _followed(self, clip: Tensor, place: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        height, width = self._size(clip)
        radius = self.radius or max(height, width) / 40
        scale = torch.tensor([width / clip.shape[2], height / clip.shape[1]])
        start = torch.tensor(place) * scale
        made = self.regenerated(clip, start, radius)[: len(clip)]
        found, seen, share = find_dot(made, start, radius, self.search or 4 * radius)
        return found[1:] / scale, seen[1:], share[1:]

    def regenerated(self, clip: Tensor, place: Tensor, radius: float) -> Tensor:
        """The video with a dot at `place` of its first frame, float `[T, H, W, 3]` in 0 to 1 at the working size."""
        height, width = self._size(clip)
        resized = torch.nn.functional.interpolate(
            clip.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear", antialias=True
        )
        plain = resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        marked = painted(plain, place, radius)
        latents, unmarked = (
            self.backbone.encode_video(part, height=height, width=width).float() for part in (marked, plain)
        )
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        steps = self.inference_steps
        noisy = self.backbone.add_noise(latents, noise, self.backbone.timestep(self.start, steps))
        pushed = cast(PromptedBackbone, Counterfactual(self.backbone, latents, unmarked, noise, self.weight))
        made = dict(type(self.backbone).denoised(pushed, noisy, self.start, [steps], steps))[steps]
        return self.backbone.decode(made).permute(0, 2, 3, 1).cpu().add(1).div(2).clamp(0, 1)

    def _size(self, clip: Tensor) -> tuple[int, int]:
        reading, stride = self.backbone.preset.reading, self.backbone.token_stride
        if reading.height and reading.width:
            return reading.height, reading.width
        return working_size(int(clip.shape[1]), int(clip.shape[2]), stride, reading.tokens_per_frame or 1350)


def painted(video: Tensor, place: Tensor, radius: float) -> Tensor:
    """The frames uint8 `[T, H, W, 3]` with a dot on the first, its centre at `place [2]` (x, y) in pixels."""
    marked = video.clone()
    height, width = video.shape[1:3]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    marked[0, (x - place[0]).square() + (y - place[1]).square() <= radius**2] = torch.tensor(MARKER, dtype=torch.uint8)
    return marked


def find_dot(video: Tensor, place: Tensor, radius: float, search: float) -> tuple[Tensor, Tensor, Tensor]:
    """The dot in each frame, by its colour, from its place in the first on.

    Args:
        video: float `[T, H, W, 3]` in 0 to 1.
        place: `[2]` (x, y) in pixels, in the first frame.
        radius: of the dot.
        search: how far from the last place it is looked for; grows by as much with each frame in which there is none.

    Returns:
        xy `[T, 2]`, the mean place of its pixels, or the last one; whether any was found `[T]`; and how many, as a
        share of the dot's area `[T]`.
    """
    frames, height, width = video.shape[:3]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    redness = video[..., 0] - video[..., 1:].amax(-1)
    xy, seen, share = place.repeat(frames, 1), torch.zeros(frames, dtype=torch.bool), torch.zeros(frames)
    reach, last = search, place
    for frame in range(frames):
        near = (x - last[0]).square() + (y - last[1]).square() <= reach**2
        weight = torch.where(near & (redness[frame] >= LEAST_REDNESS), redness[frame], torch.zeros(()))
        total = float(weight.sum())
        if total > 0:
            last, reach = torch.stack(((weight * x).sum(), (weight * y).sum())) / total, search
            seen[frame], share[frame] = True, min(1.0, float((weight > 0).sum()) / (np.pi * radius**2))
        else:
            reach += search
        xy[frame] = last
    return xy, seen, share
