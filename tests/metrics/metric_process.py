"""One process of a distributed TAP-Vid evaluation.

Arguments: rank, number of processes, rendezvous file, data file, result file.
"""

import json
import sys

import numpy as np
import torch

from corrdit.metrics import TapVidMetric


def main() -> None:
    rank, processes = int(sys.argv[1]), int(sys.argv[2])
    rendezvous, data, result = sys.argv[3:6]
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    with np.load(data) as archive:
        arrays = [archive[name] for name in ("query", "occluded", "tracks", "guessed_occluded", "guessed_tracks")]
    metric = TapVidMetric("first")
    videos = len(arrays[0])
    for video in range(rank, videos, processes):
        metric.update(*(array[video : video + 1] for array in arrays), videos=[f"video {video}"])
    if rank == 0:
        metric.update(*(array[:1] for array in arrays), videos=["video 0"])
    figures = {key: float(value) for key, value in metric.compute().items()}
    if rank == processes - 1:
        with open(result, "w", encoding="utf-8") as file:
            json.dump(figures, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
