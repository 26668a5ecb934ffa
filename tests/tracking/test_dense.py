"""Every pixel of a frame followed: the tracks of the same points, and the motion of a known texture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pixel_backbone import PixelBackbone, moving_texture

from corrdit import PointTracker
from corrdit.cli import main
from corrdit.tracking import video_reading
from corrdit.video import write_video

VIDEO = moving_texture(5, (4, 0), (32, 48))


@pytest.mark.parametrize(("frame", "every"), [(0, 1), (2, 3), (-1, 7)])
def test_dense_is_sparse_at_the_same_points(frame, every, monkeypatch):
    monkeypatch.setattr(video_reading, "DENSE_BYTES", 2**19)  # several batches
    tracker = PointTracker(PixelBackbone())
    steps = []
    dense = tracker.dense(VIDEO, frame, every=every, progress=lambda *step: steps.append(step))
    rows, columns = 32 // every, 48 // every
    assert dense.displacement.shape == (5, rows, columns, 2)
    assert dense.visible.shape == dense.score.shape == (5, rows, columns)
    assert dense.frame == frame % 5
    assert (dense.displacement[dense.frame] == 0).all()
    assert dense.visible[dense.frame].all()
    assert steps[-1] == (rows * columns, rows * columns)
    assert every > 1 or len(steps) > 3
    points = [[dense.frame, *dense.start[row, column]] for row, column in ((0, 0), (rows - 1, 2), (1, columns - 1))]
    sparse = tracker.track(VIDEO, points)
    for index, (row, column) in enumerate(((0, 0), (rows - 1, 2), (1, columns - 1))):
        where = dense.start[row, column] + dense.displacement[:, row, column]
        torch.testing.assert_close(where, sparse.xy[:, index], rtol=0, atol=1e-3)
        assert torch.equal(dense.visible[:, row, column], sparse.visible[:, index])


def test_a_moving_texture_moves_and_what_leaves_the_frame_is_hidden():
    dense = PointTracker(PixelBackbone()).dense(VIDEO)
    inside = dense.displacement[3, 4:-4, 4 : 48 - 16]
    assert (inside - torch.tensor([12.0, 0.0])).norm(dim=-1).median() < 0.3
    assert dense.visible[3, 4:-4, 4 : 48 - 16].float().mean() > 0.95
    assert dense.visible[4, :, 48 - 12 :].float().mean() < 0.3


def test_bad_frames_and_steps_are_named():
    tracker = PointTracker(PixelBackbone())
    with pytest.raises(ValueError, match="frame 5 is outside"):
        tracker.dense(VIDEO, 5)
    with pytest.raises(ValueError, match="every must be a whole number"):
        tracker.dense(VIDEO, every=0)


def test_command_line_writes_displacements_in_pixels_of_the_file(tmp_path, capsys):
    write_video(tmp_path / "clip.mp4", np.kron(VIDEO[:3], np.ones((1, 2, 2, 1), np.uint8)), 8)
    output = tmp_path / "out"
    command = ["track", str(tmp_path / "clip.mp4"), "--output", str(output), "--max-side", "48"]
    assert main([*command, "--dense", "4"]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["dense.json", "dense.mp4", "dense.npz", "dense.png"]
    arrays = np.load(output / "dense.npz")
    assert arrays["displacement"].shape == (3, 8, 12, 2)
    np.testing.assert_allclose(arrays["start"][0, 0], (4, 4))
    assert "8 x 12 points through 3 frames of 64 x 96" in capsys.readouterr().out
    assert main([*command, "--dense", "0"]) == 2
    assert "--dense must be a whole number of at least 1" in capsys.readouterr().err
