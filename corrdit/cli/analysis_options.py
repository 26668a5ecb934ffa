"""Options of `corrdit analyze`, and what they say of an analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corrdit.cli.devices import OptionTable, add_options, add_run_options, add_shards_option, given_options
from corrdit.cli.frame_options import add_num_frames_option, add_size_option
from corrdit.cli.model_options import add_model_options, chosen_placement

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.analysis.protocols import AnalysisOptions
    from corrdit.integrations.diffusers.analysis.video_pictures import PictureChoice
    from corrdit.integrations.diffusers.backbones.base import Backbone

SOURCES = ("world", "videos", "tapvid", "difftrack", "prompts")
_OPTIONS: OptionTable = {
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
    "count_hidden_starts": (bool, "count points hidden in the first frame where they are seen later"),
    "average": (str, "pooled (every position counts the same) or released (means of points and of videos)"),
    "bidirectional": (bool, "use the softmax over source tokens too"),
    "rounding": (str, "of matches: none, or bfloat16 (as in DiffTrack's released runs, where near candidates tie)"),
    "latents": (str, "of given videos: frames (each a latent of its own) or video (temporally compressed)"),
    "posterior": (str, "latents of the codec: mode (the most likely), or sample (drawn, as released)"),
    "encoded_size": (tuple[int, int], "size [height,width] in pixels at which given videos are encoded"),
    "resize_first": (tuple[int, int], "size [height,width] they are brought to before that, as [256,256]"),
    "antialias": (bool, "resize them with antialiasing"),
    "noise": (str, "of given videos: noised (to each step's timestep), inverted (DDIM, to each step) or clean"),
    "seed": (int, "of noise, of generated videos (42 for sets in DiffTrack's layout), and of the world"),
    "max_frames": (int, "most latent frames of a given video that are read"),
    "tokens_per_frame": (int, "most tokens a frame is encoded to"),
    "backend": (str, "of the attention operations: auto, triton, streaming or reference"),
    "memory_budget": (int, "bytes an attention operation may use beyond its inputs and outputs"),
}


def add_analysis_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    source = parser.add_argument_group("what is analysed")
    source.add_argument("--world", type=int | None, default=None, metavar="N", help="so many generated videos")
    source.add_argument("--videos", default=None, metavar="DIR", help="folder of videos")
    source.add_argument("--tapvid", default=None, metavar="PATH", help="TAP-Vid file or folder of shards")
    source.add_argument(
        "--first-frames",
        type=int | None,
        default=None,
        metavar="N",
        help="with --tapvid: cut videos after N frames and leave shorter ones out (released: 49)",
    )
    add_shards_option(source)
    source.add_argument("--difftrack", default=None, metavar="DIR", help="data set in DiffTrack's layout")
    source.add_argument("--prompts", default=None, metavar="FILE", help="text file with one prompt a line")
    source.add_argument("--tracks", default=None, metavar="DIR", help="with --videos: folder of their tracks")
    source.add_argument("--tracker", default=None, help="lucas-kanade, cotracker or patches, where no truth is given")
    source.add_argument("--points", type=int, default=16, metavar="N", help="N x N points on the first frame")
    source.add_argument("--mode", default="scene", help="with --prompts: starting grid, object or scene")
    source.add_argument(
        "--image",
        default=None,
        metavar="FILE|DIR",
        help="with --prompts, for image-to-video models: an image for all, or a folder with 000.png and so on",
    )
    source.add_argument(
        "--same-seed", action="store_true", help="with --prompts: all videos from --seed, not from the numbers after it"
    )
    source.add_argument(
        "--pipeline", type=dict | None, default=None, metavar="JSON", help="arguments of the call that generates"
    )
    add_num_frames_option(source, "with --world: frames of each video", default=8)
    add_size_option(source, "with --world: of the frames in pixels", default="64x96")
    parser.add_argument("--layers", default="all", help="all, or numbers with commas such as 3,4,-1")
    parser.add_argument("--steps", default="spread:10", help="all, spread:N evenly with the last one, or numbers")
    parser.add_argument("--protocol", choices=["default", "published"], default="default", help="ways of measuring")
    _add_picture_options(parser)
    parser.add_argument("--parquet", action="store_true", help="also write the table as Parquet (needs pyarrow)")
    parser.add_argument("--calibrate", action="store_true", help="also write preset.json")
    add_run_options(parser)
    group = parser.add_argument_group("ways of measuring (default: what --protocol says)")
    add_options(group, _OPTIONS)


def _add_picture_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("pictures, in the report and as PNG and mp4")
    group.add_argument("--pictures", type=int, default=1, metavar="N", help="videos that are drawn")
    group.add_argument("--picture-layers", type=list[int], default=[], metavar="[17]", help="the best one if left out")
    group.add_argument("--picture-steps", type=list[int], default=[], metavar="[49]", help="the best one if left out")
    group.add_argument(
        "--picture-points",
        type=list[list[float]],
        default=[],
        metavar="[[X,Y]]",
        help="points in pixels of the first frame whose attention is drawn; some that say much if left out",
    )
    group.add_argument(
        "--picture-words", type=list[str], default=[], metavar="[WORD]", help="of the prompt; its longest if left out"
    )


def picture_choice(arguments: Namespace) -> PictureChoice:
    """What is drawn."""
    from corrdit.integrations.diffusers.analysis.video_pictures import PictureChoice

    return PictureChoice(
        layers=tuple(arguments.picture_layers),
        steps=tuple(arguments.picture_steps),
        points=tuple(tuple(point) for point in arguments.picture_points),
        words=tuple(arguments.picture_words),
    )


def resolved_options(arguments: Namespace, backbone: Backbone, inference_steps: int | None = None) -> AnalysisOptions:
    """What was given over the protocol, with steps counted on the model's schedule.

    Args:
        arguments: of the command.
        backbone: the model.
        inference_steps: of its schedule, in place of the option's and of the preset's.
    """
    from corrdit.analysis.protocols import analysis_options

    given = given_options(arguments, _OPTIONS)
    given |= {name: tuple(given[name]) for name in ("thresholds", "low_pass") if name in given}
    if arguments.layers != "all":
        given["layers"] = _numbers("--layers", arguments.layers)
    count = int(inference_steps or given.get("inference_steps") or backbone.preset.reading.inference_steps)
    given |= {"steps": chosen_steps(arguments.steps, count), "inference_steps": count}
    return analysis_options(arguments.protocol, given)


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


def source_of(arguments: Namespace) -> dict[str, object]:
    """What is analysed, for the settings of the run."""
    kind = next(name for name in SOURCES if arguments[name] is not None)
    generated = ("image", "same_seed", "pipeline")
    names = {
        "world": ("world", "points", "frames", "height", "width"),
        "prompts": ("prompts", "mode", "tracker", *generated),
        "difftrack": ("difftrack", "pipeline"),
        "tapvid": ("tapvid", "first_frames"),
    }
    named_otherwise = {"frames": "num_frames"}
    listed = names.get(kind, (kind, "tracks", "tracker", "points"))
    return {name: arguments[named_otherwise.get(name, name)] for name in listed}


def settings_of(arguments: Namespace, options: AnalysisOptions, backbone: Backbone) -> dict[str, object]:
    """What must be the same for a run to go on in a folder."""
    from corrdit.integrations.diffusers.fingerprint import model_facts

    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        **chosen_placement(arguments).described(),
        "source": source_of(arguments),
        "protocol": arguments.protocol,
        "options": options.described(),
        "preset": backbone.preset.described(),
        **model_facts(backbone),
    }


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text} is not understood; accepted are all and numbers such as 3,4,-1") from None
