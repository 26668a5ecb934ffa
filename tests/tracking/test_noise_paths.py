"""How latents come to the steps they are read at: inverted, denoised from a step, beside an image."""

from __future__ import annotations

import pytest
import torch
from pixel_backbone import PixelBackbone, moving_texture

from corrdit import PointTracker
from corrdit.integrations.diffusers import Preset, ReadingPreset
from corrdit.testing import tiny_backbone
from corrdit.tracking.chunks import anchored_chunks, frame_blocks
from corrdit.tracking.readings import Reading, latents_at_steps, read_tokens

VIDEO = moving_texture(7, (4, 0))
QUERIES = [(0, 30.0, 30.0), (0, 50.5, 21.0)]


class WalkingBackbone(PixelBackbone):
    """Says where latents were brought by constants on top of them, which leave the pixels' matches as they are."""

    takes_image = True

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple] = []
        self.read: list[float] = []
        self.images: list[torch.Tensor | None] = []

    def timestep(self, step, inference_steps):
        if not -inference_steps <= step < inference_steps:
            raise ValueError(f"step {step} is outside a schedule of {inference_steps} steps")
        return float(step % inference_steps)

    def add_noise(self, latents, noise, timestep):
        return latents + 10 * timestep

    def inverted(self, latents, steps, inference_steps, *, rule, image=None):
        self.asked.append(("inverted", tuple(steps), inference_steps, rule, None if image is None else len(image)))
        for step in sorted(steps, reverse=True):
            yield step, latents + 1000 * step

    def denoised(self, latents, start, steps, inference_steps, *, image=None):
        self.asked.append(("denoised", start, tuple(steps), inference_steps))
        for step in sorted(steps):
            yield step, latents + 0.5 * (step - start)

    def forward(self, latents, timestep, operations, *, image=None):
        self.read.append(float((latents - latents.frac()).float().min()))
        self.images.append(image)
        return super().forward(latents.frac() if latents.max() < 1 else latents - latents.min(), timestep, operations)


def tracked(**options):
    backbone = WalkingBackbone()
    counted = []
    tracker = PointTracker(backbone, path_spread=0.0, frames_per_chunk=7, **options)
    tracks = tracker.track(VIDEO, QUERIES, progress=lambda done, of: counted.append((done, of)))
    return backbone, tracks, counted


def test_clean_latents_are_inverted_to_every_step_that_is_read():
    backbone, tracks, counted = tracked(inversion="ddim", steps=(-1, 40))
    assert backbone.asked == [("inverted", (49, 40), 50, "ddim", 1)]
    assert backbone.read == [49000, 40000]
    # Ten steps of the inversion and two readings.
    assert counted == [(done, 12) for done in range(13)]
    expected = torch.tensor([[30.0, 30.0], [50.5, 21.0]]) + torch.arange(7)[:, None, None] * torch.tensor([4.0, 0.0])
    assert torch.allclose(tracks.xy, expected, atol=1.0)


@pytest.mark.parametrize(
    "options, asked, read, passes",
    [
        ({}, [("denoised", 45, (49, 47), 50)], [2.0, 1.0], 6),
        ({"noise": True}, [("denoised", 45, (49, 47), 50)], [452.0, 451.0], 6),
        (
            {"inversion": "released"},
            [("inverted", (45,), 50, "released", 1), ("denoised", 45, (49, 47), 50)],
            [45002.0, 45001.0],
            11,
        ),
    ],
)
def test_latents_brought_to_one_step_are_denoised_from_there(options, asked, read, passes):
    backbone, _, counted = tracked(denoise_from=-5, steps=(49, 47), **options)
    assert backbone.asked == asked
    assert backbone.read == read
    assert counted[-1] == (passes, passes)


def test_a_preset_with_noise_gives_way_to_an_inversion():
    backbone = WalkingBackbone()
    backbone.preset = Preset(ReadingPreset(1, noise=True, frames_per_chunk=5))
    PointTracker(backbone, inversion="ddim", path_spread=0.0).track(VIDEO, QUERIES)
    assert set(backbone.read) == {49000.0}


