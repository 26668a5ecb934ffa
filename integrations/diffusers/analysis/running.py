"""Many videos into a folder of results, and the report from it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from corrdit.analysis.html_report import Picture, write_report
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.analysis.results import AnalysisResults, has_analysis, read_results, write_failure, write_result
from corrdit.analysis.sources import AnalysisItem
from corrdit.integrations.diffusers.analysis.video_pictures import drawn_pictures, video_pictures
from corrdit.integrations.diffusers.analysis.videos import Progress, analyze_video
from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.memory import first_line, is_out_of_memory
from corrdit.runs import check_on_broken


def analyze_item(
    backbone: Backbone,
    item: AnalysisItem,
    output: str | os.PathLike[str],
    options: AnalysisOptions,
    *,
    on_broken: str = "report",
    progress: Progress | None = None,
) -> dict[str, str]:
    """Analyse one video into its folder of results.

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
        given = item.load()
        table = analyze_video(backbone, given.video, given.xy, given.visible, options, progress=progress)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = _said(error)
        if on_broken == "raise":
            raise ValueError(f"video {item.name}: {said}") from error
        write_failure(output, item.name, said)
        return {"name": item.name, "truth": item.truth, "error": said}
    write_result(output, item.name, table, inputs)
    return {"name": item.name, "truth": item.truth}


def finish_analysis(
    backbone: Backbone,
    items: Iterable[AnalysisItem],
    output: str | os.PathLike[str],
    options: AnalysisOptions,
    *,
    names: Iterable[str] | None = None,
    pictures: int = 1,
    parquet: bool = False,
) -> tuple[AnalysisResults, list[str]]:
    """Draw the first videos at the layer and step that match best, and write report and tables.

    Args:
        backbone: that was analysed.
        items: videos, of which the first with a result are drawn.
        output: the folder of the analysis.
        options: of the analysis.
        names: of the videos in the report; None for all results in the folder.
        pictures: how many videos are drawn.
        parquet: also write Parquet.

    Returns:
        The results, and the names of the files.

    Raises:
        ValueError: no video has a result.
    """
    results = read_results(output, names)
    best = results.calibration().best
    where = f"layer {best.layer}, timestep {best.timestep:g}"
    drawn: list[Picture] = []
    left = pictures
    for item in items:
        if left == 0:
            break
        if not has_analysis(output, item.name):
            continue
        found = video_pictures(
            backbone, item.load(), step=best.step, timestep=best.timestep, layer=best.layer, options=options
        )
        drawn += drawn_pictures(found, name=item.name, head=best.head, where=where)
        left -= 1
    order = list(dict.fromkeys(section for section, _, _ in drawn))
    drawn.sort(key=lambda picture: order.index(picture[0]))
    return results, write_report(output, results, pictures=drawn, parquet=parquet)


def _said(error: Exception) -> str:
    """What is wrong with a video; errors that are not about the video are raised again."""
    if is_out_of_memory(error):
        line = first_line(error)
        return f"there is not enough memory for it ({line}); give max_frames, tokens_per_frame or fewer points"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    raise error
