"""Analyse how well the layers, heads and denoising steps of a video transformer match frames.

reads   one of
        --world N         N generated videos with exact truth
        --videos FOLDER   video files; their true tracks as NAME.npz beside them (as `corrdit world` writes), in
                          --tracks, or from another tracker by --tracker
        --tapvid PATH     a TAP-Vid file, or a folder of its shards
        --difftrack DIR   a folder in the layout of DiffTrack's data set
        --prompts FILE    one prompt a line: videos are generated and their denoising is analysed; --tracker stands in
                          for the truth
writes  into the folder --output, where a stopped run goes on:
        report.html       all of it on one page, pictures inside
        analysis.csv      one row for each step, layer and reading; analysis.parquet with --parquet
        videos.csv        one row for each video
        videos/NAME/      analysis.npz, the counts of one video, or failed.json, why there are none
        preset.json       with --calibrate: the layer, step and head that match best, for `corrdit calibrate` too
        dataset/          with --prompts: videos, tracks and visibility in the layout of DiffTrack's data set
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrdit.cli.analysis_options import SOURCES, add_analysis_options, resolved_options, settings_of, source_of
from corrdit.cli.devices import trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import checked_preset, chosen_placement, loaded_backbone
from corrdit.cli.terminal import Report, progress_bar

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from corrdit.analysis.protocols import AnalysisOptions
    from corrdit.analysis.sources import AnalysisItem
    from corrdit.integrations.diffusers.backbones.base import Backbone

HELP = "measure how layers, heads and denoising steps match frames, as one report"
DATASET_FOLDER = "dataset"
USAGE = "--world N | --videos DIR | --tapvid PATH | --difftrack DIR | --prompts FILE  --output DIR [options]"


add_arguments = add_analysis_options


def run(arguments: Namespace) -> int:
    """Analyse what is left to analyse and write the report; 2 where a video failed, with the report of the others."""
    from corrdit.analysis.html_report import require_pyarrow

    began = time.perf_counter()
    _check(arguments)
    if arguments.parquet:
        require_pyarrow()
    if arguments.prompts is not None:
        return _finish(arguments, *_analyze_prompts(arguments), began)
    preset = checked_preset(arguments.preset)
    items = _items(arguments)  # wrong folders are refused before the model is loaded
    backbone = loaded_backbone(arguments, preset)
    options = resolved_options(arguments, backbone)
    if arguments.processes == 1:
        _analyze_here(arguments, backbone, items, options)
    elif not _analyze_in_processes(arguments, backbone, list(items), options):
        return 0  # the first process writes the report
    return _finish(arguments, backbone, items, options, began)


def _check(arguments: Namespace) -> None:
    given = [f"--{name}" for name in SOURCES if arguments[name] is not None]
    if len(given) != 1:
        accepted = ", ".join(f"--{name}" for name in SOURCES)
        raise ValueError(f"analyze takes exactly one of {accepted}; given are {', '.join(given) or 'none'}")
    for name, least in (("pictures", 0), ("points", 1), ("processes", 1)):
        if arguments[name] < least:
            raise ValueError(f"--{name} {arguments[name]} was given; accepted is {least} or more")
    if arguments.processes > 1 and (arguments.tapvid or arguments.prompts):
        raise ValueError("--processes shares out the videos of --world, --videos and --difftrack; leave it out here")


def _analyze_here(
    arguments: Namespace, backbone: Backbone, items: Iterable[AnalysisItem], options: AnalysisOptions
) -> None:
    from corrdit.analysis.results import analysis_folder, write_failure
    from corrdit.analysis.sources import tapvid_items
    from corrdit.integrations.diffusers.analysis.running import analyze_item
    from corrdit.integrations.diffusers.analysis.videos import analysis_axes

    steps = len(analysis_axes(backbone, options).steps)
    folder = analysis_folder(arguments.output)
    folder.begin(settings_of(arguments, options, backbone))
    if arguments.tapvid is not None:
        items = tapvid_items(
            arguments.tapvid, on_broken=lambda name, error: write_failure(arguments.output, name, error)
        )
    total = len(items) if isinstance(items, list) else None
    with progress_bar("steps") as report:
        for number, item in enumerate(items):
            if folder.left({item.name: item.inputs}):
                moved = functools.partial(_report, report, number * steps, (total or number + 1) * steps)
                analyze_item(backbone, item, arguments.output, options, on_broken=arguments.on_broken, progress=moved)


def _report(report: Report, before: int, total: int, done: int, of: int) -> None:
    report(before + done, total)


def _analyze_in_processes(
    arguments: Namespace, backbone: Backbone, items: list[AnalysisItem], options: AnalysisOptions
) -> bool:
    """Analyse the videos that are left; whether this process is the first, which writes the report."""
    devices = trainer_devices(arguments)
    with quiet_lightning():
        from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule

        on_cpu = devices["accelerator"] == "cpu"
        module = AnalysisModule(
            backbone if on_cpu else arguments.model,
            output=arguments.output,
            model_preset=None if on_cpu else checked_preset(arguments.preset),
            protocol=arguments.protocol,
            options={name: getattr(options, name) for name in options.described()},
            source=source_of(arguments),
            dtype=arguments.dtype,
            placement="device" if on_cpu else chosen_placement(arguments),
            on_broken=arguments.on_broken,
        )
        module.settings["model"] = arguments.model
        trainer = command_trainer(several=True, **devices)
        predict(trainer, module, AnalysisDataModule(items, output=arguments.output))
        trainer.strategy.barrier("every process has done its videos")
    return bool(trainer.is_global_zero)


def _items(arguments: Namespace) -> Iterable[AnalysisItem]:
    from corrdit.analysis import sources
    from corrdit.tracking.pseudo_truth import pseudo_tracker

    if arguments.world is not None:
        from corrdit.integrations.embedded.world.analysis_items import world_items

        size = {"frames": arguments.frames, "height": arguments.height, "width": arguments.width}
        return world_items(arguments.world, seed=arguments.seed or 0, points=arguments.points, **size)
    if arguments.tapvid is not None:
        if not Path(arguments.tapvid).exists():
            raise ValueError(f"--tapvid {arguments.tapvid} does not exist; give a TAP-Vid file or a folder of shards")
        return sources.tapvid_items(arguments.tapvid, on_broken=lambda name, error: None)
    if arguments.difftrack is not None:
        return sources.difftrack_items(arguments.difftrack)
    return sources.folder_items(
        arguments.videos,
        tracks=arguments.tracks,
        tracker=None if arguments.tracker is None else pseudo_tracker(arguments.tracker),
        tracker_name=f"tracks of {arguments.tracker}",
        points=arguments.points,
        without=arguments.output,
    )


def _analyze_prompts(arguments: Namespace) -> tuple[Backbone, list[AnalysisItem], AnalysisOptions]:
    """Generate what is left of the videos, analyse their denoising and keep them as a data set.

    Gives the backbone, the videos for the report's pictures, and the options.
    """
    from corrdit.analysis.dataset import write_difftrack_video, write_prompts
    from corrdit.analysis.results import analysis_folder, write_failure, write_result
    from corrdit.analysis.sources import difftrack_items
    from corrdit.array_files import content_digest
    from corrdit.integrations.diffusers import analysis
    from corrdit.tracking.pseudo_truth import pseudo_tracker, starting_points

    if arguments.tracker is None:
        raise ValueError(
            "--prompts needs --tracker (lucas-kanade, cotracker or patches), whose tracks stand in for the truth"
        )
    tracker, mode = pseudo_tracker(arguments.tracker), arguments.mode
    starting_points(mode, 64, 64)
    prompts, call = _prompts(arguments.prompts), _pipeline_call(arguments)
    backbone = loaded_backbone(arguments, checked_preset(arguments.preset))
    options = resolved_options(arguments, backbone, call.get("num_inference_steps"))
    results = analysis_folder(arguments.output)
    results.begin(settings_of(arguments, options, backbone))
    _check_same_prompts(arguments.output, prompts)
    dataset = Path(arguments.output) / DATASET_FOLDER
    with progress_bar("videos") as report:
        for number, prompt in enumerate(prompts):
            name, inputs = f"{number:03}", {"prompt": content_digest(prompt)}
            if results.left({name: inputs}):
                try:
                    found = analysis.analyze_generation(
                        backbone,
                        prompt,
                        tracker=tracker,
                        options=options,
                        mode=mode,
                        seed=options.seed + number,
                        call=call,
                    )
                except ValueError as error:
                    if arguments.on_broken == "raise":
                        raise ValueError(f"video {name}: {error}") from error
                    write_failure(arguments.output, name, error)
                else:
                    write_prompts(dataset, prompts)
                    files = write_difftrack_video(dataset, number, found.video, found.tracks)
                    write_result(arguments.output, name, found.table, inputs, files=files)
            report(number + 1, len(prompts))
    return backbone, difftrack_items(dataset) if (dataset / "tracks").is_dir() else [], options


def _pipeline_call(arguments: Namespace) -> dict[str, Any]:
    from PIL import Image, UnidentifiedImageError

    call = dict(arguments.pipeline or {})
    if arguments.image is not None:
        try:
            call["image"] = Image.open(arguments.image).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"--image {arguments.image} is not a picture that can be read: {error}") from error
    return call


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


def _finish(
    arguments: Namespace, backbone: Backbone, items: Iterable[AnalysisItem], options: AnalysisOptions, began: float
) -> int:
    from corrdit.cli.calibrate import write_calibration
    from corrdit.integrations.diffusers.analysis import finish_analysis

    names = [item.name for item in items] if isinstance(items, list) else None
    results, files = finish_analysis(
        backbone, items, arguments.output, options, names=names, pictures=arguments.pictures, parquet=arguments.parquet
    )
    for name, error in results.failures.items():
        print(f"corrdit analyze: {name}: {error}", file=sys.stderr)
    choice = results.calibration()
    if arguments.calibrate:
        files.append(write_calibration(results, Path(arguments.output) / "preset.json").name)
    print(
        f"{len(results.tables)} videos analysed, {len(results.failures)} could not be, in"
        f" {time.perf_counter() - began:.1f} s; best is {choice.described()}"
    )
    for file in files:
        print(f"  {Path(arguments.output) / file}")
    return 2 if results.failures else 0
