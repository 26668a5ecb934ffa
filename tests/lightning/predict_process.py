"""Tracks a folder of videos on several processes; Lightning starts the other processes by running this file again.

Arguments: folder of videos, output folder, number of processes, and optionally a video at which its process is killed.
Every process adds a line to the file `OUTPUT.counts`: the number of videos it did.
"""

import os
import signal
import sys

import lightning
import torch

from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.lightning import TrackingModule, VideoDataModule


class Killed(TrackingModule):
    """A module whose process dies without warning when it comes to a given video."""

    last_words = ""

    def predict_step(self, batch, batch_idx):
        if batch["name"] == self.last_words:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict_step(batch, batch_idx)


def main() -> None:
    folder, output, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    options = {"backend": "reference"}
    module = Killed(tiny_backbone("cogvideox-rotary"), output=output, queries=3, pictures=False, options=options)
    module.last_words = sys.argv[4] if len(sys.argv) > 4 else ""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.predict(module, VideoDataModule(folder, output=output), return_predictions=False)
    with open(f"{output}.counts", "a", encoding="utf-8") as file:
        file.write(f"{trainer.predict_loop.batch_progress.current.completed}\n")
    trainer.strategy.barrier("all videos done")


if __name__ == "__main__":
    main()
