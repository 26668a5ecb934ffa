"""Pictures of displacement fields."""

import numpy as np
import pytest

from corrdit.visualization import colour_wheel, draw_flow_arrows, flow_colours, write_flow_pictures, write_loss_curve


def test_direction_is_hue_and_length_is_saturation():
    flow = np.array([[4.0, 0], [2, 0], [0, 0], [0, 4], [-4, 0]])
    colours = flow_colours(flow).astype(int)
    np.testing.assert_array_equal(colours[2], [255, 255, 255])
    np.testing.assert_array_equal(colours[0], [255, 0, 0])
    np.testing.assert_allclose(colours[1], [255, 128, 128], atol=1)
    np.testing.assert_array_equal(colours[4], [0, 255, 255])
    assert len({tuple(colour) for colour in colours}) == 5
    np.testing.assert_array_equal(flow_colours(2 * flow), colours)
    np.testing.assert_array_equal(flow_colours(2 * flow, largest=4)[1], [255, 0, 0])


def test_the_wheel_shows_each_direction_where_it_points():
    wheel = colour_wheel(65)
    np.testing.assert_allclose(wheel[32, 64].astype(int), [255, 0, 0], atol=8)
    np.testing.assert_allclose(wheel[32, 0].astype(int), [0, 255, 255], atol=8)
    np.testing.assert_array_equal(wheel[32, 32], [255, 255, 255])
    np.testing.assert_array_equal(wheel[0, 0], [255, 255, 255])


def test_arrows_change_the_picture_only_round_their_tokens():
    frame = np.full((64, 64, 3), 90, np.uint8)
    flow = np.zeros((4, 4, 2))
    flow[1, 1] = [1, 0]
    drawn = draw_flow_arrows(frame, flow)
    changed = (drawn != 90).any(-1)
    assert drawn.shape == frame.shape
    assert changed[24, 26:38].any()
    longest = changed.sum(1).argmax()
    assert 20 <= longest <= 28


def test_pictures_and_curve_are_written(tmp_path):
    flow = np.random.default_rng(0).integers(-2, 3, (3, 3, 4, 5, 2))
    files = write_flow_pictures(tmp_path, "flow", flow, np.zeros((3, 16, 20, 3), np.uint8))
    write_loss_curve(tmp_path / "losses.png", np.array([[3.0, 2.0], [np.nan, np.nan]]))
    assert [file.name for file in files] == ["flow_colours.png", "flow_arrows.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["flow_arrows.png", "flow_colours.png", "losses.png"]


def test_what_is_no_flow_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"displacements \[..., 2\]"):
        flow_colours(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="one frame for each F"):
        write_flow_pictures(tmp_path, "flow", np.zeros((2, 2, 4, 4, 2)), np.zeros((3, 8, 8, 3), np.uint8))
