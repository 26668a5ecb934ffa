"""Analyse how well the layers, heads and denoising steps of a video transformer match frames.

reads   one of --world N (generated videos with exact truth), --videos DIR, --tapvid PATH, --difftrack DIR, and
        --prompts FILE (videos are generated and their denoising is analysed)
writes  into the folder --output, where a stopped run goes on:
        report.html       all of it on one page, pictures inside
        analysis.csv      one row for each step, layer and reading; videos.csv: one for each video
        pictures/NAME/    the first --pictures videos at chosen steps and layers: sheets as PNG, all frames as mp4
        preset.json       with --calibrate: the layer, step and head that match best; --preset takes it

Further files:
        analysis.parquet  with --parquet: the table of analysis.csv
        videos/NAME/      analysis.npz, the counts of one video, or failed.json, why there are none
        released/         with --protocol published: the tables in the formats of DiffTrack's released scripts
        dataset/          videos that were generated, tracks and visibility in the layout of DiffTrack's data set

True tracks of --videos lie as NAME.npz beside them (as `corrdit world` writes), in --tracks, or come from another
tracker by --tracker; it stands in for the truth with --prompts too. --difftrack is a folder in the layout of
DiffTrack's data set; where it holds no videos, as the released ones, they are generated from its prompt.txt (and
image/), all with seed 42. --tapvid is a file, or a folder of its shards.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrdit.cli.analysis_options import (
    SOURCES,
    add_analysis_options,
    picture_choice,
    resolved_options,
    settings_of,
    source_of,
)
from corrdit.cli.devices import named, trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import checked_preset, chosen_placement, loaded_backbone
from corrdit.cli.terminal import Report, progress_bar

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from corrdit.analysis.protocols import AnalysisOptions
    from corrdit.analysis.sources import AnalysisItem, GeneratedItem, Item
    from corrdit.integrations.diffusers.backbones.base import Backbone

HELP = "measure how layers, heads and denoising steps match frames, as one report"
USAGE = "--world N | --videos DIR | --tapvid PATH | --difftrack DIR | --prompts FILE  --output DIR [options]"
EXAMPLES = (
    "corrdit analyze --world 20 --output analysis --calibrate",
    "corrdit analyze --videos my_videos --tracker lucas-kanade --output analysis",
    "corrdit analyze --prompts prompts.txt --tracker cotracker --model cogvideox-2b --device cuda --output analysis",
)
MAIN = (
    *("help", "help_all", "output", "model", "device", "dtype", "preset", *SOURCES, "tracks", "tracker", "points"),
    *("layers", "steps", "pictures", "calibrate", "processes"),
)


add_arguments = add_analysis_options


def run(arguments: Namespace) -> int:
    """Analyse what is left to analyse and write the report; 2 where a video failed, with the report of the others."""
    from corrdit.analysis.html_report import require_pyarrow

    began = time.perf_counter()
    _check(arguments)
    if arguments.parquet:
        require_pyarrow()
    preset = checked_preset(arguments.preset)
    items = _items(arguments)  # wrong folders are refused before the model is loaded
    backbone = loaded_backbone(arguments, preset)
    options = resolved_options(arguments, backbone, _pipeline_call(arguments).get("num_inference_steps"))
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
    picture_choice(arguments)
    for name, least in (("pictures", 0), ("points", 1), ("processes", 1)):
        if arguments[name] < least:
            raise ValueError(f"--{name} {arguments[name]} was given; accepted is {least} or more")
    if arguments.processes > 1 and arguments.tapvid:
        raise ValueError("--processes does not share out the videos of --tapvid; leave it out here")
    if arguments.prompts is not None and arguments.tracker is None:
        raise ValueError(
            "--prompts needs --tracker (lucas-kanade, cotracker or patches), whose tracks stand in for the truth"
        )


def _analyze_here(arguments: Namespace, backbone: Backbone, items: Iterable[Item], options: AnalysisOptions) -> None:
    from corrdit.analysis.results import analysis_folder, write_failure
    from corrdit.analysis.sources import tapvid_items
    from corrdit.integrations.diffusers.analysis.running import analyze_item
    from corrdit.integrations.diffusers.analysis.videos import analysis_axes

    steps = len(analysis_axes(backbone, options).steps)
    folder = analysis_folder(arguments.output)
    folder.begin(settings_of(arguments, options, backbone))
    if arguments.tapvid is not None:
        items = tapvid_items(
            arguments.tapvid,
            on_broken=lambda name, error: write_failure(arguments.output, name, error),
            **named(arguments, "first_frames", "incomplete"),
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
    arguments: Namespace, backbone: Backbone, items: list[Item], options: AnalysisOptions
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
        module.settings |= {"model": arguments.model, **chosen_placement(arguments).described()}
        trainer = command_trainer(several=True, **devices)
        predict(trainer, module, AnalysisDataModule(items, output=arguments.output))
        trainer.strategy.barrier("every process has done its videos")
    return bool(trainer.is_global_zero)


def _items(arguments: Namespace) -> Iterable[Item]:
    from corrdit.analysis import sources
    from corrdit.tracking.pseudo_truth import pseudo_tracker

    if arguments.world is not None:
        from corrdit.integrations.embedded.world.analysis_items import world_items

        size = {"frames": arguments.num_frames, "height": arguments.height, "width": arguments.width}
        return world_items(arguments.world, seed=arguments.seed or 0, points=arguments.points, **size)
    if arguments.tapvid is not None:
        if not Path(arguments.tapvid).exists():
            raise ValueError(f"--tapvid {arguments.tapvid} does not exist; give a TAP-Vid file or a folder of shards")
        cut = named(arguments, "first_frames", "incomplete")
        return sources.tapvid_items(arguments.tapvid, on_broken=lambda name, error: None, **cut)
    if arguments.difftrack is not None:
        return _set_items(arguments)
    if arguments.prompts is not None:
        return _prompt_items(arguments)
    return sources.folder_items(
        arguments.videos,
        tracks=arguments.tracks,
        tracker=None if arguments.tracker is None else pseudo_tracker(arguments.tracker),
        tracker_name=f"tracks of {arguments.tracker}",
        points=arguments.points,
        without=arguments.output,
    )


def _set_items(arguments: Namespace) -> list[AnalysisItem] | list[GeneratedItem]:
    """The videos of DiffTrack's layout, generated again where the set holds none."""
    from corrdit.analysis import sources

    call = _pipeline_call(arguments)
    if sources.without_videos(arguments.difftrack):
        seed = sources.RELEASED_SEED if arguments.seed is None else arguments.seed
        return sources.regenerated_items(arguments.difftrack, seed=seed, call=call)
    if call:
        raise ValueError(f"--pipeline is for videos that are generated, and {arguments.difftrack} holds them; drop it")
    return sources.difftrack_items(arguments.difftrack)


