"""Writing a transfer's results into a folder, and measuring its motion fidelity."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corrdit.arguments import choice
from corrdit.array_files import write_arrays
from corrdit.files import written_beside
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.motion_transfer.result import TransferResult
from corrdit.integrations.diffusers.transfer_settings import TransferSettings
from corrdit.tracking import PointTracker
from corrdit.tracking.pseudo_truth import cotracker, cotracker_is_here
from corrdit.tracking.queries import grid_points

FORMATS = ("mp4", "gif", "frames")
TRACKED_GRID = 8
RELEASED_GRID = 55
FIDELITY_TRACKERS = ("auto", "cotracker", "ours")
"""What follows the points that motion fidelity compares."""
METRICS_FILE = "metrics.json"

Track = Callable[[np.ndarray, np.ndarray], Any]
"""`track(video [T, H, W, 3], queries [P, 3]) -> Tracks`."""


def chosen_tracker(name: str) -> str:
    """What "auto" stands for: "cotracker" where it is on this machine, else "ours"; other names as they are.

    Raises:
        ValueError: an unknown name, or CoTracker where it is not: nothing is downloaded for a measure.
    """
    choice("tracker", name, FIDELITY_TRACKERS)
    here = cotracker_is_here()
    if name == "cotracker" and not here:
        raise ValueError(
            'tracker="cotracker": CoTracker is not on this machine; load facebookresearch/co-tracker, '
            'cotracker3_offline, once by torch.hub, or take tracker="ours"'
        )
    return ("cotracker" if here else "ours") if name == "auto" else name


def fidelity_tracker(
    name: str, backbone: Backbone, progress: Callable[[int, int], None] | None = None
) -> tuple[Track, int]:
    """A tracker of `chosen_tracker` with the points a side of its grid: DiTFlow's released 55 for CoTracker."""
    if name == "cotracker":
        return cotracker, RELEASED_GRID
    return functools.partial(PointTracker(backbone).track, progress=progress), TRACKED_GRID


def fidelity_of(result: TransferResult, track: Track, grid: int = TRACKED_GRID) -> dict[str, float]:
    """Motion fidelity between a result and its reference, by tracks of a grid of points on the first frame.

    Tracks at rest count as rest, not as the noise of the tracker; as released they do not.

    Args:
        result: with a reference.
        track: a point tracker, for instance `PointTracker(backbone).track`.
        grid: points a side.

    Returns:
        "motion_fidelity" (two-sided) and "motion_fidelity_released"; empty without a reference.
    """
    from corrdit import metrics

    if result.reference is None:
        return {}
    height, width = result.video.shape[1:3]
    queries = grid_points(grid, height, width)
    frames = min(len(result.video), len(result.reference))
    made, wanted = (
        np.asarray(track(video[:frames], queries).xy).transpose(1, 0, 2) for video in (result.video, result.reference)
    )
    return {
        "motion_fidelity": metrics.motion_fidelity(made, wanted),
        "motion_fidelity_released": metrics.motion_fidelity(made, wanted, variant="released"),
    }


def write_transfer(
    folder: Path,
    result: TransferResult,
    backbone: Backbone,
    settings: TransferSettings,
    *,
    prompt: str,
    fps: float,
    file_format: str = "mp4",
    measured: dict[str, float] | None = None,
    known: Mapping[str, object] | None = None,
) -> list[str]:
    """Write the new video, the reference beside it, the loss curve, the motion flow with pictures, and the measures.

    Beside the motion flow of every block stands what nearest neighbours on the latents find (DiTFlow's appendix C).

    Args:
        folder: an existing folder.
        result: of the transfer.
        backbone: it was made with.
        settings: it was made with.
        prompt: it was made with.
        fps: frames a second of the videos.
        file_format: "mp4", "gif", or "frames" for folders of PNG files.
        measured: further measures for metrics.json.
        known: what else metrics.json says, such as `hdr` of the reference, as `corrdit.video.VideoInfo` has it.

    Returns:
        Names of what was written; metrics.json is the last.
    """
    from corrdit.visualization import write_loss_curve

    names = [_write_video(folder, "result", result.video, fps, file_format)]
    if result.reference is not None:
        names.append(_write_video(folder, "reference", result.reference, fps, file_format))
        names += _write_flow(folder, result, backbone)
        names.append(_write_comparison(folder, result, backbone, fps, file_format))
    if result.losses.size:
        write_loss_curve(folder / "losses.png", result.losses, first_step=result.guided.start)
        names.append("losses.png")
    if result.optimised is not None:
        result.optimised.save(folder / "motion.safetensors")
        names.append("motion.safetensors")
    losses = [[None if np.isnan(value) else float(value) for value in step] for step in result.losses]
    facts = {
        "model": backbone.name,
        "prompt": prompt,
        "seed": result.seed,
        "guided_steps": list(result.guided),
        "resumed_after": result.resumed_after,
        "settings": settings.described(),
        "losses": losses,
        **(measured or {}),
        **(known or {}),
    }
    with written_beside(folder / METRICS_FILE, "w") as file:
        json.dump(facts, file, indent=2)
    return [*names, METRICS_FILE]


