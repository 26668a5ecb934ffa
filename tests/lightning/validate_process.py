"""Validates a generating module on several processes with the callback; arguments: log folder, number of processes."""

import importlib.util
import pathlib
import sys

import lightning
from lightning.pytorch.loggers import CSVLogger

from corrdit.integrations.lightning import CorrespondenceCallback


def main() -> None:
    folder, processes = sys.argv[1], int(sys.argv[2])
    path = pathlib.Path(__file__).with_name("held_models.py")
    spec = importlib.util.spec_from_file_location("held_models", path)
    held = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp",
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[CorrespondenceCallback(layers=[0, 1], pictures=2)],
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.validate(held.GeneratingModule(), held.seeds(3))
    trainer.validate(held.SeveralLoadersModule(), [held.single_latents(5, 2), held.single_latents(1, 2, seed=1)])


if __name__ == "__main__":
    main()
