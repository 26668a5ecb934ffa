"""Transfers a table of pairs on several processes; Lightning starts the others by running this file again.

Arguments: CSV file, model folder, output folder, number of processes. Every process adds its names to `OUTPUT.names`.
"""

import sys

import lightning
import torch

from corrdit.integrations.lightning import TransferDataModule, TransferModule


def main() -> None:
    table, model, output, processes = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    settings = {"steps": 2, "guided_share": 0.5, "optimisation_steps": 1, "blocks": (1,)}
    module = TransferModule(model, output=output, settings=settings, measure=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    found = trainer.predict(module, TransferDataModule(table, output=output))
    with open(f"{output}.names", "a", encoding="utf-8") as file:
        file.writelines(f"{trainer.global_rank} {result['name']}\n" for result in found or [])


if __name__ == "__main__":
    main()
