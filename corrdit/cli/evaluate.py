"""Evaluate point trackers on TAP-Vid or on generated videos, over any number of processes and machines.

reads   --data: TAP-Vid's file (tapvid_davis.pkl), a folder of its shards (Kinetics: 0000_of_0010.pkl ...), a folder
        that `corrdit world` wrote, or one of annotated clips
        --config: a published setting by name, or a YAML file with values for these options
writes  into the folder --output, where a stopped run goes on:
        table.json, table.csv      the means over videos in %, with 95 % intervals, and how many videos are in them
        videos.csv, splits.csv     the figures of each video, and of points by how they move
        videos/TRACKER/VIDEO.json  the figures of one video, and VIDEO.npz its tracks
        pictures/TRACKER/VIDEO.mp4 and .png  with --pictures: the tracks, and the true ones in pictures/truth

Files, further:
        broken/TRACKER/VIDEO.json  why a video could not be evaluated
        table.json, table.csv      average Jaccard, average share of points within a threshold, occlusion accuracy, both
                                   shares at 1, 2, 4, 8 and 16 pixels of 256, and which videos are left out, and why
        videos.csv                 with intervals over the points of a video; PCK at .2 sqrt(mask area) where masks lie
                                   beside joints
        splits.csv                 the figures of points that move little or much, and of those that come back

--badja is --data under another name, for a folder of annotated joints (bear.json beside bear.mp4, as BADJA's) and of
true flow (NAME_frame1.png, NAME_frame2.png, NAME_flow_gt.png, as KITTI's); figures of each video are printed too.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrdit.cli.devices import add_run_options, add_shards_option, named, trainer_devices
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import add_model_options, checked_preset, chosen_placement
from corrdit.cli.terminal import print_table
from corrdit.cli.tracker_options import add_tracker_options, given_tracker_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from lightning.pytorch import Trainer

    from corrdit.evaluation import EvaluationResults, TrackerSummary

HELP = "evaluate trackers on TAP-Vid or on generated videos"
USAGE = "--data PATH --output DIR [--config NAME|FILE] [--trackers ours,released,...] [options]"
EXAMPLES = (
    "corrdit evaluate --data world --output scores --trackers ours,patches,still",
    "corrdit evaluate --data tapvid_davis.pkl --config cogvideox-2b-davis --output davis --processes 8",
)
MAIN = (
    *("help", "help_all", "data", "output", "config", "trackers", "model", "device", "dtype", "preset"),
    *("pictures", "processes"),
)
TABLES = ("table.json", "table.csv", "videos.csv", "splits.csv")
_EARLIER = {"trainer.devices": "processes", "trainer.num_nodes": "machines", "trainer.accelerator": "device"}
_COLUMNS = {
    "average_jaccard": "AJ",
    "average_pts_within_thresh": "<d avg",
    "occlusion_accuracy": "OA",
    **{f"pts_within_{threshold}": f"<{threshold}" for threshold in (1, 2, 4, 8, 16)},
}
_MAIN_FIGURES = ("average_jaccard", "average_pts_within_thresh", "occlusion_accuracy")
_UNITS = (
    "Percent, means over videos [95 % interval]. AJ: average Jaccard; <d avg: points within 1, 2, 4, 8 and 16 pixels of"
    " 256 x 256 on average; OA: occlusion accuracy; <N: points within N of these pixels"
)
_DISTANCES = [name for name in _COLUMNS if "pts_within" in name]


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


def published_configs() -> dict[str, Path]:
    """Files of the published settings by name."""
    return {file.stem: file for file in (Path(__file__).parent / "configs").glob("*.yaml")}


def add_arguments(parser: ArgumentParser) -> None:
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    from corrdit.evaluation import TRACKER_KINDS

    class NamedConfig(ActionConfigFile):
        """`--config` with the name of a published setting, or a YAML file."""

        def __call__(  # type: ignore[override]
            self, parser: ArgumentParser, cfg: Namespace, values: object, option_string: str | None = None
        ) -> None:
            super().__call__(parser, cfg, config_file(str(values)), option_string)

    names = ", ".join(sorted(published_configs()))
    parser.add_argument("--config", action=NamedConfig, metavar="NAME|FILE", help=f"{names}, or a YAML file")
    parser.add_argument("--data", "--badja", required=True, metavar="PATH", help="file or folder of the data set")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    kinds = "; ".join(f"{name}: {kind.description}" for name, kind in TRACKER_KINDS.items())
    parser.add_argument(
        "--trackers",
        type=str | list[str] | dict[str, dict | None],
        default="ours",
        help=f"names joined by commas, or options by label as YAML ({{kind: ours, ...}} under any label). {kinds}",
    )
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
    parser.add_argument(
        "--corruption",
        type=str | None,
        default=None,
        metavar="KIND:STRENGTH",
        help="make the frames worse: blur, noise or jpeg, of strength 1 to 5 as in ImageNet-C, such as blur:3",
    )
    add_run_options(parser, on_broken="raise")
    parser.add_argument("--machines", type=int, default=1, metavar="N", help="that take part and all see --output")
    parser.add_argument("--skip-broken", action="store_true", help=SUPPRESS)
    for old in _EARLIER:
        parser.add_argument(f"--{old}", type=int | str | list[int], default=None, help=SUPPRESS)
    parser.add_argument(
        "--queries-at-once", type=int, default=4096, metavar="N", help="most queries a tracker is given together"
    )
    parser.add_argument("--save-tracks", type=bool, default=True, help="keep the tracks beside the figures")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="draw the tracks of the first N videos")
    parser.add_argument(
        "--trail", type=int, default=15, metavar="N", help="past frames whose path is drawn behind a point"
    )
    add_shards_option(parser)
    add_tracker_options(parser)


def run(arguments: Namespace) -> int:
    """Evaluate what is left to evaluate, and write and print the tables.

    Returns:
        0, also where broken videos were left out on request.
    """
    from corrdit.evaluation import chosen_trackers

    began = time.perf_counter()
    trackers, options = plain(arguments.trackers), given_tracker_options(arguments)
    chosen_trackers(trackers, options)  # refused before Lightning starts processes that would each refuse it
    preset = checked_preset(arguments.preset)
    if arguments.skip_broken:
        warnings.warn("--skip-broken is now --on-broken report; the old name goes in corrdit 0.3", stacklevel=2)
    with quiet_lightning():
        from corrdit.integrations.lightning import EvaluationModule, TapVidDataModule

        cut = named(arguments, "mode", "start", "end", "max_frames", "corruption")
        data = TapVidDataModule(arguments.data, stride=arguments.query_stride, incomplete=arguments.incomplete, **cut)
        module = EvaluationModule(
            arguments.model,
            model_preset=preset,
            trackers=trackers,
            tracker_options=options,
            on_broken="report" if arguments.skip_broken else arguments.on_broken,
            placement=chosen_placement(arguments),
            **named(arguments, "output", "dtype", "queries_at_once", "save_tracks", "pictures", "trail"),
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
    if data.videos.annotated:
        _report_videos(module.evaluated, module.labels, data.names)
    broken = {name for summary in summaries for name in summary.broken}
    evaluated = len(set(data.pending) - broken)
    print(f"{evaluated} of {len(data.names)} videos evaluated now, in {time.perf_counter() - began:.1f} s")
    print("\n".join(f"  {Path(arguments.output) / name}" for name in TABLES))
    return 0


def _report_videos(results: EvaluationResults, labels: list[str], names: list[str]) -> None:
    """A row for each video and tracker, with the interval over points."""
    rows = []
    for name in names:
        for label in labels:
            record: Mapping[str, Any] = results.record(label, name) or {}
            figures, ends, pck = record.get("figures") or {}, record.get("points_interval"), record.get("pck")
            between = "-" if ends is None else " to ".join(f"{100 * end:.1f}" for end in ends)
            shown = ["-" if value is None else f"{100 * value:.1f}" for value in (*map(figures.get, _DISTANCES), pck)]
            rows.append([name, label, shown[0], between, *shown[1:]])
    shown_as = [_COLUMNS[column] for column in _DISTANCES]
    print_table(
        ["video", "tracker", shown_as[0], "over points", *shown_as[1:], "PCK"],
        rows,
        title="Percent, for each video; intervals of 95 % over its points",
        numbers=True,
    )


def plain(value: Any) -> Any:
    """jsonargparse's namespaces as dicts."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    return {key: plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _trainer(arguments: Namespace) -> Trainer:
    """The Trainer; options by their earlier names go before."""
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    given = {old: arguments[old] for old in _EARLIER if arguments[old] is not None}
    for old in given:
        warnings.warn(f"--{old} is now --{_EARLIER[old]}; the old name goes in corrdit 0.3", stacklevel=2)
    where = {**trainer_devices(arguments, unset="auto"), "num_nodes": arguments.machines}
    where |= {old.removeprefix("trainer."): value for old, value in given.items()}
    try:
        return command_trainer(several=where["devices"] not in (1, "1") or where["num_nodes"] != 1, **where)
    except (MisconfigurationException, TypeError) as error:
        said = " ".join(f"--{old} {value}" for old, value in given.items())
        raise ValueError(f"{said or f'--processes {arguments.processes}'}: {error}") from error


def _report(summaries: list[TrackerSummary]) -> None:
    """Broken videos on the error stream, the table on the output."""
    rows = []
    for summary in summaries:
        for name, error in summary.broken.items():
            print(f"corrdit evaluate: {summary.tracker} without video {name}: {error}", file=sys.stderr)
        without, left = summary.without_visible_points, summary.left
        reasons = {"without visible points": without, "broken": summary.broken, "not yet evaluated": left}
        left_out = [f"{len(videos)} {reason}" for reason, videos in reasons.items() if videos]
        shown = [_with_interval(summary, name) for name in _COLUMNS]
        rows.append([summary.tracker, str(summary.videos), *shown, ", ".join(left_out) or "none"])
    print_table(["tracker", "videos", *_COLUMNS.values(), "left out"], rows, title=_UNITS, numbers=True)


def _with_interval(summary: TrackerSummary, name: str) -> str:
    """Percent, with the interval of the three main figures."""
    value, ends = summary.figures[name], summary.intervals.get(name)
    if value is None:
        return "-"
    between = "" if ends is None or name not in _MAIN_FIGURES else " [{:.1f}, {:.1f}]".format(*(100 * e for e in ends))
    return f"{100 * value:.1f}{between}"
