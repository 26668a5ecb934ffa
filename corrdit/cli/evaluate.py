"""Evaluate point trackers on TAP-Vid or on generated videos, over any number of processes and machines.

reads   --data: TAP-Vid's file (DAVIS, RGB-Stacking: tapvid_davis.pkl), a folder of its shards (Kinetics:
        0000_of_0010.pkl ...), or a folder that `corrdit world` wrote
        --config: a published setting by name (see below), or a YAML file with values for these options
writes  into the folder --output:
        videos/TRACKER/VIDEO.json  the figures of each video as it is done, and VIDEO.npz its tracks: a run that was
                                   stopped or killed goes on when the same command is given again
        broken/TRACKER/VIDEO.json  why a video could not be evaluated
        table.json, table.csv      the means over videos: average Jaccard, average share of points within a threshold,
                                   occlusion accuracy, both shares at 1, 2, 4, 8 and 16 pixels of 256, with 95 %
                                   intervals, and how many videos are in them or left out, and why
        videos.csv                 the figures of all videos
        pictures/TRACKER/VIDEO.mp4 and .png  with --pictures: the tracks, and the true ones in pictures/truth
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from corrdit.cli.devices import DTYPES
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import add_preset_option, checked_preset
from corrdit.cli.tables import print_table
from corrdit.cli.tracker_options import add_tracker_options, given_tracker_options

if TYPE_CHECKING:
    from corrdit.evaluation import TrackerSummary

HELP = "evaluate trackers on TAP-Vid or on generated videos"
USAGE = "--data PATH --output DIR [--config NAME|FILE] [--trackers ours,released,...] [options]"
CONFIGS = "corrdit.integrations.lightning"
_COLUMNS = {
    "average_jaccard": "AJ",
    "average_pts_within_thresh": "<d avg",
    "occlusion_accuracy": "OA",
    **{f"pts_within_{threshold}": f"<{threshold}" for threshold in (1, 2, 4, 8, 16)},
}


class NamedConfig(ActionConfigFile):
    """`--config` with the name of a published setting, or a YAML file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, config_file(str(values)), option_string)


def config_file(name: str) -> str:
    """The YAML file of a published setting, or `name` itself where it is a file.

    Raises:
        ValueError: neither.
    """
    shipped = published_configs()
    if name in shipped:
        return str(shipped[name])
    if Path(name).is_file():
        return name
    raise ValueError(f"--config {name}: there is no such file or setting; settings are {', '.join(sorted(shipped))}")


def published_configs() -> dict[str, Any]:
    """Files of the published settings by name."""
    folder = resources.files(CONFIGS) / "configs"
    return {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}


def add_arguments(parser: Any) -> None:
    from corrdit.evaluation import TRACKER_KINDS

    names = ", ".join(sorted(published_configs()))
    parser.add_argument("--config", action=NamedConfig, metavar="NAME|FILE", help=f"{names}, or a YAML file")
    parser.add_argument("--data", required=True, metavar="PATH", help="file or folder of the data set")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    parser.add_argument("--model", default="embedded", help="embedded, a local diffusers folder, or a hub id")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="precision of the model; its own if left out")
    add_preset_option(parser)
    kinds = "; ".join(f"{name}: {kind.description}" for name, kind in TRACKER_KINDS.items())
    parser.add_argument(
        "--trackers",
        type=str | list[str] | dict[str, dict[str, Any] | None],
        default="ours",
        help=f"names joined by commas, or options by label as YAML ({{kind: ours, ...}} under any label). {kinds}",
    )
    _add_data_options(parser)
    parser.add_argument(
        "--skip-broken", action="store_true", help="go on without videos that cannot be evaluated; they are reported"
    )
    parser.add_argument(
        "--queries-at-once", type=int, default=4096, metavar="N", help="most queries a tracker is given together"
    )
    parser.add_argument("--save-tracks", type=bool, default=True, help="keep the tracks beside the figures")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="draw the tracks of the first N videos")
    _add_trainer_options(parser)
    add_tracker_options(parser)


def _add_data_options(parser: Any) -> None:
    parser.add_argument(
        "--mode",
        default="first",
        help="queries: first (where a point is first visible), strided, or frame_0 (points visible in frame 0 only, as"
        " DiffTrack's released evaluation)",
    )
    parser.add_argument("--query-stride", type=int, default=5, metavar="N", help="frames between strided queries")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first video")
    parser.add_argument("--end", type=int | None, default=None, metavar="N", help="number of the video after the last")
    parser.add_argument("--max-frames", type=int | None, default=None, metavar="N", help="cut videos after N frames")


