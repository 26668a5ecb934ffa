"""A painted dot: found by its colour, pushed by the prediction for the marked frame, and tracked from end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import load_backbone
from corrdit.evaluation import chosen_trackers
from corrdit.integrations.embedded.world import WorldConfig, generate
from corrdit.testing import tiny_backbone
from corrdit.tracking.point_prompts import Counterfactual, PointPromptTracker, find_dot, painted

WAY = torch.tensor([[10.0, 8.0], [13.0, 9.0], [17.0, 10.0], [20.0, 12.0], [24.0, 13.0]])


def marked_everywhere(video: torch.Tensor, way: torch.Tensor, radius: float) -> torch.Tensor:
    """The dot on every frame, as an ideal model would carry it along."""
    return torch.cat([painted(video[frame : frame + 1], way[frame], radius) for frame in range(len(way))])


def grey_video() -> torch.Tensor:
    return (
        torch.randint(60, 200, (5, 24, 40, 1), generator=torch.Generator().manual_seed(0))
        .to(torch.uint8)
        .repeat(1, 1, 1, 3)
    )


def test_a_dot_is_found_and_its_loss_is_said():
    video = marked_everywhere(grey_video(), WAY, 2.5)
    video[2] = grey_video()[2]
    xy, seen, share = find_dot(video.float() / 255, WAY[0], 2.5, search=8.0)
    assert seen.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(xy[[0, 1, 3, 4]], WAY[[0, 1, 3, 4]], rtol=0, atol=0.5)
    torch.testing.assert_close(xy[2], xy[1])  # it stays where it was
    assert (share[seen] > 0.7).all()


def test_another_red_thing_far_away_is_not_taken_for_it():
    video = marked_everywhere(grey_video(), WAY, 2.0)
    video[:, 20:24, 36:40] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    xy, seen, _ = find_dot(video.float() / 255, WAY[0], 2.0, search=6.0)
    assert seen.all()
    torch.testing.assert_close(xy, WAY, rtol=0, atol=0.5)


class CarryingBackbone:
    """The codec is the identity, and denoising gives the video with the dot carried along its way."""

    name, token_stride = "carrying", (2, 2)

    class preset:
        class reading:
            height = width = tokens_per_frame = None

    def encode_video(self, video, *, height, width):
        assert video.shape[1:3] == (height, width)
        return video.permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latents):
        return latents

    def add_noise(self, latents, noise, timestep):
        return latents + timestep * noise

    def timestep(self, step, inference_steps):
        return 1 - step / inference_steps

    def denoised(self, latents, start, steps, inference_steps):
        marked = self._firsts[0]  # of the `Counterfactual` that stands for this backbone
        assert not torch.equal(marked, self._firsts[1])
        plain = self._firsts[1].add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        carried = marked_everywhere(plain.repeat(len(latents), 1, 1, 1), WAY[: len(latents)], 2.0)
        yield steps[0], carried.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_points_of_a_carried_dot_are_tracked_in_pixels_of_the_video():
    video = grey_video().repeat_interleave(2, 1).repeat_interleave(2, 2)
    backbone = CarryingBackbone()
    backbone.preset.reading.height, backbone.preset.reading.width = 24, 40
    tracks = PointPromptTracker(backbone, radius=2.0).track(video, [[0, 20.0, 16.0], [4, 5.0, 5.0]])
    torch.testing.assert_close(tracks.xy[:, 0], 2 * WAY, rtol=0, atol=1.0)
    assert tracks.visible[:, 0].all()
    assert tracks.visible[:, 1].tolist() == [False] * 4 + [True]
    torch.testing.assert_close(tracks.xy[:, 1], torch.tensor([5.0, 5.0]).repeat(5, 1))


def test_predictions_are_pushed_from_the_unmarked_to_the_marked_frame():
    class Model:
        takes_image = False

        def add_noise(self, latents, noise, timestep):
            return latents + timestep * noise

        def predict(self, latents, timestep):
            return latents.mean().expand_as(latents)

    marked, unmarked, noise = torch.full((2, 1, 1, 1), 4.0), torch.full((2, 1, 1, 1), 2.0), torch.ones(2, 1, 1, 1)
    got = Counterfactual(Model(), marked, unmarked, noise, 3.0).predict(torch.zeros(2, 1, 1, 1), 0.5)
    torch.testing.assert_close(got, torch.full((2, 1, 1, 1), 4 * 4.5 / 2 - 3 * 2.5 / 2))


@pytest.mark.parametrize("family", ["embedded", "wan"])
def test_models_run_from_end_to_end(family):
    backbone = load_backbone("embedded") if family == "embedded" else tiny_backbone(family)
    clip = generate([3], WorldConfig(frames=5, height=32, width=32))[0]
    options = {"inference_steps": 4, "strength": 0.5}
    (choice,) = chosen_trackers({"point_prompts": options})
    if family == "wan":
        backbone.preset = backbone.preset.__class__.from_mapping(
            {**backbone.preset.described(), "height": 32, "width": 32}
        )
    tracks = choice.build(backbone)(clip.video, np.array([[0, 12.0, 14.0], [2, 20.0, 8.0]]))
    assert tracks.xy.shape == (5, 2, 2)
    assert tracks.visible[0, 0]
    assert tracks.visible[2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength"),
        ({"weight": -1}, "weight"),
        ({"radius": 0}, "radius"),
        ({"inference_steps": 1}, "steps"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PointPromptTracker(CarryingBackbone(), **options)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="unknown option 'colour'"):
        chosen_trackers({"point_prompts": {"colour": "red"}})
