"""Give a new video, made from a prompt, the motion of a reference video.

reads   REFERENCE: a video file or a folder of frames; the word none with --stored and for methods without a reference
        PROMPT: what the new video shows
        or TABLE: a CSV file with the columns video and prompt
writes  into the folder --output, all of them or none, and for a table in a folder of it for each pair:
        result.mp4          the new video; comparison.mp4, beside reference.mp4 as the model was given it, and the flow
        flow.npz            displacement (dx, dy) in tokens of the reference between all frames, one array a block:
                            [frames, frames, rows, columns, 2]; and pictures of it
        losses.png          the loss over the guided steps
        motion.safetensors  the optimised latents or embeddings, for --stored
        metrics.json        settings, losses, motion fidelity and, with --clip, the prompt's cosine

flow_BLOCK_colours.png and flow_BLOCK_arrows.png show the flow; beside them, as "latents", what nearest neighbours on
the latents find, for comparison. --stored takes the motion.safetensors of an earlier transfer, which is injected
instead of optimising anything. --region says where the motion is wanted: a video, picture or folder of frames that is
white there, or a box in shares of the frame, "[left, top, right, bottom]".

A table's columns are video and prompt (or caption, subject and scene, a pair for each) and perhaps start, end, step,
region, seed and name; DiTFlow's prompts.js goes with --videos DAVIS/JPEGImages/480p. Its results are in a folder for
each pair, as each is done, pair.json with it, and table.csv, table.md and table.json: means over pairs by kind of
prompt, with --compare in a folder for each method or value and beside what DiTFlow published.

The same command goes on where it was stopped: with a table at the first pair that is not done, with one reference after
its last finished denoising step. CogVideoX-2B and 5B run on a GPU as DiTFlow released them, unless --placement and the
options beside it say otherwise: parts offloaded, the codec in tiles and slices, gradient checkpointing.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from corrdit.cli.devices import (
    OptionTable,
    add_options,
    add_run_options,
    checked_device,
    given_options,
    named,
)
from corrdit.cli.frame_options import add_num_frames_option, add_size_option
from corrdit.cli.model_options import add_model_options, checked_preset, loaded_backbone
from corrdit.cli.terminal import Report, progress_bar
from corrdit.cli.transfer_table import TABLE_SUFFIXES, transfer_table
from corrdit.files import OutputFolder, file_digest, output_folder, short_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    import numpy as np
    from jsonargparse import ArgumentParser, Namespace

    from corrdit.integrations.diffusers.backbones.base import Backbone
    from corrdit.integrations.diffusers.motion_transfer.plan import TransferPlan
    from corrdit.integrations.diffusers.motion_transfer.result import TransferResult

WITHOUT_REFERENCE = ("steady", "path", "backbone")
HELP = "give a new video the motion of a reference"
USAGE = "REFERENCE PROMPT | TABLE  --output DIR [--model embedded] [--method ditflow] [options]"
EXAMPLES = (
    'corrdit transfer reference.mp4 "a blue star over sand" --num-frames 8 --size 32x48 --output transferred',
    'corrdit transfer reference.mp4 "a bear walks" --model cogvideox-5b --device cuda --output transferred',
    "corrdit transfer pairs.csv --compare table1 --output compared",
)
MAIN = (
    *("help", "help_all", "reference", "prompt", "output", "model", "device", "dtype", "preset", "method", "blocks"),
    *("steps", "seed", "num_frames", "size", "stored"),
)

_SETTINGS: OptionTable = {
    "method": (
        str,
        "ditflow, smm, moft, motionclone, flowmotion, injection, query-injection or backbone; steady and path need no "
        "reference",
    ),
    "optimise": (str, "latent or embedding"),
    "blocks": (list[int] | int, "attention layers whose motion is compared, such as [15]"),
    "steps": (int, "denoising steps"),
    "guided_share": (float, "share of the steps that are guided"),
    "guided_start": (float, "share of the steps, from the noisiest on, behind which guidance begins"),
    "strength": (float, "below 1, begin at the reference noised to this share of the schedule"),
    "source_prompt": (str, "what the reference shows, to read it with"),
    "reference_noised": (bool, "read the reference at every guided step, noised to it"),
    "optimisation_steps": (int, "steps of the optimiser at each guided step"),
    "learning_rate": (list[float] | float, "one learning rate, or the first and the last, such as [0.002,0.001]"),
    "rate_falls": (str, 'over the "guided steps", or over the "optimisation steps" of each'),
    "optimizer": (str, "adam, adamw or sgd"),
    "temperature": (float, "factor of the logits of the motion flow"),
    "heads": (str, "how heads are combined: logits, features or probabilities"),
    "loss": (str, "released or paper; pairs is FastVMT's"),
    "flow_reference": (str, "argmax or soft displacement of the reference"),
    "span": (list[int] | int, "compare only frames at most this far apart, or [least, most] frames later"),
    "window": (int, "radius in tokens of the keys a query sees"),
    "tile": (
        list[int] | int,
        "with --window: it lies round the match of tiles of these tokens a side, or [rows, columns]",
    ),
    "distance_weights": (list[float], "weights of pairs of frames, [same frame, farthest]"),
    "tracking_weight": (float, "of FastVMT's tracking loss, with --tile"),
    "gradient_interval": (int, "compute gradients at every n-th guided step, and use the last one again at the others"),
    "optimiser_interval": (int, "compute gradients at every n-th step of the optimiser, and use the last one again"),
    "motion_channels": (float, "share of the channels that moft follows"),
    "word": (str, "word of the prompt whose object follows --path"),
    "path": (list[list[float]], "where it is: [[time, left, top, right, bottom], ...] in shares of the video"),
    "injection_blocks": (list[int] | int, "layers that get keys and values of the reference, such as [0]"),
    "gradient_checkpointing": (bool, "less memory, more time"),
    "guidance_scale": (float, "of classifier-free guidance"),
    "negative_prompt": (str, "what the new video shall not show"),
    "scheduler": (str, "class of diffusers, such as CogVideoXDPMScheduler"),
    "timestep_spacing": (str, "of the scheduler: trailing, leading or linspace"),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "reference", metavar="REFERENCE", help="video file, folder of frames, none, or a table of pairs"
    )
    parser.add_argument("prompt", nargs="?", default=None, metavar="PROMPT", help="what the new video shows")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results, made if need be")
    add_model_options(parser)
    parser.add_argument("--stored", default=None, metavar="FILE", help="inject the motion of an earlier transfer")
    parser.add_argument(
        "--region",
        type=str | list,
        default=None,
        metavar="MASK|BOX",
        help="where the motion is wanted; everywhere if left out",
    )
    parser.add_argument(
        "--elsewhere", default=None, metavar="FILE", help="with --stored and --region: stored motion for outside it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial noise")
    add_num_frames_option(parser, "of the new video; what fits the model if left out")
    add_size_option(parser, "of the new video in pixels, such as 480x720; what fits the model if left out")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N frames of the reference")
    parser.add_argument("--max-frames", type=int | None, default=None, metavar="N", help="read at most N frames")
    parser.add_argument("--stride", type=int | None, default=None, metavar="N", help="take every N-th of these frames")
    parser.add_argument(
        "--fps", type=float | None, default=None, help="rate the reference is resampled to, and of the new video"
    )
    parser.add_argument("--format", choices=["mp4", "gif", "frames"], default="mp4", help="of the videos written")
    parser.add_argument("--metrics", type=bool, default=True, help="track both videos and measure motion fidelity")
    parser.add_argument(
        "--clip", default=None, metavar="MODEL", help="also measure the prompt's cosine by this CLIP (folder or hub id)"
    )
    parser.add_argument(
        "--tracker",
        choices=["auto", "cotracker", "ours"],
        default="auto",
        help="of motion fidelity: CoTracker from torch's hub, the model itself, or CoTracker where it is here",
    )
    group = parser.add_argument_group("with a table of pairs")
    group.add_argument("--videos", default=None, metavar="DIR", help="where its videos are, such as DAVIS's pictures")
    group.add_argument(
        "--compare",
        choices=["table1", "blocks", "guided-share", "optimisation-steps", "temperature", "optimizer"],
        default=None,
        help="do all methods of DiTFlow's table 1, or all values of one of its ablations",
    )
    add_run_options(group)
    add_options(parser, _SETTINGS, "; the model's preset if left out")


def run(arguments: Namespace) -> int:
    from corrdit.integrations.diffusers.motion_transfer import MotionTransfer
    from corrdit.integrations.diffusers.motion_transfer.results_on_disk import (
        METRICS_FILE,
        chosen_tracker,
        write_transfer,
    )
    from corrdit.integrations.diffusers.placement import released_placement
    from corrdit.runs import refuse_other_record

    began = time.perf_counter()
    _check_kind(arguments)
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("height and width go together; give --size HEIGHTxWIDTH")
    if _is_table(arguments):
        return transfer_table(arguments, given_options(arguments, _SETTINGS))
    preset = checked_preset(arguments.preset)
    given, fps, known = _given(arguments)
    output_folder(arguments.output)
    tracker = chosen_tracker(arguments.tracker)
    released = released_placement(arguments.model, checked_device(arguments.device))
    backbone = loaded_backbone(arguments, preset, released)
    similarity = _similarity(arguments)
    transfer = MotionTransfer(backbone, **given_options(arguments, _SETTINGS))
    now = {"model": backbone.name, "settings": transfer.settings.described(), **known}
    refuse_other_record(Path(arguments.output) / METRICS_FILE, {**now, **named(arguments, "prompt", "seed")})
    # Beside the output folder, which appears only with its results.
    place = Path(arguments.output).absolute()
    state_file = place.parent / f".{short_name(place.name)}.transfer-state.safetensors"
    with OutputFolder(arguments.output) as folder, progress_bar("preparing") as show:
        result = transfer(
            prompt=arguments.prompt,
            **given,
            **named(arguments, "elsewhere", "seed", "num_frames", "height", "width"),
            state_file=state_file,
            keep_state=True,
            report=lambda done, steps, losses: show(done, steps, _loss_in_words(losses)),
            announce=_announcer(show),
        )
        measured = _measured(arguments, result, backbone, tracker, similarity, show)
        if "motion_fidelity" in measured:
            known["tracker"] = tracker
        show(0, None, phase="writing the results")
        names = write_transfer(
            folder, result, backbone, transfer.settings, prompt=arguments.prompt, fps=fps,
            file_format=arguments.format, measured=measured, known=known,
        )  # fmt: skip
    # The results are in their place: whoever is killed before goes on with the state.
    state_file.unlink(missing_ok=True)
    frames, height, width, _ = result.video.shape
    print(f"{frames} frames of {height} x {width} in {time.perf_counter() - began:.1f} s{_in_words(result, measured)}")
    for name in names:
        print(f"  {Path(arguments.output) / name}")
    return 0


def _given(arguments: Namespace) -> tuple[dict[str, Any], float, dict[str, object]]:
    """Reference, stored motion and region, the rate of the new video, and what metrics.json says of them."""
    from corrdit.array_files import content_digest
    from corrdit.integrations.diffusers.motion_transfer import StoredMotion

    stored = StoredMotion.load(arguments.stored) if arguments.stored is not None else None
    reference, fps, known = _reference(arguments)
    region = _region(arguments)
    known["region"] = region if region is None or isinstance(region, list) else content_digest(region)
    return {"reference": reference, "stored": stored, "region": region}, fps, known


def _similarity(arguments: Namespace) -> Callable[[np.ndarray, str], float] | None:
    from corrdit.motion import PromptSimilarity

    return None if arguments.clip is None else PromptSimilarity(arguments.clip, checked_device(arguments.device))


def _measured(
    arguments: Namespace,
    result: TransferResult,
    backbone: Backbone,
    tracker: str,
    similarity: Callable[[np.ndarray, str], float] | None,
    show: Report,
) -> dict[str, float]:
    """Motion fidelity by a tracker and the prompt's cosine, as far as they were asked for."""
    from corrdit.integrations.diffusers.motion_transfer.results_on_disk import fidelity_of, fidelity_tracker

    measured: dict[str, float] = {}
    if arguments.metrics and result.reference is not None:
        show(0, None, phase="tracking both videos")
        measured = fidelity_of(result, *fidelity_tracker(tracker, backbone, progress=show))
    if similarity is not None:
        show(0, None, phase="comparing with the prompt")
        measured["image_quality"] = similarity(result.video, arguments.prompt)
    return measured


