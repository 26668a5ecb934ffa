"""Tests a TrackingModule on several processes; Lightning starts the others by running this file again.

Arguments: TAP-Vid file, JSON file for what is logged, number of processes.
"""

import json
import sys

import lightning
import torch

from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone
from corrdit.integrations.lightning import TapVidDataModule, TrackingModule


def main() -> None:
    data, output, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    options = {"backend": "reference", "height": 32, "width": 48, "layer": 0}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = TrackingModule(tiny_backbone("cogvideox-rotary"), output=f"{output}.folder", options=options)
    (logged,) = trainer.test(module, TapVidDataModule(data), verbose=False)
    if trainer.is_global_zero:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(logged, file)


if __name__ == "__main__":
    main()
