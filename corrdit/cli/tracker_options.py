"""The options of `PointTracker` on the command line; each left out keeps what the preset says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corrdit.cli.devices import OptionTable, add_options, given_options
from corrdit.cli.frame_options import add_size_option

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_OPTIONS: OptionTable = {
    "layer": (int, "attention block whose queries and keys are matched, counted from 0 (see `corrdit models`)"),
    "layers": (tuple[int, ...], "several blocks in place of --layer, such as [4,5]"),
    "step": (int, "denoising step, counted from 0 or from the end by a negative number"),
    "steps": (tuple[int, ...], "several steps in place of --step, such as [-1,-3]"),
    "fusion": (str, "how several layers and steps become one: heads (side by side) or channels (joined, as released)"),
    "inference_steps": (int, "steps of the schedule that --step counts"),
    "noise": (bool, "give the latents the noise of that step"),
    "seed": (int, "of that noise"),
    "inversion": (str, "bring latents to the noisy steps by inversion: ddim, or released (DiffTrack)"),
    "denoise_from": (int, "step to which latents are brought, and from which they are denoised to --step or --steps"),
    "image": (str, "frames an image-to-video model is given: first, or all (as released)"),
    "heads": (str, "what is averaged over heads: probabilities, logits, or features for none"),
    "head_weights": (list[float], "weights of the heads, such as [1,0,0,0]"),
    "combine": (str, "costs, or median: the median of the positions that every head finds by itself"),
    "temperature": (float, "factor of the attention logits; larger makes matches sharper"),
    "low_pass": (float, "standard deviation in tokens of a low-pass filter on queries and keys; 0 for none"),
    "matched": (str, "what is matched with keys: queries, or keys (by their cosine)"),
    "channels_out": (tuple[int, ...], "channels of the heads that are left out, such as [0,1]; [] for none"),
    "bidirectional": (bool, "use the softmax over source tokens too"),
    "rounding": (str, "none, or bfloat16: costs as in DiffTrack's released runs, where near candidates tie"),
    "backend": (str, "of the attention operations: auto, triton, streaming or reference"),
    "memory_budget": (int, "bytes an attention operation may use beyond its inputs and outputs"),
    "frames_per_chunk": (int, "frames in one forward pass, the query's frame included"),
    "schedule": (str, "how frames are put into chunks: spread, interleaved, consecutive or chained"),
    "stride": (int, "frames between the starts of consecutive chunks"),
    "interval": (int, "frames from one to the next within an interleaved chunk"),
    "average_overlap": (bool, "average the costs of frames that several chunks hold"),
    "tokens_per_frame": (int, "most tokens a frame is encoded to, in place of a size"),
    "resize_first": (tuple[int, int], "size [height,width] frames are brought to before they are encoded"),
    "antialias": (bool, "resize frames with antialiasing"),
    "posterior": (str, "latents of the codec: mode (the most likely), or sample (drawn, as released)"),
    "refine": (int, "radius in tokens within which a match is refined; 0 keeps the best token"),
    "crops": (
        tuple[float, ...],
        "scales of crops in which points are looked at again, as [0.5,0.25]; [] for none",
    ),
    "crop_tokens": (int, "tokens of a crop's side"),
    "path_spread": (float, "tokens from the path so far within which a match is preferred; 0: every frame by itself"),
    "update": (float, "share by which a point's features become those of where it was found, frame by frame; 0: never"),
    "frames_per_block": (int, "frames followed together, which bounds the memory for long videos"),
    "geometry": (str, "how tokens and pixels correspond: centers or released"),
    "visibility": (str, "consistency (the match back must lead to the query) or all (every point is called visible)"),
    "tolerance": (float, "largest distance in tokens between a query and its match back for a visible point"),
    "crop_tolerance": (float, "the same in tokens of the crops"),
}


def add_tracker_options(parser: ArgumentParser) -> None:
    """One option for each field of `TrackerOptions`, all of them unset."""
    group = parser.add_argument_group("tracker options (default: what --preset and the model say)")
    add_size_option(group, "at which frames are encoded, such as 480x720")
    add_options(group, _OPTIONS)


def given_tracker_options(arguments: Namespace) -> dict[str, Any]:
    """The options that were given, by their names in `TrackerOptions`."""
    given = {**given_options(arguments, _OPTIONS), **given_options(arguments, ("height", "width"))}
    for name in ("layers", "steps"):
        if name in given and not given[name]:
            raise ValueError(f"--{name} [] names none; give at least one, such as --{name} [4,5], or leave it out")
    return given
