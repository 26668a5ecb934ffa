"""Running a recipe: read it, train with checkpoints and logs, resume after a kill, export the averaged weights."""

import dataclasses
import json
import logging
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from importlib import resources
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from corrdit.integrations.diffusers.embedded.loading import PRESET_FILE
from corrdit.integrations.diffusers.embedded.pipeline import build_pipeline
from corrdit.integrations.lightning.model_card import model_card
from corrdit.integrations.lightning.training import EmbeddedTraining, TrainingConfig, WorldDataModule

_LOG = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"


def load_recipe(name: str, steps: int | None = None) -> TrainingConfig:
    """A recipe shipped with the package by name, or from a YAML file. Raises ValueError if there is neither."""
    shipped = resources.files("corrdit.integrations.diffusers.embedded") / "recipes"
    names = sorted(item.name.removesuffix(".yaml") for item in shipped.iterdir() if item.name.endswith(".yaml"))
    if name in names:
        text = (shipped / f"{name}.yaml").read_text(encoding="utf-8")
    elif pathlib.Path(name).is_file():
        text = pathlib.Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"no recipe {name!r}: give one of {', '.join(names)} or the path of a YAML file")
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {name!r} must be a YAML mapping, got {type(values).__name__}")
    config = TrainingConfig.from_dict(values)
    return config if steps is None else dataclasses.replace(config, steps=steps)


def newest_checkpoint(output: pathlib.Path) -> pathlib.Path:
    """The checkpoint with the most steps in a run's folder. Raises FileNotFoundError if there is none."""
    found = sorted((output / _CHECKPOINTS).glob("step-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
    if not found:
        raise FileNotFoundError(f"{output / _CHECKPOINTS} holds no step-*.ckpt; train first, without --resume")
    return found[-1]


def _loggers(output: pathlib.Path, resumed: bool) -> list[Logger]:
    versions = [path for path in (output / "logs").glob("part_*")]
    part = f"part_{len(versions)}" if resumed else "part_0"
    loggers: list[Logger] = [CSVLogger(output, name="logs", version=part, flush_logs_every_n_steps=20)]
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(output, name="tensorboard", version=part))
    except ModuleNotFoundError:
        _LOG.info("tensorboard is not installed; the run logs to CSV only")
    return loggers


def train(
    config: TrainingConfig,
    output: pathlib.Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 200,
    threads: int | None = None,
    processes: int = 1,
    minutes: float | None = None,
    callbacks: list[Callback] | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> EmbeddedTraining:
    """Train a recipe in a folder, with checkpoints/step-*.ckpt and logs/part_*/metrics.csv.

    resume: go on from the newest checkpoint; the rest of the run is the same as without the interruption.
    processes: data-parallel processes; two with one thread each are faster on two busy cores than one with two threads.
    minutes: stop after this long; the run can be resumed.
    stop_after: stop at this step although the recipe (and its learning-rate schedule) is longer.
    Raises FileNotFoundError if there is nothing to resume and ValueError if a fresh run would overwrite one.
    """
    checkpoint = newest_checkpoint(output) if resume else None
    if not resume and checkpoint_exists(output):
        raise ValueError(f"{output} already holds checkpoints; resume that run or give another folder")
    if threads is not None:
        torch.set_num_threads(threads)
    saver = ModelCheckpoint(
        dirpath=output / _CHECKPOINTS,
        filename="step-{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=checkpoint_every,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        precision=config.precision,  # type: ignore[arg-type]
        max_steps=min(config.steps, stop_after or config.steps),
        max_epochs=-1,
        max_time=None if minutes is None else timedelta(minutes=minutes),
        gradient_clip_val=config.clip,
        logger=_loggers(output, resume),
        callbacks=[saver, *(callbacks or [])],
        log_every_n_steps=1,
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=output,
    )
    module = EmbeddedTraining(config)
    trainer.fit(module, WorldDataModule(config), ckpt_path=checkpoint, weights_only=True)
    if trainer.global_step % checkpoint_every:
        trainer.save_checkpoint(output / _CHECKPOINTS / f"step-{trainer.global_step}.ckpt")
    return module


def checkpoint_exists(output: pathlib.Path) -> bool:
    """Whether a run's folder holds any checkpoint."""
    return any((output / _CHECKPOINTS).glob("step-*.ckpt"))


def load_checkpoint(checkpoint: pathlib.Path) -> EmbeddedTraining:
    """The training module of a checkpoint, weights and average."""
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    module = EmbeddedTraining(TrainingConfig.from_dict(state["hyper_parameters"]))
    module.load_state_dict(state["state_dict"])
    return module


def export_checkpoint(
    checkpoint: pathlib.Path,
    folder: pathlib.Path,
    *,
    preset: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    notes: str = "",
) -> pathlib.Path:
    """Write the averaged weights as a float16 diffusers pipeline folder that `load_embedded_pipeline` reads, with a
    card.

    preset: where to read correspondence, written as preset.json; measured and notes: for the model card.
    The folder is replaced as a whole, only after everything is written.
    """
    module = load_checkpoint(checkpoint)
    steps = int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])
    pipe = build_pipeline(module.average.to(torch.float16))
    parameters = sum(weight.numel() for weight in module.average.parameters())
    card = model_card(dict(module.hparams), steps, parameters, measured=measured, notes=notes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        fresh = pathlib.Path(work) / "pipeline"
        pipe.save_pretrained(str(fresh), safe_serialization=True)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if preset is not None:
            (fresh / PRESET_FILE).write_text(json.dumps(dict(preset), indent=2) + "\n", encoding="utf-8")
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)
        if folder.exists():
            shutil.rmtree(folder)
        fresh.replace(folder)
    return folder
