"""The varied world: photographs, bending surfaces and changing appearance, whose truth agrees with the pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, Clip, WorldConfig, generate, render
from corrdit.integrations.embedded.world.deformations import Deformation, Deformations
from corrdit.integrations.embedded.world.development import _light
from corrdit.integrations.embedded.world.photographs import Photographs
from corrdit.integrations.embedded.world.variety import Variety, varied

BENDING = Variety(bending=1.0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (90, 120)), ("b.jpg", (140, 100))):
        noise = rng.integers(0, 255, (size[0] // 10, size[1] // 10, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC).save(folder / name)
    return Photographs(folder)


def plainly_lit(seed: int, config: WorldConfig) -> Clip:
    """A clip in which a surface keeps its colours."""
    frames = config.frames
    scene = dataclasses.replace(
        config.scene(seed), gain=np.ones(frames), offset=np.zeros(frames), blur=0.0, noise=0.0, appearance=None
    )
    video = (render([scene], config)[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return Clip(scene, config, video)


def colours_at(frame: np.ndarray, xy: np.ndarray) -> np.ndarray:
    size = torch.tensor([frame.shape[1], frame.shape[0]])
    grid = (torch.from_numpy(xy).float() / size * 2 - 1)[None, None]
    image = torch.from_numpy(frame).float().permute(2, 0, 1)[None]
    return F.grid_sample(image, grid, align_corners=False, padding_mode="border")[0, :, 0].T.numpy()


@pytest.mark.parametrize("seed", range(4))
def test_tracks_agree_with_the_clip_rendered_at_four_times_the_size(seed: int, photographs: Photographs) -> None:
    """A visible point has the colours it had in its query's frame; one that is hidden or beside the truth has not."""
    variety = Variety(pictures=0.5, bending=1.0, photographs=photographs)
    small = plainly_lit(seed, WorldConfig(4, 48, 64, variety=variety))
    large = plainly_lit(seed, WorldConfig(4, 192, 256, variety=variety))
    rng = np.random.default_rng(seed)
    queries = np.concatenate([np.zeros((400, 1)), rng.uniform(2, 46, (400, 2)) * [64 / 48, 1]], axis=1)
    truth, fine = small.tracks(queries), large.tracks(queries * [1, 4, 4])
    np.testing.assert_allclose(4 * truth.xy, fine.xy, atol=2e-3)
    agreed = 0
    for frame in range(1, 4):
        seen = truth.visible[frame] & (fine.visible[frame] == truth.visible[frame])
        layer, place = large.layers(0, queries[:, 1:] * 4), fine.xy[frame]
        for step in ((6, 0), (-6, 0), (0, 6), (0, -6)):
            # Pixels on an outline or its rim mix two colours.
            seen &= large.layers(frame, place + np.array(step)) == layer
            seen &= large.layers(0, queries[:, 1:] * 4 + np.array(step)) == layer
        error = np.abs(colours_at(large.video[0], queries[:, 1:] * 4) - colours_at(large.video[frame], place))
        beside = np.abs(
            colours_at(large.video[0], queries[:, 1:] * 4) - colours_at(large.video[frame], place + np.array([16.0, 9]))
        )
        agreed += seen.sum()
        assert error[seen].mean() < 6
        assert error[seen].mean() < 0.5 * beside[seen].mean()
    assert agreed > 150


def test_flow_and_visibility_follow_the_same_surfaces_as_tracks() -> None:
    clip = generate([5], WorldConfig(3, 24, 32, variety=BENDING))[0]
    flow = clip.flow()
    queries = np.array([[1.0, 10.5, 7.5], [1.0, 25.5, 20.5]])
    truth = clip.tracks(queries)
    for row, (_, x, y) in enumerate(queries):
        moved = flow.displacement[1, int(y), int(x)] + [x, y]
        np.testing.assert_allclose(moved, truth.xy[2, row], atol=1e-3)
        assert flow.visible[1, int(y), int(x)] == truth.visible[2, row]


def test_deformations_and_their_inverses_agree_to_rounding() -> None:
    rng = np.random.default_rng(3)
    surfaces = [varied(WorldConfig(6, 32, 32).scene(seed), BENDING).sprites[0].deformation for seed in range(8)]
    deformations = Deformations([None, *surfaces], torch.float64)
    local = torch.from_numpy(rng.uniform(-1.2, 1.2, (9, 6, 50, 2)))
    surface, front = deformations.to_surface(local)
    assert front is not None
    assert front.all()
    assert (surface[1:] - local[1:]).abs().mean() > 0.02
    torch.testing.assert_close(surface[0], local[0], rtol=0, atol=0)
    torch.testing.assert_close(deformations.to_local(surface), local, rtol=0, atol=1e-12)