def _prompt_items(arguments: Namespace) -> list[GeneratedItem]:
    from corrdit.analysis import sources
    from corrdit.tracking.pseudo_truth import pseudo_tracker

    prompts = _prompts(arguments.prompts)
    items = sources.prompt_items(
        prompts,
        tracker=pseudo_tracker(arguments.tracker),
        tracker_name=f"tracks of {arguments.tracker}",
        mode=arguments.mode,
        seed=arguments.seed or 0,
        same_seed=arguments.same_seed,
        images=arguments.image,
        call=_pipeline_call(arguments),
    )
    _check_same_prompts(arguments.output, prompts)
    return items


def _pipeline_call(arguments: Namespace) -> dict[str, Any]:
    return dict(arguments.pipeline or {})


def _check_same_prompts(output: str, prompts: list[str]) -> None:
    """Raises ValueError where a video that is there already was made from another prompt; more at the end are fine."""
    from corrdit.analysis.dataset import set_prompts
    from corrdit.analysis.results import DATASET_FOLDER, has_analysis

    earlier = set_prompts(Path(output) / DATASET_FOLDER)
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
    arguments: Namespace, backbone: Backbone, items: Iterable[Item], options: AnalysisOptions, began: float
) -> int:
    from corrdit.benchmark.environment import environment
    from corrdit.cli.calibrate import write_calibration
    from corrdit.integrations.diffusers.analysis import finish_analysis

    names = [item.name for item in items] if isinstance(items, list) else None
    results, files = finish_analysis(
        backbone,
        items,
        arguments.output,
        options,
        names=names,
        pictures=arguments.pictures,
        choice=picture_choice(arguments),
        parquet=arguments.parquet,
        made_with={"command": arguments.called, **environment(backbone.device)},
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
    pictures = [file for file in files if Path(file).parts[0] == "pictures"]
    for file in files:
        if file not in pictures:
            print(f"  {Path(arguments.output) / file}")
    if pictures:
        print(f"  {Path(arguments.output) / 'pictures'}: {len(pictures)} files")
    return 2 if results.failures else 0
