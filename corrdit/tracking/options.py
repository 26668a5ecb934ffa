"""Options of the tracker, checked once, and what a model's preset says of reading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

from corrdit.arguments import choice, entries, finite_number, flag, whole_indices, whole_number
from corrdit.geometry import GEOMETRIES
from corrdit.ops.backends import BACKENDS, check_budget
from corrdit.tracking.chunks import SCHEDULES
from corrdit.tracking.released_costs import ROUNDINGS

FUSIONS = ("heads", "channels")
INVERSIONS = ("ddim", "released")
IMAGES = ("first", "all")
VISIBILITIES = ("consistency", "all")
COMBINATIONS = ("costs", "median")
POSTERIORS = ("mode", "sample")
POSTERIOR_SEED = 2**40
"""Seeds of the codec's noise are far from those of the noise that latents are given."""
MATCHED = ("queries", "keys")
HEADS = ("probabilities", "logits", "features")
Options: TypeAlias = Mapping[str, Any]
"""Of the tracker, by name."""


@dataclass(frozen=True)
class ReadingPreset:
    """Where correspondence is read from a model.

    Args:
        layer: attention layer, counted over all blocks.
        step: denoising step; -1 is the last of `inference_steps`.
        inference_steps: length of the schedule `step` counts in.
        heads: how heads are combined: "logits", "features", "probabilities" or "none".
        head_weights: weight of each head, or None for equal weights.
        head: a single head to use, or None.
        noise: whether latents are noised to the step's timestep before they are read.
        frames_per_chunk: latent frames the model is given at once.
        height: working height in pixels, or None for the video's own.
        width: working width in pixels, or None for the video's own.
        tokens_per_frame: limit of tokens a frame is encoded to where height and width are None.

    Raises:
        ValueError: an entry of another type or out of range.
    """

    layer: int
    step: int = -1
    inference_steps: int = 50
    heads: str = "probabilities"
    head_weights: tuple[float, ...] | None = None
    head: int | None = None
    noise: bool = False
    frames_per_chunk: int = 13
    height: int | None = None
    width: int | None = None
    tokens_per_frame: int | None = None

    def __post_init__(self) -> None:
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is None and name not in ("layer", "step", "inference_steps", "frames_per_chunk"):
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or (least is not None and value < least):
                limit = "" if least is None else f" of at least {least}"
                raise ValueError(f"{name} must be a whole number{limit}, got {value!r}")
        if self.heads not in (*HEADS, "none"):
            raise ValueError(f"heads must be one of {', '.join((*HEADS, 'none'))}, got {self.heads!r}")
        if not isinstance(self.noise, bool):
            raise ValueError(f"noise must be true or false, got {self.noise!r}")
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width of the encoded frames go together; give both or neither")
        weights = self.head_weights
        if weights is not None:
            numbers = isinstance(weights, (list, tuple)) and all(type(weight) in (int, float) for weight in weights)
            if not numbers or not weights:
                raise ValueError(f"head_weights must be a list of numbers, got {weights!r}")
            object.__setattr__(self, "head_weights", tuple(weights))

    def weights_of_heads(self, layers: tuple[int, ...], heads: int) -> tuple[float, ...] | None:
        """Weights of the heads of the layers that are read: those chosen for `layer` do not count for others."""
        if layers != (self.layer,):
            return None
        return self.head_weights if self.head is None else tuple(float(head == self.head) for head in range(heads))


