"""Running Lightning's Trainer from a command: quiet, patient between processes, and with Ctrl-C as everywhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

LONGEST_WAIT = timedelta(days=7)
"""How long a process that is done waits for the others; torch's own limit of half an hour is less than one video."""


def command_trainer(*, several: bool, accelerator: str, devices: int | str | list[int], num_nodes: int = 1) -> Trainer:
    """A Trainer that keeps nothing of its own, as the commands use it.

    Args:
        several: more than one process takes part, so that one which is done has to wait for the others.
        accelerator, devices, num_nodes: as the Trainer takes them.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    return Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=DDPStrategy(timeout=LONGEST_WAIT) if several else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
    )


def predict(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> None:
    """`Trainer.predict`; Lightning turns Ctrl-C into an exit with status 1, here it is Ctrl-C again."""
    try:
        trainer.predict(module, data, return_predictions=False)
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the lines in which Lightning lists the machine and recommends more workers."""
    import lightning.pytorch  # noqa: F401  (sets the levels of its loggers when it is imported)

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            # Of a training that goes on, in the folder of its checkpoints.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty.*")
            # Of a folder in which everything is done; the command says so itself.
            warnings.filterwarnings("ignore", message=".*across ranks is zero.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
