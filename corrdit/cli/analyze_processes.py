"""`corrdit analyze` over several processes: Lightning shares the videos out."""

from __future__ import annotations

from typing import Any

from corrdit.cli.devices import checked_device, checked_dtype
from corrdit.cli.lightning_runs import command_trainer, predict, quiet_lightning
from corrdit.cli.model_options import checked_preset


def analyze_in_processes(
    arguments: Any, backbone: Any, items: list[Any], options: Any, settings: dict[str, Any]
) -> bool:
    """Analyse the videos that are left; whether this process is the first, which writes the report."""
    device = checked_device(arguments.device)
    kind = "cpu" if device is None else device.type
    with quiet_lightning():
        from corrdit.integrations.lightning.analysis import AnalysisDataModule, AnalysisModule

        data = AnalysisDataModule(items, output=arguments.output)
        given = {name: getattr(options, name) for name in options.described()}
        module = AnalysisModule(
            backbone if kind == "cpu" else arguments.model,
            output=arguments.output,
            model_preset=None if kind == "cpu" else checked_preset(arguments.preset),
            protocol=arguments.protocol,
            options=given,
            source=settings["source"],
            dtype=checked_dtype(arguments.dtype),
        )
        module.settings["model"] = settings["model"]
        accelerator = "gpu" if kind == "cuda" else kind
        trainer = command_trainer(several=True, accelerator=accelerator, devices=arguments.processes)
        predict(trainer, module, data)
        trainer.strategy.barrier("every process has done its videos")
    return bool(trainer.is_global_zero)
