"""The generated world: reproducible from its seeds, and its truth agrees with its pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from corrdit.integrations.embedded.world import PROMPT_KINDS, Clip, WorldConfig, demo_clip, describe, generate, render
from corrdit.integrations.embedded.world.clips import as_tapvid, sample_queries
from corrdit.integrations.embedded.world.scene import PATHS, draw_scene
from corrdit.integrations.embedded.world.shapes import SHAPES, signed_distance

SMALL = WorldConfig(frames=5, height=48, width=64)


def plain_clip(seed: int, config: WorldConfig) -> Clip:
    """A clip without changes of light, blur and noise, so that a surface keeps its colours."""
    scene = dataclasses.replace(
        config.scene(seed), gain=np.ones(config.frames), offset=np.zeros(config.frames), blur=0.0, noise=0.0
    )
    frames = (render([scene], config)[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Clip(scene, config, frames)


def pixel_queries(config: WorldConfig, frame: int) -> np.ndarray:
    columns, rows = np.meshgrid(np.arange(config.width) + 0.5, np.arange(config.height) + 0.5)
    return np.stack([np.full(columns.size, float(frame)), columns.ravel(), rows.ravel()], axis=1)


def colours_at(frame: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Bilinear colours [P, 3] at pixel positions [P, 2]."""
    size = torch.tensor([frame.shape[1], frame.shape[0]])
    grid = (torch.from_numpy(xy).float() / size * 2 - 1)[None, None]
    image = torch.from_numpy(frame).float().permute(2, 0, 1)[None]
    return F.grid_sample(image, grid, align_corners=False, padding_mode="border")[0, :, 0].T.numpy()


def test_a_seed_gives_the_same_clip_in_any_batch() -> None:
    together, alone = generate([4, 9, 2], SMALL), generate([9], SMALL)[0]
    assert together[1].prompt == alone.prompt
    np.testing.assert_array_equal(together[1].video, alone.video)
    assert (together[0].video != together[2].video).any()


def test_another_size_of_the_same_aspect_shows_the_same_scene() -> None:
    small, large = generate([3], SMALL)[0], generate([3], WorldConfig(frames=5, height=96, width=128))[0]
    query = np.array([[2.0, 20.5, 11.25], [0.0, 50.0, 40.0]])
    small_truth, large_truth = small.tracks(query), large.tracks(query * [1, 2, 2])
    np.testing.assert_allclose(2 * small_truth.xy, large_truth.xy, atol=1e-4)
    np.testing.assert_array_equal(small_truth.visible, large_truth.visible)
    shrunk = large.video.reshape(5, 48, 2, 64, 2, 3).mean(axis=(2, 4))
    assert np.corrcoef(shrunk.ravel(), small.video.ravel().astype(float))[0, 1] > 0.95


@pytest.mark.parametrize("size", [(1, 32, 32), (3, 40, 24), (9, 24, 72)])
def test_sizes_and_lengths(size: tuple[int, int, int]) -> None:
    clip = generate([1], WorldConfig(*size))[0]
    assert clip.video.shape == (*size, 3)
    assert clip.video.dtype == np.uint8


@pytest.mark.parametrize("seed", range(6))
def test_flow_warps_a_frame_onto_the_next(seed: int) -> None:
    clip = plain_clip(seed, SMALL)
    flow = clip.flow()
    here = pixel_queries(SMALL, 0)[:, 1:]
    for frame in range(SMALL.frames - 1):
        moved = here + flow.displacement[frame].reshape(-1, 2)
        seen = flow.visible[frame].ravel()
        # Pixels on an outline mix two surfaces; they are left out by asking for the same surface all round.
        inside = np.ones(len(here), dtype=bool)
        for at, places in ((frame, here), (frame + 1, moved)):
            layer = clip.layers(at, places)
            for step in ((1.5, 0), (-1.5, 0), (0, 1.5), (0, -1.5)):
                inside &= clip.layers(at, places + np.array(step)) == layer
        chosen = seen & inside
        assert chosen.sum() > 300
        error = np.abs(colours_at(clip.video[frame + 1], moved[chosen]) - colours_at(clip.video[frame], here[chosen]))
        still = np.abs(colours_at(clip.video[frame + 1], here[chosen]) - colours_at(clip.video[frame], here[chosen]))
        assert error.mean() < 8
        assert error.mean() < 0.6 * still.mean() or still.mean() < 8


