"""Zero-shot point tracking from the queries and keys of a video diffusion transformer."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, Protocol, cast

import torch

from corrdit.display import table_html
from corrdit.pipelines import backbone_of_pipeline
from corrdit.progress import Progress
from corrdit.surroundings import ordinary_defaults
from corrdit.tracking.chunk_costs import Settings
from corrdit.tracking.chunks import anchored_chunks, chained_chunks, frame_blocks
from corrdit.tracking.dense import DenseTracks
from corrdit.tracking.encoding import resized, working_size
from corrdit.tracking.following import Blocks
from corrdit.tracking.options import PRESETS, Options, ReadingOptions, ReadingPreset, TrackerOptions, changed_options
from corrdit.tracking.queries import Frames, VideoLike, check_video
from corrdit.tracking.readings import ReadBackbone, Reading, stepping
from corrdit.tracking.tracks import Tracks
from corrdit.tracking.video_reading import VideoReading

__all__ = ["PointTracker", "TrackingBackbone", "resized", "working_size"]

TOKENS_PER_FRAME = 30 * 45
"""Tokens of a frame of 480 x 720 pixels in CogVideoX; the limit where a backbone has no working size of its own."""


class TrackingPreset(Protocol):
    """The parts of a model's preset that the tracker reads."""

    @property
    def reading(self) -> ReadingPreset: ...

    @property
    def tracking(self) -> TrackerOptions: ...


class TrackingBackbone(ReadBackbone, Protocol):
    """What the tracker asks of a video transformer; `corrdit.load_backbone` gives one."""

    layers: int

    @property
    def preset(self) -> TrackingPreset: ...


class Pipeline(Protocol):
    """A video pipeline of diffusers."""

    transformer: torch.nn.Module