def test_waves_that_fold_a_surface_are_refused() -> None:
    steep = np.full((2, 1, 2), 0.5)
    with pytest.raises(ValueError, match=r"slopes of the waves add up to 1.414; accepted is at most 0.6"):
        Deformation(np.zeros((2, 2)), steep, np.array([[2.0, 0.0]]), np.zeros((2, 1)))


def test_appearance_changes_pixels_and_no_tracks(photographs: Photographs) -> None:
    plain = WorldConfig(4, 40, 40, variety=Variety(pictures=1.0, bending=1.0, photographs=photographs))
    scene = plain.scene(2)
    changing = next(
        appearance
        for seed in range(40)
        if (appearance := varied(plain.scene(seed), Variety(appearance=1.0)).appearance)
        and appearance.shutter
        and appearance.quality
    )
    shown, steady = (
        Clip(one, plain, (render([one], plain)[0] * 255).byte().permute(0, 2, 3, 1).numpy())
        for one in (dataclasses.replace(scene, appearance=changing), dataclasses.replace(scene, appearance=None))
    )
    queries = np.array([[0.0, 12.0, 30.0], [2.0, 20.0, 20.0]])
    np.testing.assert_array_equal(shown.tracks(queries).xy, steady.tracks(queries).xy)
    difference = np.abs(shown.video.astype(float) - steady.video).mean()
    assert 2 < difference < 90


def test_light_stays_light_on_wide_clips() -> None:
    """Shade grows with the distance from the middle, and never burns a picture out or blackens it."""
    variety = Variety(appearance=1.0)
    gains = [
        _light(appearance, 24, 240) / torch.from_numpy(appearance.light).float()[:, :, None, None]
        for seed in range(6)
        if (appearance := varied(WorldConfig(2, 24, 240).scene(seed), variety).appearance)
    ]
    assert gains
    assert all(gain.min() >= 0.2 and gain.max() <= 1.81 for gain in gains)


def test_a_varied_seed_gives_the_same_clip_in_any_batch(photographs: Photographs) -> None:
    config = WorldConfig(3, 32, 40, variety=Variety(0.75, 0.5, 0.5, 0.5, photographs))
    together, alone = generate(range(6), config), generate([4], config)[0]
    np.testing.assert_array_equal(together[4].video, alone.video)


def test_no_share_leaves_the_plain_world_as_it_was() -> None:
    """Held-out videos of the plain world are compared with earlier ones: these figures were taken before the varied
    world was made and must not change."""
    config = WorldConfig(4, 40, 52)
    (clip,) = generate([HELD_OUT_SEEDS + 3], config)
    (unchanged,) = generate([HELD_OUT_SEEDS + 3], dataclasses.replace(config, variety=Variety(videos=0.0)))
    np.testing.assert_array_equal(unchanged.video, clip.video)
    tracks = clip.tracks(np.array([[0, 3.0, 4.0], [2, 20.5, 11.25]]))
    np.testing.assert_allclose(tracks.xy[3], [[0.96573734, 20.20076180], [19.82191277, 16.65025330]], atol=1e-5)
    np.testing.assert_allclose(clip.video.mean(axis=(0, 1, 2)), [112.04808, 70.53954, 50.16514], atol=1e-3)


def test_values_and_folders_that_cannot_be_shown_are_refused(tmp_path: Path, photographs: Photographs) -> None:
    with pytest.raises(ValueError, match=r"bending must be a share from 0 to 1, got 1.5"):
        Variety(bending=1.5)
    with pytest.raises(ValueError, match="no photographs were given; give Photographs"):
        Variety(pictures=0.5)
    with pytest.raises(ValueError, match="holds no pictures"):
        Photographs(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken.png cannot be read as a picture"):
        Photographs(tmp_path)
    Image.fromarray(np.zeros((12, 40, 3), dtype=np.uint8)).save(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"broken.png is of 12 x 40 pixels; the shorter side .* at least 16"):
        Photographs(tmp_path)
    with pytest.raises(ValueError, match=r"broken.png is no folder"):
        Photographs(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"variety must be a Variety or None, got 'bending'"):
        WorldConfig(variety="bending")  # type: ignore[arg-type]
    config = WorldConfig(2, 32, 32, variety=Variety(pictures=1.0, photographs=photographs))
    with pytest.raises(ValueError, match="the scene shows photographs; give the WorldConfig it was drawn for"):
        render([config.scene(0)], WorldConfig(2, 32, 32))


def test_fetched_photographs_are_free_and_the_ones_whose_licence_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    fetching = importlib.import_module("photographs")
    free = {"public domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-4.0"}
    assert {picture.licence for picture in fetching.PHOTOGRAPHS} == free
    assert all(picture.author for picture in fetching.PHOTOGRAPHS)
    picture = dataclasses.replace(fetching.PHOTOGRAPHS[0], sha256=hashlib.sha256(b"picture").hexdigest()[:16])
    assert fetching.checked(picture, b"picture") == b"picture"
    with pytest.raises(ValueError, match="is another picture than before"):
        fetching.checked(picture, b"pictures")
