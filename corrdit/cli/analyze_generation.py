"""`corrdit analyze --prompts`: generate videos, analyse their denoising, and keep them as a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.analysis_options import resolved_options, settings_of
from corrdit.cli.model_options import checked_preset, loaded_backbone
from corrdit.cli.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jsonargparse import Namespace
    from PIL.Image import Image

    from corrdit.analysis.protocols import AnalysisOptions
    from corrdit.analysis.sources import AnalysisItem
    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.tracking.pseudo_truth import Tracker

DATASET_FOLDER = "dataset"


def analyze_prompts(arguments: Namespace) -> tuple[Backbone, list[AnalysisItem], AnalysisOptions]:
    """Generate and analyse what is left.

    Returns:
        The backbone, the videos for the report's pictures, and the options.

    Raises:
        ValueError: no tracker or prompts, or what the pipeline does not take.
    """
    from corrdit.analysis.results import analysis_folder
    from corrdit.analysis.sources import difftrack_items
    from corrdit.array_files import content_digest
    from corrdit.tracking.pseudo_truth import pseudo_tracker, starting_points

    if arguments.tracker is None:
        raise ValueError(
            "--prompts needs --tracker (lucas-kanade, cotracker or patches), whose tracks stand in for the truth"
        )
    tracker = pseudo_tracker(arguments.tracker)
    starting_points(arguments.mode, 64, 64)
    prompts = _prompts(arguments.prompts)
    call = dict(arguments.pipeline or {})
    if arguments.image is not None:
        call["image"] = _image(arguments.image)
    backbone = loaded_backbone(arguments, checked_preset(arguments.preset))
    options = resolved_options(arguments, backbone, call.get("num_inference_steps"))
    results = analysis_folder(arguments.output)
    results.begin(settings_of(arguments, options, backbone))
    _check_same_prompts(arguments.output, prompts)
    with progress_bar("videos") as report:
        for number in range(len(prompts)):
            if results.left({f"{number:03}": {"prompt": content_digest(prompts[number])}}):
                _analyze_one(arguments, backbone, prompts, number, tracker=tracker, options=options, call=call)
            report(number + 1, len(prompts))
    folder = Path(arguments.output) / DATASET_FOLDER
    return backbone, difftrack_items(folder) if (folder / "tracks").is_dir() else [], options


def _analyze_one(
    arguments: Namespace,
    backbone: Backbone,
    prompts: list[str],
    number: int,
    *,
    tracker: Tracker,
    options: AnalysisOptions,
    call: Mapping[str, object],
) -> None:
    from corrdit.analysis.dataset import write_difftrack_video, write_prompts
    from corrdit.analysis.results import write_failure, write_result
    from corrdit.array_files import content_digest
    from corrdit.integrations.diffusers import analysis

    name = f"{number:03}"
    try:
        found = analysis.analyze_generation(
            backbone,
            prompts[number],
            tracker=tracker,
            options=options,
            mode=arguments.mode,
            seed=options.seed + number,
            call=call,
        )
    except ValueError as error:
        if arguments.on_broken == "raise":
            raise ValueError(f"video {name}: {error}") from error
        write_failure(arguments.output, name, error)
        return
    folder = Path(arguments.output) / DATASET_FOLDER
    write_prompts(folder, prompts)
    files = write_difftrack_video(folder, number, found.video, found.tracks)
    inputs = {"prompt": content_digest(prompts[number])}
    write_result(arguments.output, name, found.table, inputs, files=files)


def _check_same_prompts(output: str, prompts: list[str]) -> None:
    """Raises ValueError where a video that is there already was made from another prompt; more at the end are fine."""
    from corrdit.analysis.dataset import PROMPTS_FILE
    from corrdit.analysis.results import has_analysis

    file = Path(output) / DATASET_FOLDER / PROMPTS_FILE
    earlier = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, before in enumerate(earlier):
        now = " ".join(prompts[number].split()) if number < len(prompts) else None
        if now != before and has_analysis(output, f"{number:03}"):
            said = "there is no such prompt now" if now is None else f"the prompt is now {now!r}"
            raise ValueError(
                f"{output} holds video {number:03} of {before!r}, but {said}; give another output folder, or the same "
                "prompts, with further ones at the end"
            )


def _prompts(path: str) -> list[str]:
    from corrdit.files import read_prompts

    try:
        return read_prompts(path)
    except ValueError as error:
        raise ValueError(f"--prompts {path} is not a text file with one prompt a line: {error}") from error


def _image(path: str) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"--image {path} is not a picture that can be read: {error}") from error
