"""LightningModules that hold video models in the ways people do, and batches for them."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from corrdit.integrations.diffusers.testing.tiny_models import tiny_generation, tiny_pipeline

FRAMES, SIZE = 3, 8


class GeneratingModule(lightning.LightningModule):
    """Holds a pipeline; a batch is a seed to generate from."""

    def __init__(self, name: str = "cogvideox-rotary") -> None:
        super().__init__()
        self.family = name
        self.pipe = tiny_pipeline(name)
        self.generated: list[torch.Tensor] = []

    def generate(self, seed: torch.Tensor) -> torch.Tensor:
        frames = generated(self.pipe, self.family, seed)
        self.generated.append(frames)
        return frames

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.generate(batch)

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.generate(batch)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.generate(batch)


def generated(pipe: Any, family: str, seed: torch.Tensor) -> torch.Tensor:
    """Latents of a tiny pipeline of the family."""
    return pipe(**tiny_generation(family, steps=3, seed=int(seed))).frames


class DenoisingModule(lightning.LightningModule):
    """Holds a bare transformer and trains it to return its input; a batch has latents, timesteps and truth."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = tiny_pipeline("cogvideox").transformer.train()
        self.losses: list[float] = []

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        text = torch.zeros(len(batch["latents"]), 8, self.transformer.config.text_embed_dim)
        output = self.transformer(batch["latents"], text, batch["timestep"], return_dict=False)[0]
        return (output - batch["latents"]).square().mean()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SeveralLoadersModule(DenoisingModule):
    """Validates, tests and predicts on several dataloaders, whose number Lightning gives it."""

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loss(batch)

    test_step = predict_step = validation_step


def single_latents(count: int, batch_size: int | None, seed: int = 0, **options: Any) -> DataLoader:
    """Random latents `[F, C, h, w]`, each with a timestep of its own, for the loader to put into batches."""
    source = torch.Generator().manual_seed(seed)
    items = [
        {"latents": torch.randn(FRAMES, 4, SIZE, SIZE, generator=source), "timestep": torch.tensor(100 * seed + index)}
        for index in range(count)
    ]
    return DataLoader(items, batch_size=batch_size, **options)


def latent_batches(count: int, seed: int = 0, batch_size: int = 2) -> DataLoader:
    """Batches of random latents `[B, F, C, h, w]` with timesteps, and tracks of a video of twice their size."""
    source = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tracks = torch.rand(batch_size, FRAMES, 20, 2, generator=source) * 2 * SIZE
        batches.append(
            {
                "latents": torch.randn(batch_size, FRAMES, 4, SIZE, SIZE, generator=source),
                "timestep": torch.randint(0, 1000, (batch_size,), generator=source),
                "tracks": tracks,
                "visible": torch.rand(batch_size, FRAMES, 20, generator=source) < 0.9,
                "video": torch.zeros(batch_size, 3, 2 * SIZE, 2 * SIZE),
            }
        )
    return DataLoader(batches, batch_size=None)


def seeds(count: int) -> DataLoader:
    """Batches that are seeds."""
    return DataLoader(list(torch.arange(count)), batch_size=None)