_WHOLE_NUMBERS = {
    "layer": 0,
    "step": None,
    "head": 0,
    "inference_steps": 1,
    "frames_per_chunk": 2,
    "height": 1,
    "width": 1,
    "tokens_per_frame": 1,
}
"""Entries of `ReadingPreset` that are whole numbers, with the least that is accepted."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Which queries and keys are read and how they become costs. None: as the backbone's preset says.

    Args:
        layer: attention block whose queries and keys are matched; the backbone's preset by default.
        layers: several in place of `layer`.
        step: denoising step out of `inference_steps`, negative from the end; the backbone's preset by default.
        steps: several in place of `step`, each with a forward pass of its own.
        fusion: how several layers and steps become one: "heads" puts all their heads side by side, to be combined as
            `heads` says (with "logits" their products add up); "channels" joins the channels of the heads of equal
            number, whose products add up (DiffTrack's released code).
        inference_steps: steps of the schedule that `step` counts; the backbone's preset by default.
        noise: whether the latents get the noise of that step (from `seed`); otherwise they stay clean.
        seed: of the noise.
        inversion: "ddim" brings the clean latents to the noisy steps along the model's own path with the empty prompt
            (models of flow matching by Euler steps), in place of noise; "released" is DiffTrack's code, which asks at
            the timestep it leaves instead of the one it arrives at. Costs a whole forward pass for every step from the
            cleanest to the one asked for. None for neither.
        denoise_from: a step to which the latents are brought, by `inversion` or `noise` or left clean, and from which
            they are denoised to the steps that are read; DiffTrack's released script does so from the noisiest of
            several. None brings them to every step by itself.
        image: what image-to-video models are given beside the latents: "first" (the first frame of a chunk, as their
            pipelines) or "all" (every frame, as DiffTrack's released code). Other models have no use for it.
        heads: "probabilities", "logits" or "features", see `corrdit.ops.match`; the backbone's preset by default.
        head_weights: weights of the heads of a layer, or of all layers one after another; the backbone's preset by
            default (equal ones for other layers than its own), () for the plain mean.
        combine: "costs" (heads are combined as `heads` says) or "median" (every head finds its own position; the median
            in x and in y counts).
        temperature: factor of the logits.
        low_pass: standard deviation in tokens of a low-pass filter on queries and keys; 0 for none.
        matched: "queries" (queries with keys) or "keys" (keys with keys, by their cosine, as HeFT does).
        channels_out: channels of a head that are left out; HeFT leaves out the fastest of each axis of the rotary
            embedding.
        bidirectional: whether the backward softmax takes part in the cost.
        rounding: "none", or "bfloat16": costs in the arithmetic of DiffTrack's released runs, where near candidates tie
            and the lowest index wins, see `corrdit.tracking.released_costs`. For geometry="released" alone.
        backend: of the operations, see `corrdit.ops`.
        memory_budget: bytes an operation may use beyond inputs and outputs (streaming).
    """

    layer: int | None = None
    layers: tuple[int, ...] = ()
    step: int | None = None
    steps: tuple[int, ...] = ()
    fusion: str = "heads"
    inference_steps: int | None = None
    noise: bool | None = None
    seed: int = 0
    inversion: str | None = None
    denoise_from: int | None = None
    image: str = "first"
    heads: str | None = None
    head_weights: tuple[float, ...] | None = None
    combine: str = "costs"
    temperature: float = 1.0
    low_pass: float = 0.0
    matched: str = "queries"
    channels_out: tuple[int, ...] = ()
    bidirectional: bool = True
    rounding: str = "none"
    backend: str = "auto"
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        choice("backend", self.backend, BACKENDS)
        choice("fusion", self.fusion, FUSIONS)
        choice("combine", self.combine, COMBINATIONS)
        choice("image", self.image, IMAGES)
        plain_mean = self.heads in (None, "probabilities") and not self.head_weights and self.combine == "costs"
        if choice("rounding", self.rounding, ROUNDINGS) != "none" and not plain_mean:
            raise ValueError(
                'rounding="bfloat16" takes the plain mean of all heads, as the released code; give '
                'heads="probabilities", head_weights=() and combine="costs" with it'
            )
        if self.inversion is not None:
            choice("inversion", self.inversion, INVERSIONS)
        if self.inversion is not None and self.noise:
            raise ValueError("inversion and noise both bring latents to the noisy steps; drop one of them")
        if self.heads is not None:
            choice("heads", self.heads, HEADS)
        for name in ("inference_steps", "memory_budget"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), 1)
        choice("matched", self.matched, MATCHED)
        for name in ("layers", "steps", "channels_out"):
            given = entries(name, getattr(self, name))
            object.__setattr__(self, name, tuple(whole_indices(name, given)) if given else ())
        if self.head_weights is not None:
            weights = entries("head_weights", self.head_weights)
            object.__setattr__(self, "head_weights", tuple(finite_number("head_weights", each) for each in weights))
        for name in ("noise", "bidirectional"):
            if getattr(self, name) is not None:
                flag(name, getattr(self, name))
        check_budget(self.backend, self.memory_budget)
        for one, several in (("layer", "layers"), ("step", "steps")):
            if getattr(self, one) is not None and getattr(self, several):
                raise ValueError(f"{one} and {several} were both given; drop one of them")
        if not finite_number("temperature, a factor above 0,", self.temperature) > 0:
            raise ValueError(f"temperature must be a factor above 0, got {self.temperature}")
        if not finite_number("low_pass", self.low_pass) >= 0:
            raise ValueError(f"low_pass must be a standard deviation in tokens of at least 0, got {self.low_pass}")


