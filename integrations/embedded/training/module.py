"""Training of the embedded video diffusion transformer on the generated world, by Lightning.

The data follow from the seed and the number of the step alone: a run that was killed and resumed sees the same
videos, noise and timesteps as one that was not, and logs the same losses.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any, TypedDict

import lightning
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from corrdit.arguments import choice, whole_number
from corrdit.integrations.embedded.pipeline import (
    build_pipeline,
    build_transformer,
    check_transformer,
    rotary_positions,
)
from corrdit.integrations.embedded.training.muon import MuonWithAdamW
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, PROMPT_KINDS, WorldConfig, describe, render
from corrdit.integrations.embedded.world.photographs import Photographs
from corrdit.integrations.embedded.world.variety import Variety

PRECISIONS = ("bf16-mixed", "32-true", "16-mixed")
_WHOLE_NUMBERS = {"seed": 0, "steps": 1, "batch_size": 1, "warmup": 0, "workers": 0}
_NUMBERS = {
    "learning_rate": (0.0, math.inf),
    "matrix_rate": (0.0, math.inf),
    "slowing_share": (0.001, 1.0),
    "final_rate": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "clip": (0.0, math.inf),
    "average_decay": (0.0, 1.0),
    "empty_prompts": (0.0, 1.0),
    "part_prompts": (0.0, 1.0),
    "videos": (0.0, 1.0),
    "pictures": (0.0, 1.0),
    "bending": (0.0, 1.0),
    "appearance": (0.0, 1.0),
}


def _number(name: str, value: Any, least: float, most: float) -> float:
    """A number in a range; text too, because YAML's 1e-3 is text to PyYAML."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (least <= number <= most and math.isfinite(number)):
        accepted = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a number {accepted}, got {value!r}")
    return number


def _shapes(value: object) -> tuple[tuple[int, int, int], ...]:
    """The shapes of a recipe as tuples of whole numbers."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"shapes must be a list of at least one [frames, height, width], got {value!r}")
    for shape in value:
        if not isinstance(shape, (list, tuple)) or len(shape) != 3:
            raise ValueError(f"shapes must be a list of [frames, height, width], got {shape!r} in it")
        for name, size, least in zip(("frames", "height", "width"), shape, (1, 8, 8), strict=True):
            whole_number(f"{name} of the shape {list(shape)}", size, least)
        if shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"a shape is (frames, height, width) with sizes divisible by 4, got {shape}")
    return tuple((int(frames), int(height), int(width)) for frames, height, width in value)


@dataclass(frozen=True)
class TrainingConfig:
    """A recipe. `shapes` lists (frames, height, width) in pixels, taken in turn by the steps; a step's batch has one
    shape.

    empty_prompts is the share of videos without a prompt, part_prompts of those with the subject or the scene alone.
    videos, pictures, bending and appearance are the shares of a `Variety` of the world; photographs is the digest of
    its pictures, which `train` fills in.
    workers is how many further processes render the videos; 0 renders them between the steps. The videos are the same.
    """

    seed: int = 0
    steps: int = 4000
    batch_size: int = 16
    shapes: tuple[tuple[int, int, int], ...] = ((8, 32, 32),)
    layers: int = 6
    heads: int = 4
    head_dim: int = 32
    positions: str = "rotary"
    learning_rate: float = 1e-3
    warmup: int = 100
    slowing_share: float = 0.3
    final_rate: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    average_decay: float = 0.998
    empty_prompts: float = 0.2
    part_prompts: float = 0.2
    videos: float = 1.0
    pictures: float = 0.0
    bending: float = 0.0
    appearance: float = 0.0
    photographs: str = ""
    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    matrix_rate: float = 1.0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in _WHOLE_NUMBERS.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name, (low, high) in _NUMBERS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), low, high))
        object.__setattr__(self, "shapes", _shapes(self.shapes))
        check_transformer(self.layers, self.heads, self.head_dim, self.positions)
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")
        choice("precision", self.precision, PRECISIONS)
        if (self.seed + 1) * self.steps * self.batch_size > HELD_OUT_SEEDS:
            raise ValueError("(seed + 1) * steps * batch_size must not exceed 1e9, where the held-out videos begin")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingConfig":
        """A recipe from a config file's entries. Raises ValueError for an entry that does not exist or is not valid."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known, key=str):
            raise ValueError(f"unknown entries {unknown} in the recipe; known are {sorted(known)}")
        return cls(**values)


class TrainingBatch(TypedDict):
    """What one process holds of a step's batch: videos [B, T, 3, H, W] in 0..1, their prompts, the step, and which
    slice of the whole batch that is."""

    video: Tensor
    prompts: list[str]
    step: int
    share: slice


