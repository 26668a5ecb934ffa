"""Presets of trackers that followed DiffTrack, by the shape of the model: every number from the authors' code.

What a tracker learned (DiTracker's adapters and correlation head) is not here: these are the layer, head, step and
matching from which it starts, read by `corrdit.PointTracker`.

HeFT, "Denoise to Track" (arXiv 2512.04619), code of 2025-12-10, `configs/*_config.sh` and `src/heft/tracker.py`: keys
of one head are matched with keys by cosine; in each axis of the rotary embedding the channels below `freq_range` are
left out; a softmax, the mean within `argmax_radius` pixels, and visible is what comes back within `vis_threshold`
pixels, at 16 pixels a token; features follow the track by `feature_ema_alpha`. It reads latents that are compressed in
time and interpolates features between frames and pixels; here every frame is a latent of its own and matches are
refined between tokens, so that its figures are not to be expected. Its default is Cosmos-Predict2 (layers and heads:
diffusers' `scripts/convert_cosmos_to_diffusers.py`), of whose heads, which pair the halves of the channels, it leaves
out the same first channels of each axis.

DiTracker, "Repurposing Video Diffusion Transformers for Robust Point Tracking" (arXiv 2512.20606), `train.py` and
`cotracker/models/core/cotracker/feature_extractor.py`: layer 17, head 2 of CogVideoX-2B at timestep 19 (the last of
50) of clean latents, one a frame, 480 x 720, empty prompt; queries with keys, a softmax in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.backbones.published_models import ShapedModel
from corrdit.tracking.options import ReadingPreset, TrackerOptions

_PIXELS_A_TOKEN = 16
_HEFT = {
    "matched": "keys",
    "heads": "probabilities",
    "bidirectional": False,
    "path_spread": 0.0,
    "refine": 1,
    "frames_per_chunk": 25,
    "schedule": "spread",
}
_WAN_AXES = (44, 42, 42)
"""Channels of a head of 128 for time, rows and columns; of Cosmos, too."""


@dataclass(frozen=True)
class Follower:
    """A tracker's settings for one model.

    Args:
        model: as its authors name it.
        family, layers, heads: of that model.
        preset: the settings.
    """

    model: str
    family: str
    layers: int
    heads: int
    preset: Preset


def _fastest(axes: tuple[int, ...], share: float) -> tuple[int, ...]:
    """The first channels of each axis, rounded down as in HeFT's `load_feature`."""
    starts = [sum(axes[:index]) for index in range(len(axes))]
    return tuple(
        start + channel for start, size in zip(starts, axes, strict=True) for channel in range(int(size * share))
    )


def _heft(
    layer: int,
    head: int,
    size: tuple[int, int],
    *,
    visible: float,
    update: float,
    steps: int = 50,
    **options: object,
) -> Preset:
    tracking = {**_HEFT, "tolerance": visible / _PIXELS_A_TOKEN, "update": update, **options}
    return Preset(
        ReadingPreset(
            layer, step=steps - 1, inference_steps=steps, head=head, noise=True, height=size[0], width=size[1]
        ),
        TrackerOptions(**tracking),  # type: ignore[arg-type]
        source="HeFT's released configuration (arXiv 2512.04619)",
    )


FOLLOWERS: dict[str, tuple[Follower, ...]] = {
    "ditracker": (
        Follower(
            "CogVideoX-2B",
            "cogvideox",
            30,
            30,
            Preset(
                ReadingPreset(17, step=49, inference_steps=50, head=2, height=480, width=720),
                TrackerOptions(heads="probabilities", bidirectional=False),
                source="DiTracker's released code (arXiv 2512.20606), without what it learned",
            ),
        ),
    ),
    "heft": (
        Follower("CogVideoX-2B", "cogvideox", 30, 30, _heft(15, 19, (480, 720), visible=27, update=0.1)),
        Follower(
            "Wan2.1-T2V-1.3B",
            "wan",
            30,
            12,
            _heft(18, 1, (480, 832), visible=18, update=0.05, channels_out=_fastest(_WAN_AXES, 0.15)),
        ),
        Follower(
            "Cosmos-Predict2-2B-Video2World",
            "cosmos",
            28,
            16,
            _heft(18, 6, (704, 1280), visible=26, update=0.05, steps=35, channels_out=_fastest(_WAN_AXES, 0.1)),
        ),
    ),
}
"""By the name `load_backbone(preset=)` and --preset take."""


def follower_preset(name: str, model: ShapedModel) -> Preset:
    """The settings of a tracker of `FOLLOWERS` for a model of this shape.

    Raises:
        ValueError: it has none for this model.
    """
    rows = FOLLOWERS[name]
    for row in rows:
        if (row.family, row.layers, row.heads) == (model.family, model.layers, model.heads):
            return row.preset
    known = " and ".join(f"{row.model} ({row.layers} layers of {row.heads} heads)" for row in rows)
    raise ValueError(
        f"preset {name!r} is for {known}; this model is {model.family}, {model.layers} layers of {model.heads} heads"
    )