@dataclass(frozen=True, kw_only=True)
class TrackerOptions(ReadingOptions):
    """How a video is cut into forward passes, what is read in them, and how their cost maps become tracks.

    A backbone's preset has them (`Preset.tracking`); what they leave open, its `reading` says.

    Args:
        frames_per_chunk: frames of a forward pass, the query's frame included; the backbone's preset by default.
        schedule: "spread", "interleaved" or "consecutive" (see `corrdit.tracking.chunks.anchored_chunks`) with the
            query's frame in every chunk, or "chained" without.
        stride: frames between the starts of chunks, for "consecutive".
        interval: frames from one to the next within a chunk, for "interleaved"; the released formula by default.
        average_overlap: whether cost maps of frames that several chunks hold are averaged; otherwise the first stands.
        height, width: size in pixels at which frames are encoded; the backbone's preset by default, or else the video's
            shape with at most `tokens_per_frame` tokens.
        tokens_per_frame: limit of tokens a frame is encoded to, in place of a size.
        resize_first: (height, width) to which frames are resized before that (DiffTrack's evaluation: 256 x 256).
        antialias: whether frames are resized with antialiasing; DiffTrack's evaluation does without, and without
            rounding between its two sizes.
        posterior: "mode" (the codec's most likely latents) or "sample" (drawn with `seed`, as DiffTrack's released code
            draws them; every frame its own).
        refine: radius in tokens of the cost-weighted mean round the best token; 0 for the best token itself.
        crops: scales at which points are looked at again, one after another, in crops of the frames round them: the
            span of a token in the crop, relative to that in the whole frame. See `corrdit.tracking.crops`; the cost
            grows with the points. () for none.
        crop_tokens: of a crop's side.
        path_spread: distance in tokens (standard deviation) from the path so far within which a match is preferred, see
            `corrdit.tracking.peaks`; 0 matches every frame by itself. Keeps the cost maps of all frames, two bytes
            a point, frame and token. "chained" has no use for it.
        update: share by which the features of a point become those of the place where it was found, in each frame whose
            match leads back (HeFT's moving average); 0 keeps those of its own frame. Within a block of frames; for
            heads="probabilities" of schedules with the query's frame in every chunk.
        frames_per_block: frames followed together, so that memory does not grow with the video; None for all.
        geometry: "centers" (token centres) or "released" (DiffTrack's reading of match maps).
        visibility: "consistency" (matching back leads to the query) or "all" (every point is called visible).
        tolerance: largest distance in tokens between query and match back for a visible point.
        crop_tolerance: the same in tokens of the crops.

    The further options are those of `ReadingOptions`.
    """

    frames_per_chunk: int | None = None
    schedule: str = "spread"
    stride: int | None = None
    interval: int | None = None
    average_overlap: bool = True
    height: int | None = None
    width: int | None = None
    tokens_per_frame: int | None = None
    resize_first: tuple[int, int] | None = None
    antialias: bool = True
    posterior: str = "mode"
    refine: int = 1
    crops: tuple[float, ...] = ()
    crop_tokens: int = 8
    path_spread: float = 3.0
    update: float = 0.0
    frames_per_block: int | None = 120
    geometry: str = "centers"
    visibility: str = "consistency"
    tolerance: float = 1.5
    crop_tolerance: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("schedule", self.schedule, SCHEDULES)
        choice("geometry", self.geometry, GEOMETRIES)
        choice("visibility", self.visibility, VISIBILITIES)
        if choice("posterior", self.posterior, POSTERIORS) == "sample" and self.crops:
            raise ValueError('posterior="sample" is for whole frames; give crops=() with it')
        whole_number("refine", self.refine, 0)
        frames_and_tokens = {"frames_per_chunk": 2, "frames_per_block": 1, "tokens_per_frame": 1, "crop_tokens": 2}
        for name, minimum in {**frames_and_tokens, "height": 1, "width": 1, "interval": 1, "stride": 1}.items():
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), minimum)
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width of the encoded frames go together; give both or neither")
        if self.height is not None and self.tokens_per_frame is not None:
            raise ValueError("height and width fix the tokens of a frame; drop tokens_per_frame or the two")
        for name in ("tolerance", "crop_tolerance", "path_spread"):
            if not finite_number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be a distance in tokens of at least 0, got {getattr(self, name)}")
        if finite_number("update", self.update, least=0, most=1):
            self._check_update()
        if self.resize_first is not None:
            size = tuple(self.resize_first)
            if len(size) != 2:
                raise ValueError(f"resize_first must be (height, width), got {size}")
            for name, value in zip(("height", "width"), size, strict=True):
                whole_number(f"{name} of resize_first", value, 1)
            object.__setattr__(self, "resize_first", size)
        for name in ("average_overlap", "antialias"):
            flag(name, getattr(self, name))
        scales = entries("crops", self.crops)
        object.__setattr__(self, "crops", tuple(finite_number("a scale of crops", scale) for scale in scales))
        for scale in self.crops:
            if not 0 < scale <= 1:
                raise ValueError(f"crops must be scales above 0 and at most 1, such as 0.5, got {scale}")
        if self.rounding != "none" and self.geometry != "released":
            raise ValueError(f'rounding={self.rounding!r} is for geometry="released"; give both, or preset="published"')
        if self.geometry == "released":
            if self.refine or self.path_spread:
                text = "reads whole-token matches; give refine=0 and path_spread=0 with it"
                raise ValueError(f'geometry="released" {text}')
            if self.crops or self.combine != "costs":
                text = 'takes the costs of whole frames; give crops=() and combine="costs"'
                raise ValueError(f'geometry="released" {text}')

    def _check_update(self) -> None:
        wrong = {
            'schedule="chained"': self.schedule == "chained",
            'combine="median"': self.combine == "median",
            'visibility="all"': self.visibility == "all",
            'geometry="released"': self.geometry == "released",
            f"heads={self.heads!r}": self.heads not in (None, "probabilities"),
        }
        if named := [name for name, given in wrong.items() if given]:
            raise ValueError(f"update={self.update} cannot be had with {named[0]}; give update=0, or another of these")


PUBLISHED_TRACKING = TrackerOptions(
    noise=False,
    heads="probabilities",
    head_weights=(),
    frames_per_block=None,
    schedule="interleaved",
    frames_per_chunk=13,
    resize_first=(256, 256),
    antialias=False,
    image="all",
    refine=0,
    path_spread=0.0,
    geometry="released",
    visibility="all",
)
"""DiffTrack's released evaluation procedure; layer and step are the backbone's."""

PRESETS = {"default": TrackerOptions(), "published": PUBLISHED_TRACKING}


def changed_options(options: TrackerOptions, given: Options) -> TrackerOptions:
    """Options with those given by name in place of their own; a size takes the place of a limit of tokens as well, and
    a limit that of a size.

    Raises:
        ValueError: an unknown option, or a value out of range.
    """
    known = [field.name for field in fields(TrackerOptions)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown tracker option {unknown[0]!r}; the options are {', '.join(known)}")
    sizes = ("height", "width", "tokens_per_frame")
    replaced = dict.fromkeys(sizes) if any(given.get(name) for name in sizes) else {}
    return replace(options, **{**replaced, **given})
