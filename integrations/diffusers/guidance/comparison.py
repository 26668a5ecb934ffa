"""The same prompt and seed generated with guidance and without, and both side by side."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corrdit.arguments import whole_number
from corrdit.files import written_beside
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.layouts import Pipeline

VIDEO_FILE = "video.mp4"
PLAIN_FILE = "plain.mp4"
BOTH_FILE = "side_by_side.mp4"
DETAILS_FILE = "generation.json"
GAP_PIXELS = 8
VBENCH_FOLDER = "vbench"
LONGEST_NAME = 220
"""Bytes of a file's name; file systems take 255, of which writing beside it needs some."""
COUNTS = ("num_inference_steps", "num_frames", "height", "width")
SET_FOR_EVERY_VIDEO = ("prompt", "generator", "output_type", "return_dict", "num_videos_per_prompt")
"""Arguments of a pipeline's call that `generate` gives itself, or that change what the call returns."""


@dataclass(frozen=True)
class GeneratedVideo:
    """What was generated for one prompt and seed.

    Args:
        prompt: the words.
        seed: of the noise.
        video: uint8 `[T, H, W, 3]`, with guidance if there was any.
        plain: the same without guidance; None if there was none.
        sample: which of several videos of the same prompt it is.
    """

    prompt: str
    seed: int
    video: np.ndarray
    plain: np.ndarray | None = None
    sample: int = 0


def check_call(pipe: object, arguments: Mapping[str, object]) -> None:
    """Raises ValueError for an argument that the pipeline's call does not take, or a size or number of none."""
    accepted = set(inspect.signature(type(pipe).__call__).parameters) - {"self"}
    for name in arguments:
        if name not in accepted:
            raise ValueError(
                f"{type(pipe).__name__} takes no argument {name!r}; accepted are {', '.join(sorted(accepted))}"
            )
    for name in COUNTS:
        if arguments.get(name) is not None:
            whole_number(name, arguments[name], 1)


def check_generation(pipe: object, call: Mapping[str, object]) -> None:
    """Raises ValueError for arguments that `generate` does not take: what `check_call` refuses, and what it sets."""
    check_call(pipe, call)
    for name in SET_FOR_EVERY_VIDEO:
        if name in call:
            raise ValueError(
                f"{name} is set for every video, so it cannot be among the pipeline's arguments; give prompts, seeds "
                "and samples instead"
            )


def checked_rate(fps: float) -> float:
    """Frames per second as a float; raises ValueError unless it is a positive number."""
    from corrdit.video.writing import VideoWriter

    return VideoWriter(VIDEO_FILE, fps).fps


def generate(
    model: Backbone | Pipeline,
    prompt: str,
    seed: int,
    call: Mapping[str, object] | None = None,
    guidance: Mapping[str, Any] | None = None,
    sample: int = 0,
) -> GeneratedVideo:
    """Generate a video, and where guidance is asked for the one without it from the same noise.

    Args:
        model: a backbone, whose preset says how it is guided, or a diffusers video pipeline.
        prompt: for it.
        seed: of the noise, which is drawn on the CPU, so that it is the same on every device.
        call: further arguments of the pipeline's call (not those of `SET_FOR_EVERY_VIDEO`).
        guidance: arguments of `CrossAttentionGuidance`; None generates plainly.
        sample: kept in the result.

    Raises:
        ValueError: what the pipeline's call does not take, or what the guidance refuses.
    """
    pipe = model.pipe if isinstance(model, Backbone) else model
    check_generation(pipe, call or {})
    arguments = {**(call or {}), "prompt": prompt, "output_type": "np"}
    if guidance is None:
        return GeneratedVideo(prompt, seed, generated_frames(pipe, arguments, seed), sample=sample)
    with CrossAttentionGuidance(model, **guidance):
        video = generated_frames(pipe, arguments, seed)
    return GeneratedVideo(prompt, seed, video, generated_frames(pipe, arguments, seed), sample)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two videos of one shape beside each other, `[T, H, 2 W + gap, 3]`, with a white gap."""
    if left.shape != right.shape:
        raise ValueError(f"the videos differ in shape, {left.shape} and {right.shape}, so they do not fit side by side")
    gap = np.full((*left.shape[:2], GAP_PIXELS, 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=2)


def write_generated(folder: str | os.PathLike[str], generated: GeneratedVideo, *, fps: float) -> list[Path]:
    """Write the videos of one result into an existing folder: `video.mp4`, and with guidance `plain.mp4` and
    `side_by_side.mp4` (without guidance on the left).

    Args:
        folder: must exist.
        generated: what to write.
        fps: frames per second.

    Returns:
        The files.
    """
    from corrdit.video import write_video

    place = Path(folder)
    videos = {VIDEO_FILE: generated.video}
    if generated.plain is not None:
        videos |= {PLAIN_FILE: generated.plain, BOTH_FILE: side_by_side(generated.plain, generated.video)}
    for name, frames in videos.items():
        write_video(place / name, frames, fps)
    return [place / name for name in videos]


def generation_facts(generated: GeneratedVideo, fps: float) -> dict[str, object]:
    """Prompt, seed, shape and rate of a result, for `generation.json`."""
    return {"prompt": generated.prompt, "seed": generated.seed, "shape": list(generated.video.shape), "fps": fps}


def vbench_name(prompt: str, sample: int) -> str:
    """The name by which VBench's tool finds video `sample` of a prompt; a slash in the prompt becomes a dash.

    Raises:
        ValueError: a prompt too long for the name of a file.
    """
    name = f"{prompt.replace('/', '-')}-{sample}.mp4"
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"the prompt {prompt[:40]!r}... is too long for the name of a file, by which VBench's tool knows it: "
            f"{len(name.encode())} bytes of at most {LONGEST_NAME}; shorten it, or leave vbench out"
        )
    return name


def export_for_vbench(
    result: str | os.PathLike[str], root: str | os.PathLike[str], prompt: str, sample: int
) -> list[Path]:
    """Copy the videos of a result into the folders VBench's own tool reads: `root/vbench/KIND/PROMPT-SAMPLE.mp4`.

    KIND is "guided" and "plain" where the result has both, "plain" otherwise.

    Args:
        result: folder that `write_generated` filled.
        root: folder for the export, made if need be.
        prompt: the words, which VBench looks up by the name of the file.
        sample: number of the video among those of its prompt.

    Raises:
        ValueError: a prompt too long for the name of a file.
    """
    source, name = Path(result), vbench_name(prompt, sample)
    both = (source / PLAIN_FILE).is_file()
    copied = []
    for kind, file in (("guided", VIDEO_FILE), ("plain", PLAIN_FILE)) if both else (("plain", VIDEO_FILE),):
        target = Path(root) / VBENCH_FOLDER / kind
        target.mkdir(parents=True, exist_ok=True)
        with written_beside(target / name) as copy, open(source / file, "rb") as original:
            shutil.copyfileobj(original, copy)
        copied.append(target / name)
    return copied


def generated_frames(pipe: Pipeline, arguments: Mapping[str, object], seed: int) -> np.ndarray:
    """uint8 `[T, H, W, 3]` of a call whose output type is "np", the noise drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    frames = np.asarray(pipe(**arguments, generator=generator).frames[0])
    return np.round(frames * 255).clip(0, 255).astype(np.uint8)
