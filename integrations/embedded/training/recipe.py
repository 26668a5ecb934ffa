"""Running a recipe: read it, train with checkpoints and logs, resume after a kill, export the averaged weights."""

import dataclasses
import json
import logging
import pathlib
import re
from datetime import timedelta

import lightning
import torch
import yaml
from diffusers import CogVideoXTransformer3DModel
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger, Logger

from corrdit.arguments import whole_number
from corrdit.files import OutputFolder, refuse_nested_aliases, write_json
from corrdit.integrations.embedded.loading import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import build_pipeline
from corrdit.integrations.embedded.preset import PRESET_FILE, WEIGHTS, read_preset
from corrdit.integrations.embedded.training.model_card import Json, model_card
from corrdit.integrations.embedded.training.module import EmbeddedTraining, TrainingConfig, WorldDataModule
from corrdit.integrations.embedded.world.photographs import Photographs
from corrdit.memory import is_out_of_memory
from corrdit.runs import refuse_other_settings

_LOG = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
_CHECKPOINT_NAME = re.compile(r"step-(\d+)(-v\d+)?\.ckpt")
_CHECKPOINT_ENTRIES = ("hyper_parameters", "state_dict", "optimizer_states", "global_step", "pytorch-lightning_version")
_MAY_CHANGE = ("steps", "workers")
_MOST_MINUTES = 1e6


def load_recipe(name: str, steps: int | None = None) -> TrainingConfig:
    """A recipe shipped with the package by name, or from a YAML file.

    Raises ValueError if there is neither, and for a file that is no recipe.
    """
    shipped = pathlib.Path(__file__).parent / "recipes"
    names = sorted(item.name.removesuffix(".yaml") for item in shipped.iterdir() if item.name.endswith(".yaml"))
    if name in names:
        contents = (shipped / f"{name}.yaml").read_bytes()
    elif pathlib.Path(name).is_file():
        contents = pathlib.Path(name).read_bytes()
    else:
        raise ValueError(f"no recipe {name!r}: give one of {', '.join(names)} or the path of a YAML file")
    refuse_nested_aliases(contents, f"the recipe {name!r}")
    try:
        values = yaml.safe_load(contents)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe {name!r} is not a YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"the recipe {name!r} must be a YAML mapping, got {type(values).__name__}")
    config = TrainingConfig.from_dict(values)
    return config if steps is None else dataclasses.replace(config, steps=steps)


def newest_checkpoint(output: pathlib.Path) -> pathlib.Path:
    """The checkpoint with the most steps in a run's folder. Raises FileNotFoundError if there is none."""
    if not (found := _checkpoints(output)):
        raise FileNotFoundError(f"{output / _CHECKPOINTS} holds no step-*.ckpt; train first, without --resume")
    return max(found, key=lambda path: (int(path.stem.split("-")[1]), path.stat().st_mtime))


def _checkpoints(output: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in (output / _CHECKPOINTS).glob("step-*.ckpt") if _CHECKPOINT_NAME.fullmatch(path.name)]


def _loggers(output: pathlib.Path, resumed: bool) -> list[Logger]:
    parts = [int(path.name.removeprefix("part_")) for path in (output / "logs").glob("part_[0-9]*")]
    part = f"part_{max(parts, default=-1) + 1}" if resumed else "part_0"
    loggers: list[Logger] = [CSVLogger(output, name="logs", version=part, flush_logs_every_n_steps=20)]
    try:
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(output, name="tensorboard", version=part))
    except ModuleNotFoundError:
        _LOG.info("tensorboard is not installed; the run logs to CSV only")
    return loggers


class _PieceTimer(Timer):
    """Stops a piece of a run after a while. Lightning's own timer goes on counting where the checkpoint's was, so that
    every further piece would end at once."""

    def state_dict(self) -> dict[str, object]:
        """Nothing: each piece has all of its time."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Leave the clock at zero."""