class PointTracker:
    """Follows points through a video by the attention of a video diffusion transformer, without training.

    Every frame is encoded as a latent of its own; chunks of frames that hold the query's frame go through the
    transformer at one denoising step with the empty prompt, up to the layer asked for; every point takes the position
    of largest query-key cost in each frame. Source: DiffTrack, "Emergent Temporal Correspondences from Video
    Diffusion Transformers" (arXiv 2506.17220), zero-shot point tracking.

    A forward pass is made for every chunk of every distinct query frame: points on one frame share them, points on n
    frames cost n times as much. Where `crops` are asked for (or the backbone's preset has them), every point is then
    looked at again in enlarged crops, which finds it far below the token at a cost that grows with the points.

    Args:
        backbone: what `corrdit.load_backbone` returns, or a pipeline of diffusers that is loaded.
        preset: settings in place of the backbone's: a `corrdit.integrations.diffusers.Preset`; or "published" for
            DiffTrack's released evaluation in place of its options of tracking, and "default" for these.
        options: in place of the preset's, see `corrdit.tracking.TrackerOptions`.

    Raises:
        TypeError: neither a backbone nor a pipeline.
        ValueError: an unknown preset or option, a value out of range, or what the backbone cannot serve, such as a
            step outside the schedule or weights for another number of heads.
    """

    @ordinary_defaults()
    def __init__(
        self, backbone: TrackingBackbone | Pipeline, *, preset: str | TrackingPreset = "default", **options: Any
    ) -> None:
        backbone = _checked_backbone(backbone)
        self.backbone = backbone
        self.preset = backbone.preset if isinstance(preset, str) else preset
        self.options = changed_options(self._own_options(preset, options), options)
        self._check_conditioning(options)
        self.layers = self.options.layers or (self._chosen("layer"),)
        for layer in self.layers:
            if not 0 <= layer < backbone.layers:
                raise ValueError(f"layer must be from 0 to {backbone.layers - 1} for this backbone, got {layer}")
        self._check_served()

    def __repr__(self) -> str:
        return f"<PointTracker of {getattr(self.backbone, 'name', 'a model')}: {', '.join(self._read_where())}>"

    def _repr_html_(self) -> str:
        named = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        usual = TrackerOptions()
        rows = {"reads": ", ".join(self._read_where())}
        rows |= {name: value for name, value in named.items() if value != getattr(usual, name)}
        return table_html(f"PointTracker of {getattr(self.backbone, 'name', 'a model')}", rows)

    def _read_where(self) -> list[str]:
        """Layers, steps and chunks in words."""
        reading = self._reading()
        layers, steps = (", ".join(map(str, numbers)) for numbers in (self.layers, reading.steps))
        said = [f"layer {layers}", f"step {steps} of {reading.inference_steps}"]
        return [*said, f"{self._chosen('frames_per_chunk')} frames a chunk"]

    def track(
        self,
        video: VideoLike,
        queries: object,
        *,
        progress: Progress | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> Tracks:
        """Where the query points are in every frame of the video.

        Args:
            video: a path, a list of PIL images, or uint8 or floating-point (0 to 1) frames `[T, H, W, 3]` or
                `[T, 3, H, W]`; all that `corrdit.video.as_frames` takes.
            queries: `[P, 3]` (frame, x, y), frame a whole number, x and y in pixels from the frame's top left corner;
                or "grid:16" for 16 x 16 points on the first frame.
            progress: called with (forward passes done, forward passes in all); a bar of tqdm in notebooks and on
                terminals if left out.
            resume: a folder for the tracks of each block of frames (`frames_per_block`) as it is done, from which a run
                that was stopped goes on. For a video that is given as a path.

        Returns:
            `Tracks(xy [T, P, 2] in pixels, visible [T, P], score [T, P])`. At its own query frame a point is visible,
            at the place it was given, with score 1. Elsewhere the score is the cost at the match, in 0 to 1.

        Raises:
            TypeError: what is no video.
            ValueError: the video has fewer than two frames, another layout or values out of range, or a query lies
                outside it; `resume` holds blocks of another video, model, set of points or options.
        """
        return self._opened(video, keep=False).track(queries, progress=progress, resume=resume)

    def read(self, video: VideoLike, *, frames: Iterable[int] = (0,), progress: Progress | None = None) -> VideoReading:
        """A video read once, to be asked for any number of points as often as wanted.

        `reading.track(queries)` gives what `track(video, queries)` does, without another pass of whole frames for
        points on `frames`; points on other frames cost theirs once. Crops go through the transformer for every point
        that is asked. Queries, keys and latents of all frames, and with `crops` the frames at their sizes, stay in
        memory.

        Args:
            video: as for `track`.
            frames: whose points will be asked for.
            progress: called with (forward passes done, forward passes in all).

        Raises:
            TypeError, ValueError: as for `track`; a frame that the video does not have.
        """
        reading = self._opened(video, keep=True)
        reading.read(frames, progress=progress)
        return reading

    def dense(
        self, video: VideoLike, frame: int = 0, *, every: int = 1, progress: Progress | None = None
    ) -> DenseTracks:
        """Where every pixel of a frame goes: `read(video, frames=[frame]).dense(frame, every=every)`.

        With `crops` every point is looked at again by itself; `crops=()` is meant for this.
        """
        return self.read(video, frames=[frame]).dense(frame, every=every, progress=progress)

    def reading_of(self, video: Frames, *, keep: bool) -> VideoReading:
        """One of `video [T, H, W, 3]` of which nothing is read yet; for `VideoReading.load`."""
        frames, height, width = (int(size) for size in video.shape[:3])
        settings = self.settings_of(frames, height, width)
        if keep:
            settings = replace(settings, frames_kept=frames)
        return VideoReading(self.backbone, settings, video, functools.partial(self._blocks, frames), keep=keep)

    @ordinary_defaults()
    def _opened(self, video: VideoLike, *, keep: bool) -> VideoReading:
        return self.reading_of(check_video(video), keep=keep)

    def _check_served(self) -> None:
        """Refuses, before any video, steps, weights, sizes and chunks that fit neither the backbone nor each other."""
        reading = self._reading()
        reading.layer_weights(self.backbone.heads)
        if self.options.update and reading.heads != "probabilities":
            raise ValueError(
                f'update={self.options.update} is for heads="probabilities"; the preset has {reading.heads!r}'
            )
        self._blocks(2, 0)
        if self.options.height is not None:
            self._encoded_size(self.options.height, self.options.height)

    def _blocks(self, frames: int, anchor: int) -> Blocks:
        options = self.options
        size = self._chosen("frames_per_chunk")
        if options.schedule == "chained":
            return [[chunk] for chunk in chained_chunks(frames, anchor, frames_per_chunk=size)]
        given: dict[str, Any] = {"schedule": options.schedule, "stride": options.stride, "interval": options.interval}
        # The released reading joins what all chunks say of a frame.
        most = None if options.geometry == "released" else options.frames_per_block
        blocks = frame_blocks(frames, anchor, most)
        return [anchored_chunks(block, anchor, frames_per_chunk=size, **given) for block in blocks]

    def settings_of(self, frames: int, height: int, width: int) -> Settings:
        """What is read of a video of so many frames and pixels, and how."""
        kept = frames if self.options.frames_per_block is None else self.options.frames_per_block + 1
        if self.options.schedule == "chained":
            kept = self._chosen("frames_per_chunk")
        return Settings(self.options, self._reading(), self._encoded_size(height, width), kept)

    def _reading(self) -> Reading:
        inference_steps = self._chosen("inference_steps")
        steps, start = self._steps(inference_steps)
        filled_in = {
            "layer": None,
            "layers": self.layers,
            "timesteps": tuple(self.backbone.timestep(step, inference_steps) for step in steps),
            "step": None,
            "steps": steps,
            "inference_steps": inference_steps,
            "noise": self.options.inversion is None and bool(self._chosen("noise")),
            "denoise_from": start,
            "heads": self._chosen("heads"),
            "head_weights": self._head_weights(),
        }
        given = {field.name: getattr(self.options, field.name) for field in fields(ReadingOptions)}
        return Reading(**{**given, **filled_in})

    def _steps(self, inference_steps: int) -> tuple[tuple[int, ...], int | None]:
        """The steps that are read and the one from which is denoised, counted from 0."""
        given, start = self.options.steps or (self._chosen("step"),), self.options.denoise_from
        for step in given if start is None else (*given, start):
            self.backbone.timestep(step, inference_steps)  # refuses a step outside the schedule
        steps = tuple(step % inference_steps for step in given)
        if start is None:
            return steps, None
        start %= inference_steps
        if min(steps) < start:
            raise ValueError(f"step {min(steps)} is noisier than step {start}, from which is denoised; begin there")
        return steps, start

    def _check_conditioning(self, given: Options) -> None:
        options, name = self.options, getattr(self.backbone, "name", "this model")
        if "image" in given and not getattr(self.backbone, "takes_image", False):
            raise ValueError(f"image={options.image!r} is for image-to-video models, and {name} is none; drop it")
        if options.inversion is not None or options.denoise_from is not None:
            stepping(self.backbone)

    def _own_options(self, preset: str | TrackingPreset, given: Options) -> TrackerOptions:
        """The options of the preset; those for layers of its own do not count where others are asked for."""
        if isinstance(preset, str) and preset != "default":
            if preset not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)} or a Preset, got {preset!r}")
            return PRESETS[preset]
        own = self.preset.tracking
        return TrackerOptions() if own.layers and given.keys() & {"layer", "layers"} else own

    def _head_weights(self) -> tuple[float, ...] | None:
        """The weights asked for, those of the preset if its layer is read, or None for the plain mean."""
        if self.options.head_weights is not None:
            return self.options.head_weights or None
        return self.preset.reading.weights_of_heads(self.layers, self.backbone.heads)

    def _chosen(self, name: str) -> Any:
        """The option, or what the preset says."""
        given = getattr(self.options, name)
        return getattr(self.preset.reading, name) if given is None else given

    def _encoded_size(self, height: int, width: int) -> tuple[int, int]:
        options, preset, stride = self.options, self.preset.reading, self.backbone.token_stride
        if options.height is None and options.tokens_per_frame is None and preset.height and preset.width:
            return preset.height, preset.width
        if options.height is None or options.width is None:
            tokens = self._chosen("tokens_per_frame") or TOKENS_PER_FRAME
            return working_size(height, width, stride, tokens)
        if options.height % stride[0] or options.width % stride[1]:
            raise ValueError(
                f"frames of {options.height} x {options.width} (height x width) are no whole number of tokens of "
                f"{stride[0]} x {stride[1]} pixels; give a multiple of these"
            )
        return options.height, options.width


def _checked_backbone(given: object) -> TrackingBackbone:
    backbone = backbone_of_pipeline(given)
    if not hasattr(backbone, "token_stride") or isinstance(backbone, type):
        kind = f"the class {backbone.__name__}" if isinstance(backbone, type) else repr(backbone)[:80]
        raise TypeError(f"backbone must be what corrdit.load_backbone returns or a pipeline of diffusers, got {kind}")
    return cast(TrackingBackbone, backbone)