class GeneratedBatches(IterableDataset):
    """Batches of generated videos, from a given step on, as process `rank` of `processes` holds them."""

    def __init__(
        self,
        config: TrainingConfig,
        first_step: int = 0,
        rank: int = 0,
        processes: int = 1,
        photographs: Photographs | None = None,
    ) -> None:
        if config.batch_size % processes:
            raise ValueError(f"batch_size {config.batch_size} cannot be shared evenly by {processes} processes")
        self.config = config
        self.variety = Variety(config.videos, config.pictures, config.bending, config.appearance, photographs)
        self.first_step = first_step
        each = config.batch_size // processes
        self.share = slice(rank * each, (rank + 1) * each)

    def __iter__(self) -> Iterator[TrainingBatch]:
        # A loader takes from its workers in turn, so every n-th step from each gives the steps in order.
        worker = get_worker_info()
        offset, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in range(self.first_step + offset, self.config.steps, stride):
            yield self.batch(step)

    def batch(self, step: int) -> TrainingBatch:
        """This process's share of the batch of one step."""
        config = self.config
        frames, height, width = config.shapes[step % len(config.shapes)]
        world = WorldConfig(frames, height, width, variety=self.variety)
        first = (config.seed * config.steps + step) * config.batch_size
        scenes = [world.scene(first + index) for index in range(config.batch_size)]
        rng = np.random.default_rng([config.seed, step, 1])
        prompts = []
        for scene in scenes:
            draw = rng.random()
            kind = PROMPT_KINDS[1 + int(rng.integers(2))] if draw < config.part_prompts else "caption"
            prompts.append("" if rng.random() < config.empty_prompts else describe(scene, kind))
        chosen = scenes[self.share]
        return {"video": render(chosen, world), "prompts": prompts[self.share], "step": step, "share": self.share}


class WorldDataModule(lightning.LightningDataModule):
    """Generated training batches that start at the trainer's current step."""

    def __init__(self, config: TrainingConfig, photographs: Photographs | None = None) -> None:
        super().__init__()
        self.config = config
        self.photographs = photographs
        GeneratedBatches(config, photographs=photographs)  # refuses a recipe that shows photographs without any

    def train_dataloader(self) -> DataLoader:
        """One endless epoch; batches come whole from the dataset."""
        run = self.trainer
        step, rank, processes = (0, 0, 1) if run is None else (run.global_step, run.global_rank, run.world_size)
        batches = GeneratedBatches(self.config, step, rank, processes, self.photographs)
        return DataLoader(batches, batch_size=None, num_workers=self.config.workers)


_CACHED_SCORES = 2**19
"""Attention scores of a block, which takes twice as many bytes."""