def test_paint_and_truth_share_their_pixel_coordinates() -> None:
    """The centroid of a painted disc is where the truth has its centre, to a tenth of a pixel."""
    config = WorldConfig(frames=4, height=64, width=64)
    for seed in range(3):
        plain = plain_clip(seed, config).scene
        place = np.linspace([-0.13, 0.17], [0.12, -0.21], 4) + 0.003 * seed
        disc = dataclasses.replace(
            plain.sprites[0], shape="disc", center=place, angle=np.zeros(4), radius=np.full(4, 0.2)
        )
        with_disc = dataclasses.replace(plain, sprites=(disc,))
        without = dataclasses.replace(plain, sprites=(dataclasses.replace(disc, center=place + 5),))
        changed = (render([with_disc], config) - render([without], config))[0].abs().sum(dim=1).numpy() > 0.05
        centres = place * 64 + 32
        truth = Clip(with_disc, config, np.zeros((4, 64, 64, 3), np.uint8)).tracks(np.array([[0.0, *centres[0]]]))
        rows, columns = np.mgrid[:64, :64] + 0.5
        for frame in range(4):
            centroid = np.array([columns[changed[frame]].mean(), rows[changed[frame]].mean()])
            np.testing.assert_allclose(centroid, truth.xy[frame, 0], atol=0.15)


def test_tracks_are_composed_flow() -> None:
    clip = generate([11], SMALL)[0]
    queries = pixel_queries(SMALL, 0)[::7]
    truth = clip.tracks(queries)
    for frame in range(SMALL.frames):
        seen = truth.visible[frame] & (truth.xy[frame] > 0).all(axis=1)
        onward = clip.tracks(np.concatenate([np.full((seen.sum(), 1), frame), truth.xy[frame, seen]], axis=1))
        near = np.abs(onward.xy - truth.xy[:, seen]).max(axis=(0, 2)) < 1e-2
        # A point within rounding of an outline may change its surface; nearly none do.
        assert near.mean() > 0.99
    flow = clip.flow()
    columns, rows = (queries[:, 1] - 0.5).astype(int), (queries[:, 2] - 0.5).astype(int)
    np.testing.assert_allclose(queries[:, 1:] + flow.displacement[0, rows, columns], truth.xy[1], atol=1e-3)
    np.testing.assert_array_equal(flow.visible[0, rows, columns], truth.visible[1])


def test_a_query_is_visible_where_it_is_and_hidden_under_sprites() -> None:
    hidden = 0
    for clip in generate(range(20, 32), SMALL):
        queries = sample_queries(clip, 40, seed=1)
        truth = clip.tracks(queries)
        frames = queries[:, 0].astype(int)
        own = truth.xy[frames, np.arange(len(queries))]
        np.testing.assert_allclose(own, queries[:, 1:], atol=1e-4)
        assert truth.visible[frames, np.arange(len(queries))].all()
        for frame in range(SMALL.frames):
            inside = ((truth.xy[frame] >= 0) & (truth.xy[frame] < [64, 48])).all(axis=1)
            layer_now = clip.layers(frame, truth.xy[frame].clip(0, [64, 48]))
            own_layer = np.array([clip.layers(f, q[None, 1:])[0] for f, q in zip(frames, queries, strict=True)])
            # A hidden point inside the frame lies under a sprite further in front; a visible one shows its own surface.
            covered = inside & ~truth.visible[frame]
            assert (layer_now[covered] > own_layer[covered]).all()
            assert (layer_now[truth.visible[frame]] <= own_layer[truth.visible[frame]]).all()
            hidden += int(covered.sum())
    assert hidden > 50


def test_standing_still_is_a_bad_guess() -> None:
    moved, seen = 0, 0
    for clip in generate(range(40, 80)):
        truth = clip.tracks(pixel_queries(clip.config, 0)[::5])
        distance = np.linalg.norm(truth.xy - truth.xy[0], axis=-1)[1:]
        moved += int(((distance > 4) & truth.visible[1:]).sum())
        seen += int(truth.visible[1:].sum())
    assert moved / seen > 0.5


def test_every_path_texture_and_camera_move_occurs() -> None:
    scenes = [draw_scene(seed, 8, 1.0) for seed in range(400)]
    sprites = [sprite for scene in scenes for sprite in scene.sprites]
    assert {sprite.path for sprite in sprites} == set(PATHS)
    assert {sprite.shape for sprite in sprites} == set(SHAPES)
    assert {scene.camera.move.split()[0] for scene in scenes} == {"is", "pans", "zooms", "turns"}
    assert {len(scene.sprites) for scene in scenes} == {1, 2, 3, 4, 5}
    share_turning = np.mean([sprite.turns for sprite in sprites])
    assert 0.15 < share_turning < 0.6


def test_directions_in_words_are_directions_on_the_screen() -> None:
    for seed in range(300):
        scene = draw_scene(seed, 8, 1.0)
        for sprite in scene.sprites:
            if sprite.path in ("linear", "accelerated"):
                dx, dy = sprite.center[-1] - sprite.center[0]
                words = ["left" if dx < -1e-6 else "right" if dx > 1e-6 else ""]
                words.insert(0, "up" if dy < -1e-6 else "down" if dy > 1e-6 else "")
                assert sprite.direction == " ".join(word for word in words if word)
        if scene.camera.move == "pans right":
            assert scene.camera.center[-1, 0] > scene.camera.center[0, 0]


