"""Many videos into a folder of results, and the report from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from corrdit.analysis.calibration import Choice
from corrdit.analysis.dataset import read_difftrack, write_difftrack_video, write_prompts
from corrdit.analysis.html_report import Picture, write_report
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.analysis.released_tables import write_released_tables
from corrdit.analysis.results import (
    DATASET_FOLDER,
    PICTURES_FOLDER,
    AnalysisResults,
    has_analysis,
    read_results,
    write_failure,
    write_result,
)
from corrdit.analysis.sources import GeneratedItem, Item
from corrdit.analysis.table import AnalysisTable
from corrdit.integrations.diffusers.analysis.generation import (
    GivenTracks,
    analyze_generation,
    generation_arguments,
    generation_truth,
)
from corrdit.integrations.diffusers.analysis.painting import drawn_pictures, write_pictures
from corrdit.integrations.diffusers.analysis.video_pictures import (
    PictureChoice,
    VideoPictures,
    generated_pictures,
    video_pictures,
)
from corrdit.integrations.diffusers.analysis.videos import Progress, analyze_video
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.memory import first_line, is_out_of_memory
from corrdit.runs import check_on_broken
from corrdit.video import probe_video


def analyze_item(
    backbone: Backbone,
    item: Item,
    output: str | os.PathLike[str],
    options: AnalysisOptions,
    *,
    on_broken: str = "report",
    progress: Progress | None = None,
) -> dict[str, str]:
    """Analyse one video into its folder of results; one that is generated for it is kept in `dataset/`.

    Args:
        backbone: of `load_backbone`.
        item: the video.
        output: the folder of the analysis, with its settings in place.
        options: see `AnalysisOptions`.
        on_broken: "report" writes down why a video cannot be analysed; "raise" stops.
        progress: called with (steps done, steps in all).

    Returns:
        `{"name", "truth"}`, with "error" where it failed.

    Raises:
        ValueError: an unknown `on_broken`, or with "raise" what is wrong with the video.
    """
    check_on_broken(on_broken)
    try:
        inputs = item.inputs()
        if isinstance(item, GeneratedItem):
            table, files = _generated(backbone, item, output, options)
        else:
            given, files = item.load(), []
            table = analyze_video(
                backbone, given.video, given.xy, given.visible, options, starts=given.starts, progress=progress
            )
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = _said(error)
        if on_broken == "raise":
            raise ValueError(f"video {item.name}: {said}") from error
        write_failure(output, item.name, said)
        return {"name": item.name, "truth": item.truth, "error": said}
    write_result(output, item.name, table, inputs, files=files)
    return {"name": item.name, "truth": item.truth}


def _generated(
    backbone: Backbone, item: GeneratedItem, output: str | os.PathLike[str], options: AnalysisOptions
) -> tuple[AnalysisTable, list[Path]]:
    """The table of a video that is generated, and the files of the data set that hold it."""
    tracks = None if item.tracks is None else item.tracks()
    found = analyze_generation(
        backbone,
        item.prompt,
        tracker=item.tracker,
        tracks=tracks,
        options=options,
        mode=item.mode,
        seed=item.seed,
        call=generation_call(item, tracks),
    )
    dataset = Path(output) / DATASET_FOLDER
    write_prompts(dataset, list(item.prompts))
    return found.table, write_difftrack_video(dataset, item.number, found.video, found.tracks)


def generation_call(item: GeneratedItem, tracks: GivenTracks | None) -> dict[str, Any]:
    """Arguments of the pipeline's call for an item: as many frames as there are tracks, and its image.

    Raises:
        ValueError: an image that cannot be read.
    """
    call = {**({} if tracks is None else {"num_frames": len(tracks[0])}), **(item.call or {})}
    if item.image is not None:
        try:
            call["image"] = Image.open(item.image).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{item.image} is not a picture that can be read: {error}") from error
    return call


def finish_analysis(
    backbone: Backbone,
    items: Iterable[Item],
    output: str | os.PathLike[str],
    options: AnalysisOptions,
    *,
    names: Iterable[str] | None = None,
    pictures: int = 1,
    choice: PictureChoice | None = None,
    parquet: bool = False,
    made_with: Mapping[str, object] | None = None,
) -> tuple[AnalysisResults, list[str]]:
    """Draw the first videos at the layer and step that match best or at chosen ones, and write report and tables.

    The pictures are in the report and, with films of all frames, in `pictures/NAME/stepS_layerL/`. Under the published
    protocol the tables are in `released/` too, in the formats of the released scripts.

    Args:
        backbone: that was analysed.
        items: videos, of which the first with a result are drawn.
        output: the folder of the analysis.
        options: of the analysis.
        names: of the videos in the report; None for all results in the folder.
        pictures: how many videos are drawn.
        choice: what is drawn of them.
        parquet: also write Parquet.
        made_with: what the report says of its making, such as command, version, commit and device.

    Returns:
        The results, and the names of the files.

    Raises:
        ValueError: no video has a result, or a layer or step to be drawn that was not analysed.
    """
    results, choice = read_results(output, names), choice or PictureChoice()
    best, table = results.calibration().best, results.total()
    layers, steps = shown_places(choice, table, best)
    timesteps = {step: table.timesteps[table.steps.index(step)] for step in steps}
    drawn: list[Picture] = []
    files: list[str] = []
    left = pictures
    for item in items:
        if left == 0:
            break
        if not has_analysis(output, item.name):
            continue
        for found in _maps(backbone, item, output, options, timesteps, layers, choice):
            made = drawn_pictures(found, name=item.name, head=best.head, films=True)
            place = Path(PICTURES_FOLDER) / item.name / f"step{found.step}_layer{found.layer}"
            files += [str(file.relative_to(output)) for file in write_pictures(Path(output) / place, made)]
            drawn += [each.picture for each in made]
        left -= 1
    order = list(dict.fromkeys(section for section, _, _ in drawn))
    drawn.sort(key=lambda picture: order.index(picture[0]))
    files = [*write_report(output, results, pictures=drawn, parquet=parquet, made_with=made_with), *files]
    if options.average == "released":
        files += [str(file.relative_to(output)) for file in write_released_tables(output, results.tables)]
    return results, files


def shown_places(choice: PictureChoice, table: AnalysisTable, best: Choice) -> tuple[list[int], list[int]]:
    """The layers and steps that are drawn.

    Raises:
        ValueError: one that was not analysed.
    """
    chosen = []
    for word, wanted, there, otherwise in (
        ("layer", choice.layers, table.layers, best.layer),
        ("step", choice.steps, table.steps, best.step),
    ):
        missing = sorted(set(wanted) - set(there))
        if missing:
            known = ", ".join(map(str, there))
            raise ValueError(f"{word} {missing[0]} is to be drawn, but the analysis read the {word}s {known}")
        chosen.append(list(wanted) or [otherwise])
    return chosen[0], chosen[1]


def _maps(
    backbone: Backbone,
    item: Item,
    output: str | os.PathLike[str],
    options: AnalysisOptions,
    timesteps: Mapping[int, float],
    layers: Sequence[int],
    choice: PictureChoice,
) -> list[VideoPictures]:
    """Maps of a video that was analysed; of one that was generated, from its own denoising."""
    common: dict[str, Any] = {"timesteps": timesteps, "layers": layers, "options": options, "choice": choice}
    if not isinstance(item, GeneratedItem):
        return video_pictures(backbone, item.load(), **common)
    kept = next(entry for entry in read_difftrack(Path(output) / DATASET_FOLDER) if entry.number == item.number)
    tracks, shown = kept.load_tracks(), probe_video(kept.video)
    given = generation_call(item, tracks if item.tracker is None else None)
    call = generation_arguments(backbone, item.prompt, options, given)
    truth = generation_truth(backbone, tracks, (shown.height, shown.width))
    return generated_pictures(backbone, item.prompt, truth, seed=item.seed, call=call, **common)


def _said(error: Exception) -> str:
    """What is wrong with a video; errors that are not about the video are raised again."""
    if is_out_of_memory(error):
        line = first_line(error)
        return f"there is not enough memory for it ({line}); give max_frames, tokens_per_frame or fewer points"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    raise error
