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
from pathlib import Path
from typing import Any

from corrdit.cli.devices import add_device_options, checked_dtype
from corrdit.cli.model_options import add_preset_option, checked_preset, loaded_backbone
from corrdit.cli.progress import progress_bar

HELP = "measure how layers, heads and denoising steps match frames, as one report"
USAGE = "--world N | --videos DIR | --tapvid PATH | --difftrack DIR | --prompts FILE  --output DIR [options]"
SOURCES = ("world", "videos", "tapvid", "difftrack", "prompts")
_OPTIONS: dict[str, tuple[Any, str]] = {
    "inference_steps": (int, "steps of the schedule that --steps counts"),
    "per_head": (bool, "read every head by itself too"),
    "low_pass": (list[float], "also match through low-pass filters of so many tokens, such as [0.5,1]"),
    "features": (bool, "match intermediate features too"),
    "thresholds": (list[float], "distances in pixels of the encoded frames, such as [2,4,8]"),
    "least_motion": (float, "tokens; points that moved farther are also counted apart"),
    "geometry": (str, "how tokens and pixels correspond: centers or released"),
    "token_choice": (str, "token whose attention a point stands for: nearest or released"),
    "time": (str, "how latent frames become video frames: codec or released"),
    "similarity": (str, "of features: cosine or dot"),
    "count_query_frame": (bool, "count the query frame as a match"),
    "bidirectional": (bool, "use the softmax over source tokens too"),
    "latents": (str, "of given videos: frames (each a latent of its own) or video (temporally compressed)"),
    "noise": (str, "of given videos: noised (to each step's timestep), inverted (DDIM, to each step) or clean"),
    "seed": (int, "of noise, of generated videos, and of the world"),
    "max_frames": (int, "most latent frames of a given video that are read"),
    "tokens_per_frame": (int, "most tokens a frame is encoded to"),
    "backend": (str, "of the attention operations: auto, triton, streaming or reference"),
    "memory_budget": (int, "bytes an attention operation may use beyond its inputs and outputs"),
}


def add_arguments(parser: Any) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    add_device_options(parser)
    add_preset_option(parser)
    source = parser.add_argument_group("what is analysed")
    source.add_argument("--world", type=int | None, default=None, metavar="N", help="so many generated videos")
    source.add_argument("--videos", default=None, metavar="DIR", help="folder of videos")
    source.add_argument("--tapvid", default=None, metavar="PATH", help="TAP-Vid file or folder of shards")
    source.add_argument("--difftrack", default=None, metavar="DIR", help="data set in DiffTrack's layout")
    source.add_argument("--prompts", default=None, metavar="FILE", help="text file with one prompt a line")
    source.add_argument("--tracks", default=None, metavar="DIR", help="with --videos: folder of their tracks")
    source.add_argument("--tracker", default=None, help="lucas-kanade, cotracker or patches, where no truth is given")
    source.add_argument("--points", type=int, default=16, metavar="N", help="N x N points on the first frame")
    source.add_argument("--mode", default="scene", help="with --prompts: starting grid, object or scene")
    source.add_argument("--image", default=None, metavar="FILE", help="with --prompts: for image-to-video models")
    source.add_argument("--pipeline", type=dict | None, default=None, metavar="JSON", help="arguments of its call")
    source.add_argument("--frames", type=int, default=8, help="with --world: frames of each video")
    source.add_argument("--height", type=int, default=64, help="with --world: pixels")
    source.add_argument("--width", type=int, default=96, help="with --world: pixels")
    parser.add_argument("--layers", default="all", help="all, or numbers with commas such as 3,4,-1")
    parser.add_argument("--steps", default="spread:10", help="all, spread:N evenly with the last one, or numbers")
    parser.add_argument("--protocol", choices=["default", "published"], default="default", help="ways of measuring")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="videos drawn in the report")
    parser.add_argument("--parquet", action="store_true", help="also write the table as Parquet (needs pyarrow)")
    parser.add_argument("--calibrate", action="store_true", help="also write preset.json")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="so many processes or GPUs")
    group = parser.add_argument_group("ways of measuring (default: what --protocol says)")
    for name, (kind, text) in _OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind | None, default=None, help=text)


def run(arguments: Any) -> int:
    """Analyse what is left to analyse and write the report; 2 where a video failed, with the report of the others."""
    from corrdit.analysis.exports import require_pyarrow

    began = time.perf_counter()
    _check(arguments)
    if arguments.parquet:
        require_pyarrow()
    if arguments.prompts is not None:
        from corrdit.cli.analyze_generation import analyze_prompts

        backbone, items, options = analyze_prompts(arguments, given_options(arguments))
    else:
        backbone, items, options = _analyze_given(arguments)
    if backbone is None:  # one of several processes that is not the first
        return 0
    return _finish(arguments, backbone, items, options, began)


