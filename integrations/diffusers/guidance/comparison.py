"""The same prompt and seed generated with guidance and without, and both side by side."""

from __future__ import annotations

import glob
import hashlib
import inspect
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corrdit.arguments import finite_number, whole_number
from corrdit.files import write_json, written_beside
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.compatibility import check_takes_prompt
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.layouts import Pipeline
from corrdit.integrations.diffusers.transfer_settings import LARGEST_SCALE

VIDEO_FILE = "video.mp4"
PLAIN_FILE = "plain.mp4"
BOTH_FILE = "side_by_side.mp4"
DETAILS_FILE = "generation.json"
GAP_PIXELS = 8
VBENCH_FOLDER = "vbench"
LONGEST_NAME = 220
"""Bytes of a file's name; file systems take 255, of which writing beside it needs some."""
SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "guidance_rescale")
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
    """Raises ValueError for an argument that the pipeline's call does not take, a size or scale that is none, an image
    that is needed and not given, and a pipeline that cannot read a prompt."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    accepted = set(parameters) - {"self"}
    for name in arguments:
        if name not in accepted:
            raise ValueError(
                f"{type(pipe).__name__} takes no argument {name!r}; accepted are {', '.join(sorted(accepted))}"
            )
    for name in COUNTS:
        if arguments.get(name) is not None:
            whole_number(name, arguments[name], 1)
    for name in SCALES:
        if arguments.get(name) is not None:
            finite_number(name, arguments[name], most=LARGEST_SCALE)
    check_takes_prompt(pipe, arguments)
    image = parameters.get("image")
    needed = image is not None and (image.default is image.empty or "ImageToVideo" in type(pipe).__name__)
    if needed and arguments.get("image") is None:
        raise ValueError(
            f"{type(pipe).__name__} makes a video of an image, and none is given; give image in Python, or a "
            "text-to-video model (of the commands, only analyze --prompts has an option --image)"
        )


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

    A prompt too long for the name of a file is cut, with eight digits of its digest behind it.
    """
    whole = prompt.replace("/", "-")
    room = LONGEST_NAME - len(f"-{sample}.mp4")
    if len(whole.encode()) > room:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        whole = f"{whole.encode()[: room - 9].decode(errors='ignore')}-{digest}"
    return f"{whole}-{sample}.mp4"


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


def list_for_vbench(root: str | os.PathLike[str], prompts: Iterable[tuple[str, int]]) -> Path:
    """Write `root/vbench/prompts.json`, the prompt of each video that `export_for_vbench` has copied, by its name.

    VBench's own tool looks prompts up by names; those that were cut it has to be told (`--prompt_file`).

    Args:
        root: folder of the export.
        prompts: with the number of the video among those of each prompt.
    """
    folder = Path(root) / VBENCH_FOLDER
    names = {vbench_name(prompt, sample): prompt for prompt, sample in prompts}
    there = {name: prompt for name, prompt in names.items() if any(folder.glob(f"*/{glob.escape(name)}"))}
    write_json(folder / "prompts.json", there)
    return folder / "prompts.json"


def generated_frames(pipe: Pipeline, arguments: Mapping[str, object], seed: int) -> np.ndarray:
    """uint8 `[T, H, W, 3]` of a call whose output type is "np", the noise drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(**arguments, generator=generator)
    # Cosmos 3 gives the one video it has made.
    frames = np.asarray(output.video if hasattr(output, "video") else output.frames[0])
    return np.round(frames * 255).clip(0, 255).astype(np.uint8)
