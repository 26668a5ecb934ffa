"""Cosmos 3: token ids and frames packed into one sequence, whose frames attend to both and whose text to itself alone.

Source: diffusers, `Cosmos3OmniTransformer` and `Cosmos3OmniPipeline`.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch

from corrdit.integrations.diffusers.backbones.flow_matching import FlowMatchingBackbone, standardized
from corrdit.integrations.diffusers.family_layouts import Cosmos3Layout
from corrdit.integrations.diffusers.layouts import Arguments, Text

FRAME_RATE = 24.0
"""Frames a second, the pipeline's default."""


class Cosmos3Backbone(FlowMatchingBackbone):
    """Cosmos 3, text, image and video to video; given latents take the place of noisy ones. One video a forward."""

    layout = Cosmos3Layout
    pipelines = ("Cosmos3OmniPipeline",)
    limits = MappingProxyType(
        {"transfer": "its transformer is given its latents in a list, packed with token ids, which no method steers"}
    )
    takes_image = True

    @property
    def latent_channels(self) -> int:
        return int(self.config.latent_channel)

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.pipe.vae.config
        return standardized(latents, config.latents_mean, config.latents_std)

    def schedule_arguments(self, inference_steps: int) -> Arguments:
        if not self.pipe.config.use_native_flow_schedule:
            return {}
        first = 1 - 1 / self.pipe.scheduler.config.num_train_timesteps
        return {"sigmas": np.linspace(first, 0.0, inference_steps + 1)[:-1]}

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"input_ids": (self.empty_prompt()["input_ids"].shape[1],)}

    def empty_prompt(self) -> dict[str, torch.Tensor]:
        return self.encoded_prompt("")

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        ids, _ = self.pipe.tokenize_prompt(prompt, add_resolution_template=False, add_duration_template=False)
        return {"input_ids": torch.tensor([ids], device=self.device)}

    def text_with(self, text: Text, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        raise ValueError(f'{self.name} reads token ids: give prompt_embeds={{"input_ids": [1, tokens]}}')

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Text, image: torch.Tensor | None = None
    ) -> Arguments:
        if len(latents) > 1:
            raise ValueError(f"{self.name} packs one video a forward, got {len(latents)}; give them one by one")
        given = 0 if image is None else image.shape[1]
        clean = latents if image is None else torch.cat([image, latents[:, given:]], dim=1)
        words = self.pipe._prepare_text_segment(text["input_ids"][0].tolist(), self.device)
        offset, videos = words.pop("vision_start_temporal_offset"), self.arranged(clean)
        frames = self.pipe._prepare_vision_segment(
            videos, False, offset, FRAME_RATE, words["und_len"], self.device, list(range(given))
        )
        count, noisy = frames.pop("num_vision_tokens"), frames.pop("num_noisy_vision_tokens")
        positions = torch.cat([words.pop("text_mrope_ids"), frames.pop("vision_mrope_ids")], dim=1)
        return {
            **words,
            **frames,
            "position_ids": positions,
            "sequence_length": words["und_len"] + count,
            "vision_tokens": [videos],
            "vision_timesteps": torch.full((noisy,), timestep, device=self.device),
        }

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return super().output_latents(output[0], latents)