def _is_table(arguments: Namespace) -> bool:
    return Path(arguments.reference).suffix.lower() in TABLE_SUFFIXES


def _check_kind(arguments: Namespace) -> None:
    """Raises ValueError for options of a table with one reference, and for a reference without a prompt."""
    if _is_table(arguments):
        return
    if arguments.prompt is None:
        raise ValueError("PROMPT is required with one reference: say what the new video shows")
    given = {"--videos": arguments.videos, "--compare": arguments.compare}
    given |= {"--processes": None if arguments.processes == 1 else arguments.processes}
    for option, value in given.items():
        if value is not None:
            accepted = ", ".join(TABLE_SUFFIXES)
            raise ValueError(f"{option} goes with a table of pairs ({accepted}), and {arguments.reference} is none")


def _announcer(show: Report) -> Callable[[str, TransferPlan], None]:
    """Says what will be done as the first phase begins, and moves the bar on to each."""
    said: list[TransferPlan] = []

    def announce(phase: str, plan: TransferPlan) -> None:
        if not said:
            said.append(plan)
            print(f"corrdit transfer: {plan}", file=sys.stderr, flush=True)
        show(0, plan.steps if phase == "denoising" else None, phase=phase)

    return announce


def _reference(arguments: Namespace) -> tuple[np.ndarray | None, float, dict[str, object]]:
    """The reference's frames, or None, the rate of the new video, and what metrics.json says of them."""
    from corrdit.arguments import whole_number
    from corrdit.array_files import content_digest
    from corrdit.integrations.diffusers.motion_transfer.reference import at_rate
    from corrdit.video import read_video
    from corrdit.video.info import DEFAULT_FPS

    if arguments.fps is not None and not arguments.fps > 0:
        raise ValueError(f"--fps must be above 0, got {arguments.fps}")
    known: dict[str, object] = {"call": named(arguments, "num_frames", "height", "width", "fps", "format")}
    for name in ("stored", "elsewhere"):
        if arguments[name] is not None:
            known[name] = file_digest(arguments[name])
    if arguments.reference == "none":
        if arguments.stored is None and arguments.method not in WITHOUT_REFERENCE:
            raise ValueError(
                "REFERENCE none goes with --stored FILE, the motion of an earlier transfer, or with --method "
                f"{', '.join(WITHOUT_REFERENCE)}; give one of them"
            )
        return None, arguments.fps or DEFAULT_FPS, known
    # How few frames are too few, the model says.
    video = read_video(arguments.reference, start=arguments.start, max_frames=arguments.max_frames, min_frames=1)
    stride = 1 if arguments.stride is None else whole_number("--stride", arguments.stride, 1)
    frames, times = video.frames[::stride], None if video.times is None else video.times[::stride]
    known |= {"reference": content_digest(frames)} | ({} if video.info.hdr is None else {"hdr": video.info.hdr})
    return *at_rate(frames, video.fps / stride, arguments.fps, times), known


def _region(arguments: Namespace) -> np.ndarray | list[Any] | None:
    """A region's mask, frame by frame as the reference is read, or the numbers of its box."""
    given: str | list[Any] | None = arguments.region
    if given is None or isinstance(given, list):
        return given
    from corrdit.integrations.diffusers.motion_transfer.region import region_of_file

    return region_of_file(given, stride=arguments.stride or 1, **named(arguments, "start", "max_frames", "fps"))


def _loss_in_words(losses: list[float]) -> str | None:
    """The loss of a guided step; None for the others, and where gradients were used again."""
    known = [loss for loss in losses if not math.isnan(loss)]
    return f"loss {known[-1]:.3f}" if known else None


def _in_words(result: TransferResult, measured: dict[str, float]) -> str:
    import numpy as np

    words = ""
    # Steps that use a gradient again have no loss.
    computed = [step for step in result.losses if not np.isnan(step).all()]
    if computed:
        words += f"; loss {computed[0][0]:.3f} to {np.nanmin(computed[-1]):.3f}"
    if "motion_fidelity" in measured:
        words += f"; motion fidelity {measured['motion_fidelity']:.2f}"
    return words