def _callbacks(output: pathlib.Path, checkpoint_every: int, minutes: float | None) -> list[Callback]:
    saver = ModelCheckpoint(
        dirpath=output / _CHECKPOINTS,
        filename="step-{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=checkpoint_every,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    return [saver] if minutes is None else [saver, _PieceTimer(timedelta(minutes=minutes))]


def train(
    config: TrainingConfig,
    output: pathlib.Path,
    *,
    resume: bool = False,
    start: str | pathlib.Path | None = None,
    photographs: str | pathlib.Path | None = None,
    checkpoint_every: int = 200,
    threads: int | None = None,
    processes: int = 1,
    minutes: float | None = None,
    callbacks: list[Callback] | None = None,
    stop_after: int | None = None,
    progress: bool = True,
) -> EmbeddedTraining:
    """Train a recipe in a folder, with checkpoints/step-*.ckpt and logs/part_*/metrics.csv.

    start: the folder of a pipeline, as another run's `pipeline`, whose weights a fresh run begins with; "embedded"
    for the shipped ones. Its preset.json is kept beside the checkpoints, for the export.
    photographs: a folder of pictures, for a recipe with a share of `pictures`.
    resume: go on from the newest checkpoint; the rest of the run is the same as without the interruption. The recipe
    must be that of the checkpoint, but for `steps` and `workers`.
    processes: data-parallel processes; two with one thread each are faster on two busy cores than one with two threads.
    minutes: stop after this long, counted for each call; the run can be resumed.
    stop_after: stop at this step although the recipe (and its learning-rate schedule) is longer.
    Raises FileNotFoundError if there is nothing to resume and ValueError if a fresh run would overwrite one, for a
    damaged checkpoint, for one of another recipe or with more steps, and for numbers out of range.
    """
    _check_numbers(config, checkpoint_every, threads, processes, minutes, stop_after)
    _check_beginning(output, resume, start)
    data = _data(config, photographs)
    config = data.config
    checkpoint = newest_checkpoint(output) if resume else None
    if checkpoint is not None:
        _check_resumable(config, output, checkpoint)
    module = EmbeddedTraining(config)
    if start is not None:
        module.begin_with(_trained(start))
    if not resume:
        _keep_preset(start, output)
    if threads is not None:
        torch.set_num_threads(threads)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        precision=config.precision,  # type: ignore[arg-type]
        max_steps=min(config.steps, stop_after or config.steps),
        max_epochs=-1,
        gradient_clip_val=config.clip,
        logger=_loggers(output, resume),
        callbacks=[*_callbacks(output, checkpoint_every, minutes), *(callbacks or [])],
        log_every_n_steps=1,
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=output,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if trainer.global_step % checkpoint_every:
        trainer.save_checkpoint(output / _CHECKPOINTS / f"step-{trainer.global_step}.ckpt")
    return module


def _check_beginning(output: pathlib.Path, resume: bool, start: str | pathlib.Path | None) -> None:
    """Raises ValueError for a folder in which a run cannot begin or go on as asked for."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"the output folder {output} is a file; give a folder, which is made if need be")
    if resume and start is not None:
        raise ValueError("start is where a fresh run begins and resume goes on with an earlier one; give one of them")
    if not resume and _checkpoints(output):
        raise ValueError(f"{output} already holds checkpoints; resume that run or give another folder")


def _data(config: TrainingConfig, photographs: str | pathlib.Path | None) -> WorldDataModule:
    """The videos of a recipe, which gets the digest of the photographs."""
    if photographs is not None and not config.videos * config.pictures:
        raise ValueError(
            f"photographs are given ({photographs}) and the recipe shows none (pictures: {config.pictures:g}, videos: "
            f"{config.videos:g}); leave them out, or give a recipe that does, such as varied"
        )
    pictures = None if photographs is None else Photographs(photographs)
    return WorldDataModule(dataclasses.replace(config, photographs=pictures.digest if pictures else ""), pictures)


def _start_folder(start: str | pathlib.Path) -> pathlib.Path:
    return WEIGHTS if str(start) == "embedded" else pathlib.Path(start)


def _trained(start: str | pathlib.Path) -> CogVideoXTransformer3DModel:
    """The transformer that a run begins with."""
    return load_embedded_pipeline(_start_folder(start)).transformer


def _keep_preset(start: str | pathlib.Path | None, output: pathlib.Path) -> None:
    """What a run ends with is read where the weights it begins with are."""
    kept = output / PRESET_FILE
    if start is not None and (_start_folder(start) / PRESET_FILE).is_file():
        output.mkdir(parents=True, exist_ok=True)
        write_json(kept, read_preset(_start_folder(start)))
    else:
        kept.unlink(missing_ok=True)


def _check_numbers(
    config: TrainingConfig,
    checkpoint_every: int,
    threads: int | None,
    processes: int,
    minutes: float | None,
    stop_after: int | None,
) -> None:
    whole_number("checkpoint_every", checkpoint_every, 1)
    whole_number("processes", processes, 1)
    for name, value in (("threads", threads), ("stop_after", stop_after)):
        if value is not None:
            whole_number(name, value, 1)
    if minutes is not None and not 0 < minutes <= _MOST_MINUTES:
        raise ValueError(f"minutes must be more than 0 and at most {_MOST_MINUTES:.0f}, got {minutes!r}")
    if config.batch_size % processes:
        raise ValueError(f"batch_size {config.batch_size} cannot be shared evenly by {processes} processes")


def load_checkpoint(checkpoint: pathlib.Path) -> EmbeddedTraining:
    """The training module of a checkpoint, weights and average. Raises ValueError for a damaged or foreign file."""
    return _module_and_steps(checkpoint)[0]


def _module_and_steps(checkpoint: pathlib.Path) -> tuple[EmbeddedTraining, int]:
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged archives and pickles fail in any way that torch's reader can
        if is_out_of_memory(error):
            raise
        raise _no_checkpoint(checkpoint, f"it cannot be read, {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(name in state for name in _CHECKPOINT_ENTRIES):
        raise _no_checkpoint(checkpoint, f"it must hold {', '.join(_CHECKPOINT_ENTRIES)}")
    try:
        module = EmbeddedTraining(TrainingConfig.from_dict(dict(state["hyper_parameters"])))
    except (TypeError, ValueError) as error:
        raise _no_checkpoint(checkpoint, f"its recipe is none: {error}") from error
    try:
        module.load_state_dict(state["state_dict"])
    except (AttributeError, TypeError, RuntimeError) as error:
        raise _no_checkpoint(checkpoint, "its weights are not those of its recipe") from error
    return module, int(state["global_step"])


def _no_checkpoint(checkpoint: pathlib.Path, reason: str) -> ValueError:
    return ValueError(
        f"{checkpoint} is damaged or no checkpoint of this training ({reason}); remove it to take the one before"
    )


def _check_resumable(config: TrainingConfig, output: pathlib.Path, checkpoint: pathlib.Path) -> None:
    """Raises ValueError where a run could not go on from a checkpoint as it was meant."""
    module, steps = _module_and_steps(checkpoint)
    earlier, now = (dataclasses.asdict(recipe) for recipe in (module.config, config))
    refuse_other_settings(output, earlier, {name: now[name] for name in now if name not in _MAY_CHANGE})
    if steps > config.steps:
        raise ValueError(
            f"{checkpoint} has {steps} steps, more than the recipe's {config.steps}; give as many with --steps, or "
            "--export-only"
        )


def refuse_other_folder(folder: pathlib.Path) -> None:
    """Raises ValueError for a folder that an export would replace although it holds no exported pipeline."""
    taken = folder.exists() and not (folder / "model_index.json").is_file()
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is where the pipeline is exported to and holds something else; move that away or give another "
            "output folder"
        )


def export_checkpoint(
    checkpoint: pathlib.Path,
    folder: pathlib.Path,
    *,
    preset: Json | None = None,
    measured: Json | None = None,
    notes: str = "",
) -> pathlib.Path:
    """Write the averaged weights as a float16 diffusers pipeline folder that `load_embedded_pipeline` reads, with a
    card.

    preset: where to read correspondence, written as preset.json; that of the weights the run began with by default.
    measured and notes: for the model card.
    The folder is replaced as a whole, only after everything is written. Raises ValueError for a damaged or foreign
    checkpoint, for weights that are not finite, and for a folder that holds anything but an exported pipeline.
    """
    refuse_other_folder(folder)
    module, steps = _module_and_steps(checkpoint)
    if preset is None and (checkpoint.parents[1] / PRESET_FILE).is_file():
        preset = read_preset(checkpoint.parents[1])
    pipe = build_pipeline(module.average.to(torch.float16))
    if not all(bool(weight.isfinite().all()) for weight in module.average.parameters()):
        raise ValueError(
            f"the averaged weights of {checkpoint} are not finite in float16: the run diverged; train again "
            "with a lower learning_rate"
        )
    parameters = sum(weight.numel() for weight in module.average.parameters())
    card = model_card(dict(module.hparams), steps, parameters, measured=measured, notes=notes)
    with OutputFolder(folder, whole=True) as fresh:
        pipe.save_pretrained(str(fresh), safe_serialization=True)
        (fresh / "README.md").write_text(card, encoding="utf-8")
        if preset is not None:
            (fresh / PRESET_FILE).write_text(json.dumps(dict(preset), indent=2) + "\n", encoding="utf-8")
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)
    return folder