def _add_trainer_options(parser: Any) -> None:
    from corrdit.integrations.lightning.model_placement import PLACEMENTS

    group = parser.add_argument_group("processes, as Lightning's Trainer takes them (also under torchrun and SLURM)")
    group.add_argument("--trainer.devices", type=int | str | list[int], default=1, help="processes or GPUs a machine")
    group.add_argument("--trainer.num_nodes", type=int, default=1, help="machines; all must see --output")
    group.add_argument("--trainer.accelerator", default="auto", help="cpu, gpu, mps or auto")
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="device",
        help="for a model too large for one GPU: offload its parts or its layers to the computer's memory, or spread it"
        " in shards over all GPUs of one process",
    )


def run(arguments: Any) -> int:
    """Evaluate what is left to evaluate, and write and print the tables.

    Returns:
        0, also where broken videos were skipped on request.
    """
    from corrdit.evaluation import chosen_trackers

    began = time.perf_counter()
    trackers, options = plain(arguments.trackers), given_tracker_options(arguments)
    chosen_trackers(trackers, options)  # refused before Lightning starts processes that would each refuse it
    preset = checked_preset(arguments.preset)
    with quiet_lightning():
        from corrdit.integrations.lightning import EvaluationModule, TapVidDataModule

        data = TapVidDataModule(
            arguments.data,
            mode=arguments.mode,
            stride=arguments.query_stride,
            start=arguments.start,
            end=arguments.end,
            max_frames=arguments.max_frames,
        )
        module = EvaluationModule(
            arguments.model,
            output=arguments.output,
            model_preset=preset,
            trackers=trackers,
            tracker_options=options,
            dtype=arguments.dtype,
            placement=arguments.placement,
            on_broken="skip" if arguments.skip_broken else "stop",
            queries_at_once=arguments.queries_at_once,
            save_tracks=arguments.save_tracks,
            pictures=arguments.pictures,
        )
        trainer = _trainer(arguments)
        try:
            predict(trainer, module, data)
            summaries = module.finish()
        except ValueError:
            if trainer.is_global_zero:
                raise
            return 0  # every process found the same; the first one says it, and its status is that of the run
    if not trainer.is_global_zero:
        return 0
    _report(summaries)
    broken = {name for summary in summaries for name in summary.broken}
    evaluated = sum(entry.name not in broken for _, entry in data.pending)
    print(f"{evaluated} of {len(data.names)} videos evaluated now, in {time.perf_counter() - began:.1f} s")
    print("\n".join(f"  {Path(arguments.output) / name}" for name in ("table.json", "table.csv", "videos.csv")))
    return 0


def plain(value: Any) -> Any:
    """jsonargparse's namespaces as dicts."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _trainer(arguments: Any) -> Any:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    devices, machines = arguments["trainer.devices"], arguments["trainer.num_nodes"]
    alone = devices in (1, "1") and machines == 1
    try:
        return command_trainer(
            several=not alone, accelerator=arguments["trainer.accelerator"], devices=devices, num_nodes=machines
        )
    except (MisconfigurationException, TypeError) as error:
        raise ValueError(
            f"--trainer.accelerator {arguments['trainer.accelerator']} --trainer.devices {devices} "
            f"--trainer.num_nodes {machines}: {error}"
        ) from error


def _report(summaries: list[TrackerSummary]) -> None:
    """Broken videos on the error stream, the table on the output."""
    rows = []
    for summary in summaries:
        for name, error in summary.broken.items():
            print(f"corrdit evaluate: {summary.tracker} without video {name}: {error}", file=sys.stderr)
        left_out = [
            f"{count} {reason}"
            for count, reason in (
                (len(summary.without_visible_points), "without visible points"),
                (len(summary.broken), "broken"),
                (len(summary.left), "not yet evaluated"),
            )
            if count
        ]
        figures = [summary.figures[name] for name in _COLUMNS]
        shown = ["-" if value is None else f"{100 * value:.1f}" for value in figures]
        rows.append([summary.tracker, str(summary.videos), *shown, ", ".join(left_out) or "none"])
    print_table(["tracker", "videos", *_COLUMNS.values(), "left out"], rows)