@pytest.mark.parametrize("image, frames", [("first", 1), ("all", 7)])
def test_models_that_take_an_image_get_clean_frames(image, frames):
    backbone, *_ = tracked(noise=True, image=image)
    (given,) = backbone.images
    pixels = torch.from_numpy(VIDEO[:frames].copy()).permute(0, 3, 1, 2) / 255
    assert torch.equal(given, pixels)
    assert backbone.read == [490.0]


def test_other_models_get_none():
    backbone = WalkingBackbone()
    backbone.takes_image = False
    PointTracker(backbone, preset="published", geometry="centers").track(VIDEO, QUERIES)
    assert set(backbone.images) == {None}
    with pytest.raises(ValueError, match="image='first' is for image-to-video models, and this model is none"):
        PointTracker(backbone, image="first")


def test_frames_of_a_chunk_lie_the_interval_apart():
    chunks = anchored_chunks(frame_blocks(9, 0, None)[0], 0, frames_per_chunk=4, schedule="interleaved", interval=2)
    assert [chunk.targets for chunk in chunks[:2]] == [(1, 3, 5), (2, 4, 6)]
    assert {frame for chunk in chunks for frame in chunk.targets} == set(range(1, 9))
    released = anchored_chunks(frame_blocks(9, 0, None)[0], 0, frames_per_chunk=4, schedule="interleaved")
    assert released == anchored_chunks(
        frame_blocks(9, 0, None)[0], 0, frames_per_chunk=4, schedule="interleaved", interval=9 // 3
    )
    backbone, *_ = tracked(schedule="interleaved", interval=3)
    assert backbone.forwards[0] == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"inversion": "exact"}, "inversion must be one of ddim, released, got 'exact'"),
        ({"inversion": "ddim", "noise": True}, "inversion and noise both bring latents"),
        ({"image": "last"}, "image must be one of first, all, got 'last'"),
        ({"interval": 0, "schedule": "interleaved"}, "interval must be a whole number of at least 1"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PointTracker(WalkingBackbone(), **options)


def test_what_only_the_video_tells_is_refused_before_the_first_pass():
    backbone = WalkingBackbone()
    for options, message in (
        ({"interval": 2}, 'interval is for schedule="interleaved"'),
        ({"denoise_from": 50}, "step 50 is outside a schedule of 50 steps"),
        ({"denoise_from": -1, "step": -2}, "step 48 is noisier than step 49, from which is denoised"),
    ):
        with pytest.raises(ValueError, match=message):
            PointTracker(backbone, **options).track(VIDEO, QUERIES)
    assert backbone.read == []
    with pytest.raises(ValueError, match="this model has no way to invert or denoise latents"):
        PointTracker(PixelBackbone(), inversion="ddim")


@pytest.mark.filterwarnings("ignore:.*no text encoder")
@pytest.mark.parametrize("name", ["cogvideox-image", "wan"])
def test_a_real_model_is_read_at_its_inverted_latents(name):
    backbone = tiny_backbone(name)
    latents = torch.randn(3, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = tuple(backbone.timestep(step, 5) for step in (3, 1))
    options = {"layers": (0, 1), "timesteps": timesteps, "steps": (3, 1), "inference_steps": 5}
    reading = Reading(**options, inversion="ddim")
    image = {"image": latents[:1]} if backbone.takes_image else {}
    at = dict(backbone.inverted(latents, [1, 3], 5, **image))
    expected = []
    for step, timestep in zip((3, 1), timesteps, strict=True):
        read = backbone.forward(at[step], timestep, {layer: queries for layer in (0, 1)}, **image)
        expected += [read[0], read[1]]
    assert torch.equal(read_tokens(backbone, latents, reading, (4, 4)).q, torch.cat(expected, 1))
    one_by_one = Reading(**options, inversion="ddim", denoise_from=0)
    batch = torch.stack([latents, latents.flip(0)])
    both = latents_at_steps(backbone, batch, one_by_one, None, {"image": batch[:, :1]} if image else {})
    alone = latents_at_steps(backbone, batch[1], one_by_one, None, {"image": batch[1, :1]} if image else {})
    assert torch.allclose(both[1][1], alone[1], atol=1e-4)


def queries(q, k, grid, key_mask):
    return q[:, :, grid.video_slice].clone()