class MaterialisedAttention(TorchFunctionMode):
    """Runs attention as matrix products and a softmax in bfloat16, a block of rows of one head at a time.

    With blocks that stay in a core's cache this takes half the time of batched products, and less than PyTorch's fused
    attention on the CPU, whose backward is slow there. Needs 2 * batch * heads * tokens**2 bytes for each layer.
    """

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: object,
        arguments: tuple[Any, ...] = (),
        keywords: dict[str, Any] | None = None,
    ) -> object:
        """Replace plain calls of scaled_dot_product_attention; everything else runs as it is."""
        keywords = keywords or {}
        plain = not keywords.get("is_causal") and keywords.get("attn_mask") is None and len(arguments) == 3
        if function is not F.scaled_dot_product_attention or not plain:
            return function(*arguments, **keywords)
        query, key, value = (tensor.to(torch.bfloat16).flatten(0, 1) for tensor in arguments)
        query = query * query.shape[-1] ** -0.5
        rows = max(1, _CACHED_SCORES // key.shape[1])
        with torch.autocast(query.device.type, enabled=False):
            heads = [
                torch.cat([(part @ k.T).softmax(dim=-1) @ v for part in q.split(rows)])
                for q, k, v in zip(query, key, value, strict=True)
            ]
        return torch.stack(heads).unflatten(0, arguments[0].shape[:2])


class EmbeddedTraining(lightning.LightningModule):
    """v-prediction training of CogVideoX's transformer with warm-up, a slowing end and an average of the weights.

    `transformer` is what is trained, `average` its exponential moving average, which is what gets exported.
    """

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        self.config = config
        self.save_hyperparameters(asdict(config) | {"shapes": [list(shape) for shape in config.shapes]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.transformer = build_transformer(config.layers, config.heads, config.head_dim, config.positions)
        self._close_gates()
        self.average = copy.deepcopy(self.transformer).requires_grad_(False)
        pipe = build_pipeline(self.transformer)
        self.tokenizer = pipe.tokenizer
        self.codec = pipe.vae.requires_grad_(False)
        self.text_encoder = pipe.text_encoder
        self.register_buffer("signal_power", pipe.scheduler.alphas_cumprod.float(), persistent=False)

    def _close_gates(self) -> None:
        """Start every block as the identity and the output at zero, as DiT's adaLN-Zero (Peebles and Xie, section
        3.2)."""
        blocks = self.transformer.transformer_blocks
        gates = [norm.linear for block in blocks for norm in (block.norm1, block.norm2)]
        for layer in (*gates, self.transformer.proj_out):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def begin_with(self, trained: CogVideoXTransformer3DModel) -> None:
        """Start from the weights of a trained transformer. Raises ValueError for one of another size."""
        for model in (self.transformer, self.average):
            try:
                model.load_state_dict(trained.state_dict())
            except RuntimeError as error:
                given, sizes = trained.config, self.config
                raise ValueError(
                    f"the weights to start from have {given.num_layers} layers, {given.num_attention_heads} heads and "
                    f"head_dim {given.attention_head_dim}, the recipe {sizes.layers}, {sizes.heads} and "
                    f"{sizes.head_dim}, with {sizes.positions} positions; give a pipeline trained by such a recipe"
                ) from error

    def embed(self, prompts: list[str]) -> Tensor:
        """Text embeddings [B, text tokens, dim] of prompts."""
        length = self.transformer.config.max_text_seq_length
        encoded = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(encoded.to(self.device))[0]

    def training_step(self, batch: TrainingBatch, batch_index: int) -> Tensor:
        """Mean squared error of the predicted velocity on one batch."""
        latents = self.codec.encode_frames(batch["video"])
        _, frames, channels, height, width = latents.shape
        timestep, noise = self._draw(batch["step"], batch["share"], (frames, channels, height, width))
        power = self.signal_power[timestep].view(-1, 1, 1, 1, 1)
        noisy = power.sqrt() * latents + (1 - power).sqrt() * noise
        velocity = power.sqrt() * noise - (1 - power).sqrt() * latents
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_positions(self.config.head_dim, frames, height // 2, width // 2, self.device)
        text = self.embed(batch["prompts"])
        fast = self.device.type == "cpu" and self.config.precision.startswith("bf16")
        with MaterialisedAttention() if fast else nullcontext():
            predicted = self.transformer(
                hidden_states=noisy,
                encoder_hidden_states=text,
                timestep=timestep,
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
        loss = F.mse_loss(predicted.float(), velocity)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _draw(self, step: int, share: slice, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Timesteps [B], spread evenly over the whole batch, and noise [B, *shape] of one step.

        They are drawn for the whole batch on the CPU, so that they are the same on every device and for any number of
        processes.
        """
        count = self.config.batch_size
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        order = torch.randperm(count, generator=generator)
        place = (order + torch.rand(count, generator=generator)) / count
        timestep = (place * len(self.signal_power)).long().clamp(max=len(self.signal_power) - 1)
        noise = torch.randn((count, *shape), generator=generator)
        return timestep[share].to(self.device), noise[share].to(self.device)

    def optimizer_step(self, *arguments: object, **keywords: object) -> None:
        """Step, then move the average towards the weights, faster in the first steps.

        Done here and not at the end of the batch, because checkpoints are written before the module's own hook there.
        """
        super().optimizer_step(*arguments, **keywords)
        done = self.trainer.global_step
        keep = min(self.config.average_decay, (1 + done) / (10 + done))
        with torch.no_grad():
            averaged, current = list(self.average.parameters()), list(self.transformer.parameters())
            torch._foreach_lerp_(averaged, [weight.detach() for weight in current], 1 - keep)

    def rate_at(self, step: int) -> float:
        """Share of the learning rate at a step: linear warm-up, constant, then linear down to `final_rate`.

        Runs of different length are the same until the shorter one begins to slow down.
        """
        warm = min(1.0, (step + 1) / max(self.config.warmup, 1))
        left = max(0.0, 1 - step / self.config.steps) / self.config.slowing_share
        return warm * (self.config.final_rate + (1 - self.config.final_rate) * min(1.0, left))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, or Muon for the blocks' attention and feed-forward matrices, with decay on matrices only."""
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, weight in self.transformer.named_parameters():
            inner = weight.ndim == 2 and (".attn1.to_" in name or ".ff.net." in name)
            (matrices if inner and self.config.optimizer == "muon" else others).append(weight)
        optimizer = MuonWithAdamW(
            matrices,
            others,
            self.config.learning_rate,
            matrix_rate=self.config.matrix_rate,
            weight_decay=self.config.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
