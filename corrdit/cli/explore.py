"""Explore the attention of a video in a browser: click a point of a frame and see where it is found.

reads   VIDEO: as `corrdit track` takes it. It goes through the model once, at the start
shows   a page at http://127.0.0.1:PORT, for this machine alone: the frames, and for a point that is clicked its cost
        map and best match in every frame and its attention to frames and words of --prompt, for two settings of layer,
        step and head side by side
writes  into the folder --output, for each click on "Save": point_NNN.png, what is shown, and point_NNN.py, the call
        that gives it

Ctrl-C ends it. Needs the extra `explore` (NiceGUI).
"""

from __future__ import annotations

import importlib.util
import socket
from typing import TYPE_CHECKING

from corrdit.cli.devices import named
from corrdit.cli.model_options import add_model_options, checked_preset, loaded_backbone, note_on_real_videos
from corrdit.cli.terminal import progress_bar

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

HELP = "click a point of a video in a browser and see its cost maps, track and attention"
USAGE = "VIDEO [--model embedded] [--prompt TEXT] [--steps 49 ...] [--output DIR] [options]"
EXAMPLES = (
    "corrdit explore my_video.mp4 --max-frames 8",
    'corrdit explore my_video.mp4 --prompt "a dog runs" --model cogvideox-2b --device cuda --layers [15,17]',
)
MAIN = (
    *("help", "help_all", "video", "output", "model", "device", "dtype", "preset", "prompt", "layers", "steps"),
    *("start", "max_frames", "port"),
)
HOST = "127.0.0.1"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="video file or folder of frames")
    parser.add_argument("--output", default="explored", metavar="DIR", help="folder for what is saved on the page")
    add_model_options(parser)
    parser.add_argument("--prompt", default="", help="what the video shows, for the attention on its words")
    parser.add_argument(
        "--layers", type=list[int] | None, default=None, help="layers to read, negative from the last; all if left out"
    )
    parser.add_argument(
        "--steps",
        type=list[int] | None,
        default=None,
        help="denoising steps to read, negative from the last; the preset's if left out",
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="skip the first N frames")
    parser.add_argument("--max-frames", type=int | None, default=None, metavar="N", help="read at most N frames")
    parser.add_argument("--port", type=int, default=8080, help="of the page; 0 takes a free one")


def run(arguments: Namespace) -> int:
    if importlib.util.find_spec("nicegui") is None:
        raise ValueError('the page needs NiceGUI, which is not installed; pip install ".[explore]" in a checkout')
    port = free_port(arguments.port)
    from corrdit.files import output_folder
    from corrdit.integrations.diffusers.analysis import explore
    from corrdit.video import StreamedVideo

    output_folder(arguments.output)
    video = StreamedVideo(arguments.video, max_side=720, **named(arguments, "start", "max_frames"))
    backbone = loaded_backbone(arguments, checked_preset(arguments.preset))
    note_on_real_videos(arguments.model, "explore")
    asked = named(arguments, "layers", "steps", "prompt")
    with progress_bar("reading") as report:
        exploration = explore(backbone, video, **asked, progress=report)
    from corrdit.cli.explore_page import serve

    call = {"video": arguments.video, "model": arguments.model, **named(arguments, "start", "max_frames"), **asked}
    serve(exploration, call, output=arguments.output, host=HOST, port=port)
    return 0


def free_port(port: int) -> int:
    """The port itself if it can be bound, or a free one for 0.

    Raises:
        ValueError: no port, or one that something else listens on.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is no port; accepted are 1 to 65535, or 0 for a free one")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"--port {port} cannot be used ({error.strerror}); give another, or 0") from error
        return int(probe.getsockname()[1])