def given_options(arguments: Any) -> dict[str, Any]:
    """Options of `AnalysisOptions` that were given; `steps` is still to be resolved against the model."""
    given = {name: arguments[name] for name in _OPTIONS if arguments[name] is not None}
    for name in ("thresholds", "low_pass"):
        if name in given:
            given[name] = tuple(given[name])
    if arguments.layers != "all":
        given["layers"] = _numbers("--layers", arguments.layers)
    return given


def chosen_steps(text: str, inference_steps: int) -> tuple[int, ...] | None:
    """`all` (None), `spread:N`, or numbers.

    Raises:
        ValueError: another wording.
    """
    if text == "all":
        return None
    if text.startswith("spread:") and text[7:].isdigit() and int(text[7:]) > 0:
        count = min(int(text[7:]), inference_steps)
        return tuple(round((n + 1) * inference_steps / count) - 1 for n in range(count))
    return _numbers("--steps", text)


def settings_of(arguments: Any, options: Any, backbone: Any) -> dict[str, Any]:
    """What must be the same for a run to go on in a folder."""
    kind = next(name for name in SOURCES if arguments[name] is not None)
    names = {"world": ("world", "points", "frames", "height", "width"), "prompts": ("prompts", "mode", "tracker")}
    source = {name: arguments[name] for name in names.get(kind, (kind, "tracks", "tracker", "points"))}
    if kind == "prompts":
        source |= {"image": arguments.image, "pipeline": arguments.pipeline}
    return {
        "model": arguments.model,
        "source": source,
        "protocol": arguments.protocol,
        "options": options.described(),
        "dtype": str(checked_dtype(arguments.dtype)),
        "preset": backbone.preset.described(),
    }


def _check(arguments: Any) -> None:
    given = [f"--{name}" for name in SOURCES if arguments[name] is not None]
    if len(given) != 1:
        accepted = ", ".join(f"--{name}" for name in SOURCES)
        raise ValueError(f"analyze takes exactly one of {accepted}; given are {', '.join(given) or 'none'}")
    for name, least in (("pictures", 0), ("points", 1), ("processes", 1)):
        if arguments[name] < least:
            raise ValueError(f"--{name} {arguments[name]} was given; accepted is {least} or more")
    if arguments.processes > 1 and (arguments.tapvid or arguments.prompts):
        raise ValueError("--processes shares out the videos of --world, --videos and --difftrack; leave it out here")


def _analyze_given(arguments: Any) -> tuple[Any, Any, Any]:
    """The backbone (None in further processes), the videos and the options."""
    from corrdit.analysis.protocols import analysis_options

    given = given_options(arguments)
    preset = checked_preset(arguments.preset)
    items = _items(arguments, given.get("seed", 0))  # wrong folders are refused before the model is loaded
    backbone = loaded_backbone(arguments, preset)
    inference_steps = given.get("inference_steps", backbone.preset.reading.inference_steps)
    given["steps"], given["inference_steps"] = chosen_steps(arguments.steps, inference_steps), inference_steps
    options = analysis_options(arguments.protocol, given)
    settings = settings_of(arguments, options, backbone)
    if arguments.processes > 1:
        from corrdit.cli.analyze_processes import analyze_in_processes

        first = analyze_in_processes(arguments, backbone, items, options, settings)
        return (backbone if first else None), items, options
    _analyze_here(arguments, backbone, items, options, settings)
    return backbone, items, options


def _analyze_here(arguments: Any, backbone: Any, items: Any, options: Any, settings: dict[str, Any]) -> None:
    from corrdit.analysis.results import begin, has_analysis, write_failure
    from corrdit.integrations.diffusers.analysis import analyze_item
    from corrdit.integrations.diffusers.analysis.videos import analysis_axes

    steps = len(analysis_axes(backbone, options).steps)
    begin(arguments.output, settings)
    if arguments.tapvid is not None:
        from corrdit.analysis.sources import tapvid_items

        items = tapvid_items(
            arguments.tapvid, on_broken=lambda name, error: write_failure(arguments.output, name, error)
        )
    total = len(items) if isinstance(items, list) else None
    with progress_bar("steps") as report:
        for number, item in enumerate(items):
            if has_analysis(arguments.output, item.name):
                continue
            moved = functools.partial(_report, report, number * steps, (total or number + 1) * steps)
            analyze_item(backbone, item, arguments.output, options, progress=moved)


def _report(report: Any, before: int, total: int, done: int, of: int) -> None:
    report(before + done, total)


def _items(arguments: Any, seed: int) -> Any:
    from corrdit.analysis import sources
    from corrdit.tracking.pseudo_truth import pseudo_tracker

    if arguments.world is not None:
        from corrdit.integrations.embedded.world.analysis_items import world_items

        size = {"frames": arguments.frames, "height": arguments.height, "width": arguments.width}
        return world_items(arguments.world, seed=seed, points=arguments.points, **size)
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


def _finish(arguments: Any, backbone: Any, items: Any, options: Any, began: float) -> int:
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
        parquet=arguments.parquet,
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


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not understood; accepted are all and numbers such as 3,4,-1") from None