def _write_video(folder: Path, name: str, video: np.ndarray, fps: float, file_format: str) -> str:
    from corrdit.video import write_video

    if file_format not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {file_format!r}")
    if file_format == "frames":
        import imageio.v3 as imageio

        (folder / name).mkdir()
        for index, frame in enumerate(video):
            imageio.imwrite(folder / name / f"{index:05d}.png", frame)
        return name
    write_video(folder / f"{name}.{file_format}", list(video), fps)
    return f"{name}.{file_format}"


def _write_comparison(folder: Path, result: TransferResult, backbone: Backbone, fps: float, file_format: str) -> str:
    """Reference, result and the reference's motion flow from its first frame, side by side."""
    from corrdit.visualization import flow_colours, full_colour_at, write_side_by_side

    assert result.reference is not None
    flow = result.flow[0].numpy()
    largest = full_colour_at(flow)
    size = result.reference.shape[1:3]
    colours = [_enlarged(flow_colours(field, largest=largest), *size) for field in flow]
    groups = backbone.latent_frame_map(len(result.reference))
    of_frame = {frame: index for index, group in enumerate(groups) for frame in group}
    shown = [colours[of_frame.get(frame, len(colours) - 1)] for frame in range(len(result.reference))]
    # A folder of frames would be a video nobody can play beside the others.
    name = f"comparison.{'mp4' if file_format == 'frames' else file_format}"
    panels: dict[str, np.ndarray | list[np.ndarray]]
    panels = {"reference": result.reference, "result": result.video, "motion of the reference since frame 0": shown}
    caption = f"colour: direction of the motion flow, full from {largest:.1f} tokens on"
    write_side_by_side(folder / name, panels, fps, caption=caption)
    return name


def _enlarged(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture of tokens at the size of a frame, each token one square."""
    sizes = ((height, picture.shape[0]), (width, picture.shape[1]))
    rows, columns = (np.arange(size) * tokens // size for size, tokens in sizes)
    return picture[rows][:, columns]


def _write_flow(folder: Path, result: TransferResult, backbone: Backbone) -> list[str]:
    from corrdit.motion import latent_displacement
    from corrdit.visualization import write_flow_pictures

    assert result.reference is not None
    flows = {str(block): flow.numpy().astype(np.int16) for block, flow in result.flows.items()}
    height, width = result.reference.shape[1:3]
    latents = backbone.encode_video(result.reference, height=height, width=width)
    _, patch, _ = backbone.layout().patch_size(backbone.transformer)
    flows["latents"] = latent_displacement(latents, patch=patch).cpu().numpy().astype(np.int16)
    arrays = {name if name == "latents" else f"block_{name}": flow for name, flow in flows.items()}
    write_arrays(folder / "flow.npz", arrays)
    groups = backbone.latent_frame_map(len(result.reference))
    shown = [result.reference[group[len(group) // 2]] if group else result.reference[-1] for group in groups]
    names = ["flow.npz"]
    for name, flow in flows.items():
        files = write_flow_pictures(folder, f"flow_{name}", flow, shown)
        names += [file.name for file in files]
    return names