def test_prompts() -> None:
    scene = draw_scene(9, 8, 1.0)
    caption, subject, place = (describe(scene, kind) for kind in PROMPT_KINDS)
    assert caption == f"{subject} {place}"
    assert scene.background in place
    assert scene.sprites[-1].shape in subject
    with pytest.raises(ValueError, match="kind must be one of"):
        describe(scene, "title")


def test_outlines() -> None:
    axis = torch.linspace(-1.6, 1.6, 81, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    for name in SHAPES:
        distance = signed_distance(points[None], [name])[0]
        assert (distance[40, 40] > 0) == (name == "ring")
        assert (distance[[0, -1]] > 0).all()
        assert 0.05 < (distance < 0).double().mean() < 0.35
        slope = torch.stack(torch.gradient(distance, spacing=3.2 / 80)).norm(dim=0)
        assert slope.max() < 1.3


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="frames of a generated video must be a whole number of at least 1, got 0"):
        WorldConfig(frames=0)
    with pytest.raises(ValueError, match="least <= most"):
        draw_scene(0, 8, 1.0, sprites=(0, 2))
    clip = generate([0], SMALL)[0]
    for queries, message in (
        (np.zeros((3, 2)), "shape"),
        (np.array([[9.0, 1, 1]]), "frames 0..4"),
        (np.array([[0.0, np.nan, 1]]), "finite"),
        (np.array([[0.0, 70, 1]]), "inside"),
        (np.array([[0.5, 7, 1]]), "frames 0..4"),
        (np.zeros(0), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            clip.tracks(queries)
    with pytest.raises(ValueError, match="at least two frames"):
        generate([0], WorldConfig(frames=1))[0].flow()
    with pytest.raises(ValueError, match="no scenes"):
        render([], SMALL)
    with pytest.raises(ValueError, match="count"):
        sample_queries(clip, 0)


@pytest.mark.parametrize(
    "size",
    [
        {"frames": 4.5},
        {"frames": True},
        {"height": "32"},
        {"width": 7},
        {"sprites": (0, 9)},
        {"sprites": 3},
        {"sprites": (1.5, 2)},
    ],
)
def test_sizes_that_no_video_has(size: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(size))):
        WorldConfig(**size)


@pytest.mark.parametrize("seeds", [[-1], [1.5], ["a"], 5])
def test_seeds_that_are_none(seeds: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        generate(seeds, SMALL)


def test_scenes_of_another_video_are_not_painted() -> None:
    for other in (WorldConfig(frames=6, height=48, width=64), WorldConfig(frames=5, height=48, width=48)):
        with pytest.raises(ValueError, match="seed 3 was drawn for"):
            render([other.scene(3)], SMALL)
    larger = WorldConfig(frames=5, height=96, width=128)
    assert render([SMALL.scene(3)], larger).shape == (1, 5, 3, 96, 128)


def test_layers_of_what_is_no_frame_and_no_point() -> None:
    clip = generate([0], SMALL)[0]
    for frame, places in ((5, [[1, 1]]), (-1, [[1, 1]]), (0, [1, 1]), (0, [[np.nan, 1]])):
        with pytest.raises(ValueError, match=r"frame must|xy must"):
            clip.layers(frame, np.array(places))


def test_a_query_on_the_border_is_visible_where_it_was_asked() -> None:
    for seed in range(4):
        clip = generate([seed], SMALL)[0]
        sides = [(x, y) for x in (0.0, 64.0) for y in np.linspace(0, 48, 7)]
        sides += [(x, y) for y in (0.0, 48.0) for x in np.linspace(0, 64, 7)]
        queries = np.array([(frame, x, y) for frame in range(SMALL.frames) for x, y in sides])
        truth = clip.tracks(queries)
        assert truth.visible[queries[:, 0].astype(int), np.arange(len(queries))].all()


def test_tapvid_video_of_a_clip() -> None:
    clip = generate([5], SMALL)[0]
    queries = sample_queries(clip, 30)
    on_sprites = sum(int(clip.layers(int(f), np.array([[x, y]]))[0] > 0) for f, x, y in queries)
    assert 10 <= on_sprites <= 20
    video, truth = as_tapvid(clip, queries, "five"), clip.tracks(queries)
    np.testing.assert_allclose(video.points[:, 2] * [64, 48], truth.xy[2], atol=1e-4)
    np.testing.assert_array_equal(video.occluded, ~truth.visible.T)


def test_demo_clip() -> None:
    video, clip = demo_clip(1)
    assert video.shape == (20, 160, 240, 3)
    assert clip.tracks(np.array([[0.0, 120.0, 80.0]])).xy.shape == (20, 1, 2)
