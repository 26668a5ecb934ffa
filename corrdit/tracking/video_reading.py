"""A video read once, of which any points are then asked as often as wanted; kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from corrdit.arguments import resolved_index, whole_indices, whole_number
from corrdit.array_files import content_digest, read_safetensors
from corrdit.files import file_digest, written_beside
from corrdit.geometry import bilinear_tokens
from corrdit.grid import TokenGrid
from corrdit.progress import Progress, progress_or_bar
from corrdit.surroundings import ordinary_defaults
from corrdit.tracking.chunk_costs import ChunkReader, CostAccumulator, HeldChunk, Settings
from corrdit.tracking.chunks import Chunk, last_visits
from corrdit.tracking.dense import DenseTracks, dense_tracks
from corrdit.tracking.encoding import FrameStore
from corrdit.tracking.following import Blocks, Following
from corrdit.tracking.queries import Frames, check_queries
from corrdit.tracking.readings import ReadBackbone, TokenPair
from corrdit.tracking.track_parts import TrackParts
from corrdit.tracking.tracks import Tracks
from corrdit.video import StreamedVideo

FORMAT = "corrdit video reading 1"
DENSE_BYTES = 2**28
"""Of cost maps, for the points of a dense reading that are followed together."""

_HOW_COMPUTED = ("backend", "memory_budget")
"""Options of reading that do not say what is read."""


class ReadingTracker(Protocol):
    """A `corrdit.PointTracker`."""

    backbone: ReadBackbone

    def reading_of(self, video: Frames, *, keep: bool) -> VideoReading: ...


class VideoReading:
    """What a video transformer says of one video: `PointTracker.read` makes it.

    ```python
    reading = PointTracker("embedded").read(video)
    tracks = reading.track([[0, 120.0, 80.0]])
    maps = reading.costs((0, 120.0, 80.0))
    reading.save("bear.reading")
    reading = VideoReading.load("bear.reading", tracker)
    ```

    Args:
        backbone: what `corrdit.load_backbone` returns.
        settings: of the tracker.
        video: uint8 `[T, H, W, 3]` by slices.
        blocks: from a source frame to its chunks.
        keep: whether the chunks that were read are kept.
    """

    def __init__(
        self,
        backbone: ReadBackbone,
        settings: Settings,
        video: Frames,
        blocks: Callable[[int], Blocks],
        *,
        keep: bool,
    ) -> None:
        self.shape = tuple(int(size) for size in video.shape)
        self._video, self._blocks = video, blocks
        self._passes = _Passes()
        self._reader = ChunkReader(backbone, settings, video, self._passes.done, keep=keep)
        self._following = Following(self._reader, video)

    @ordinary_defaults()
    @torch.no_grad()
    def read(self, frames: Iterable[int], *, progress: Progress | None = None) -> None:
        """Read all chunks for points on these frames now; what has been read stays.

        Args:
            frames: of the video, negative ones from the end.
            progress: called with (forward passes done, forward passes in all).

        Raises:
            ValueError: a frame that the video does not have.
        """
        among = f"the video's {self.shape[0]} frames"
        sources = [resolved_index("frame", frame, self.shape[0], among) for frame in whole_indices("frames", frames)]
        blocks = [block for source in sources for block in self._blocks(source)]
        self._passes.begin(self._reader.passes({chunk for block in blocks for chunk in block}), progress)
        for block in blocks:
            self._following.load(block)
            for chunk in block:
                self._reader.cost(chunk, torch.zeros(1, dtype=torch.int64), way_back=self._following.way_back)

    @ordinary_defaults()
    @torch.no_grad()
    def track(
        self, queries: object, *, progress: Progress | None = None, resume: str | os.PathLike[str] | None = None
    ) -> Tracks:
        """Where the query points are in every frame of the video.

        Args, result and errors: as `PointTracker.track`.
        """
        table = check_queries(queries, *self.shape[:3])
        anchors = sorted({int(frame) for frame in table[:, 0]})
        plans = {anchor: self._blocks(anchor) for anchor in anchors}
        chosen = {anchor: (table[:, 0] == anchor).nonzero()[:, 0] for anchor in anchors}
        following = self._following
        total = sum(following.passes(len(chosen[anchor]), blocks) for anchor, blocks in plans.items())
        self._passes.begin(total, progress)
        several = sum(map(len, plans.values())) > 1
        parts = TrackParts(resume, self._made_from(table)) if resume is not None and several else None
        frames = self.shape[0]
        xy = torch.empty(frames, len(table), 2)
        visible = torch.zeros(frames, len(table), dtype=torch.bool)
        score = torch.zeros(frames, len(table))
        for anchor, blocks in plans.items():
            rows = chosen[anchor]
            points = table[rows, 1:]
            xy[anchor, rows], visible[anchor, rows], score[anchor, rows] = points, True, 1.0
            ends = following.start(points, anchor)
            start = dict(ends)
            for number, chunks in enumerate(blocks):
                found = None if parts is None else parts.stored(anchor, number)
                if found is None:
                    found = following.follow(points, chunks, ends)
                    if parts is not None:
                        parts.store(anchor, number, found)
                else:
                    self._passes.skip(following.passes(len(rows), [chunks]))
                place = torch.tensor(found.frames)[:, None]
                xy[place, rows], visible[place, rows], score[place, rows] = found.xy, found.visible, found.score
                ends = {**start, **found.end}
        return Tracks(xy=xy, visible=visible, score=score)

    @ordinary_defaults()
    @torch.no_grad()
    def costs(self, point: object) -> Tensor:
        """Cost maps of one point in all frames, its own included: `corrdit.ops.cost_rows` of what was read.

        A point between token centres has the bilinear mean of the rows of the four tokens round it. Frames that several
        chunks hold (the point's own is in all of them) have the mean of their maps with `average_overlap`, otherwise
        the first. With `combine="median"` the mean over heads.

        Args:
            point: (frame, x, y), x and y in pixels from the frame's top left corner.

        Returns:
            float32 `[T, h, w]` over the tokens of each frame, on the CPU.

        Raises:
            ValueError: not one point inside the video, or a tracker with `schedule="chained"`, which follows a point
                from chunk to chunk.
        """
        table = check_queries([point], *self.shape[:3])
        options = self._reader.settings.options
        if options.schedule == "chained":
            raise ValueError('schedule="chained" has no costs of a point in all frames; read with another schedule')
        blocks, tokens = self._blocks(int(table[0, 0])), self._following.tokens_of(table[:, 1:])
        chunks = [chunk for block in blocks for chunk in block]
        self._passes.begin(self._reader.passes(chunks), None)
        around, share = bilinear_tokens(tokens, self._reader.grid_size)
        unique, place = around[0].unique(return_inverse=True)
        accumulator = CostAccumulator(last_visits(chunks), average=options.average_overlap)
        maps = torch.zeros(self.shape[0], *self._reader.grid_size)
        own: list[Tensor] = []
        for index, chunk in enumerate(chunks):
            cost = self._reader.cost(chunk, unique, way_back=False)
            own.append(cost.rows[:, :, chunk.frames.index(chunk.source)])
            for frame, found in accumulator.add(index, chunk, cost):
                maps[frame] = _at_point(found.rows, place, share[0])
        source = torch.stack(own).mean(0) if options.average_overlap else own[0]
        maps[chunks[0].source] = _at_point(source, place, share[0])
        return maps

    def dense(self, frame: int = 0, *, every: int = 1, progress: Progress | None = None) -> DenseTracks:
        """Where every pixel of a frame goes: `track` of a regular grid of its points, so many at a time.

        Args:
            frame: whose pixels are followed, negative ones from the end.
            every: pixels from one point to the next, in x and y.
            progress: called with (points done, points in all).

        Returns:
            `DenseTracks(displacement [T, H // every, W // every, 2] in pixels, visible [T, H // every, W // every])`.

        Raises:
            ValueError: a frame that the video does not have, or `every` below 1.
        """
        frame = resolved_index("frame", frame, self.shape[0], f"the video's {self.shape[0]} frames")
        together = max(1, DENSE_BYTES // self._following.bytes_a_point(self._blocks(frame)))
        return dense_tracks(self, frame, whole_number("every", every, 1), together, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that was read as one safetensors file, beside and then renamed; `load` reads it.

        Latents of frames and, with `crops`, the frames at the crops' sizes are in it, so the video is not needed again.

        Raises:
            ValueError: the model has no fingerprint of its weights, so a file could not be bound to it.
            OSError: the folder is missing, cannot be written, or the disk is full.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        for name, store in self._stores():
            tensors[name] = store.of(range(self.shape[0]))
        chunks, pairs = [], []
        for index, (chunk, held) in enumerate(self._reader.held.items()):
            chunks.append([chunk.source, *chunk.targets])
            facts, parts = _pair_parts(held)
            pairs.append(facts)
            tensors |= {f"chunk.{index}.{name}": part for name, part in parts.items()}
        facts = {**self._bound_to(), "shape": self.shape, "chunks": chunks, "pairs": pairs}
        contents = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with written_beside(path) as file:
            file.write(save(contents, metadata={"format": FORMAT, "facts": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], tracker: ReadingTracker) -> VideoReading:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            tracker: a `corrdit.PointTracker` on the same model with the same options of reading; options of following,
                such as `refine` and `tolerance`, may be others.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, a damaged one, or one of another model or of other options of reading.
        """
        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{os.fspath(path)} holds no reading of a video; give a file that VideoReading.save wrote")
        try:
            return cls._restored(os.fspath(path), tensors, json.loads(metadata["facts"]), tracker)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged: {type(error).__name__} {error}") from error

    @staticmethod
    def _restored(
        path: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], tracker: ReadingTracker
    ) -> VideoReading:
        reading = tracker.reading_of(_ShapeOnly(facts["shape"]), keep=True)
        reading._check_bound(path, facts)
        device = getattr(tracker.backbone, "device", torch.device("cpu"))
        for name, store in reading._stores():
            if name not in tensors or len(tensors[name]) != reading.shape[0]:
                raise ValueError(f"{path} is damaged: it lacks the {name} of its frames")
            store.keep(tensors[name].to(device) if name == "latents" else tensors[name])
        for index, (frames, pair) in enumerate(zip(facts["chunks"], facts["pairs"], strict=True)):
            prefix = f"chunk.{index}."
            parts = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            reading._reader.held[Chunk(frames[0], tuple(frames[1:]))] = _pair_of(pair, parts, device)
        return reading

    def _stores(self) -> Iterator[tuple[str, FrameStore]]:
        yield "latents", self._reader.latents
        for scale, level in zip(self._reader.settings.options.crops, self._following.levels, strict=True):
            yield f"pictures.{scale:g}", level.pictures

    def _bound_to(self) -> dict[str, Any]:
        """What a file of this reading holds for: the model and everything that decides what is read of it."""
        backbone, settings = self._reader.backbone, self._reader.settings
        if not hasattr(backbone, "fingerprint"):
            raise ValueError(
                f"{getattr(backbone, 'name', 'this model')} gives no fingerprint() of its weights, to which a file of "
                "a reading is bound"
            )
        reading = {name: value for name, value in asdict(settings.reading).items() if name not in _HOW_COMPUTED}
        options = settings.options
        sizes = {"encoded": settings.encoded, "resize_first": options.resize_first, "antialias": options.antialias}
        facts = {
            "model": getattr(backbone, "name", "a model"),
            "weights": backbone.fingerprint(),
            "options": {**reading, **sizes, "crops": options.crops, "crop_tokens": options.crop_tokens},
        }
        return dict(json.loads(json.dumps(facts)))

    def _made_from(self, table: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
        """Settings and inputs of tracks of these queries, for a folder in which a run that was stopped goes on."""
        if not isinstance(self._video, StreamedVideo):
            raise ValueError(
                "resume is for a video that is read from its file as it is tracked; give its path, or drop resume"
            )
        facts = self._bound_to()
        options = {**asdict(self._reader.settings.options), **facts["options"], "shape": self.shape}
        settings = {"weights": facts["weights"], **options, "part": self._video.part}
        return settings, {"video": file_digest(self._video.info.path), "queries": content_digest(table)}

    def _check_bound(self, path: str, facts: Mapping[str, Any]) -> None:
        now = self._bound_to()
        if facts["weights"] != now["weights"]:
            raise ValueError(
                f"{path} was read of the model {facts['model']} (weights {facts['weights']}), the tracker has "
                f"{now['model']} (weights {now['weights']}); give a tracker on that model, or read the video again"
            )
        earlier, options = facts["options"], now["options"]
        changed = [name for name in {**earlier, **options} if earlier.get(name) != options.get(name)]
        if changed:
            said = ", ".join(f"{name} {earlier.get(name)!r} (now {options.get(name)!r})" for name in changed)
            raise ValueError(
                f"{path} was read with other options: {said}; give a tracker with those, or read the video again"
            )


class _Passes:
    """Forward passes counted and reported."""

    def __init__(self) -> None:
        self._done, self._total = 0, 0
        self._progress: Progress = _unheard

    def begin(self, total: int, progress: Progress | None) -> None:
        self._done, self._total = 0, total
        self._progress = progress_or_bar(progress, "forward passes")
        self._progress(0, total)

    def done(self) -> None:
        self.skip(1)

    def skip(self, passes: int) -> None:
        """Count passes that somebody made before."""
        self._done += passes
        self._progress(self._done, self._total)


def _unheard(done: int, total: int) -> None:
    """Passes before any are counted."""


class _ShapeOnly:
    """A video of which everything that is asked was made before."""

    def __init__(self, shape: Iterable[int]) -> None:
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> object:
        raise ValueError("the reading was loaded without its video")


def _at_point(rows: Tensor, place: Tensor, share: Tensor) -> Tensor:
    """`[h, w]` of a point from `[V, R, h, w]`: R tokens, of which the four round it stand at `place` with `share`."""
    return (rows[:, place] * share[:, None, None].to(rows.dtype)).sum(1).mean(0)


def _pair_parts(held: HeldChunk) -> tuple[dict[str, Any], dict[str, Tensor]]:
    pair = held.pair
    grid = [pair.grid.frames, pair.grid.height, pair.grid.width]
    parts = {"q": pair.q, "k": pair.k, "key_mask": pair.key_mask, "back": held.back}
    facts = {"grid": grid, "weights": pair.weights, "scale": pair.scale}
    return facts, {name: part for name, part in parts.items() if part is not None}


def _pair_of(facts: Mapping[str, Any], parts: Mapping[str, Tensor], device: torch.device) -> HeldChunk:
    q, k = parts["q"].to(device), parts["k"].to(device)
    mask = parts["key_mask"].to(device) if "key_mask" in parts else None
    pair = TokenPair(q, k, TokenGrid(*facts["grid"]), mask, facts["weights"], facts["scale"])
    return HeldChunk(pair, parts.get("back"))
