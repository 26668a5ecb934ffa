"""The text a transformer is given: how a pipeline encodes a prompt, the empty one, and embeddings of others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch

from corrdit.integrations.diffusers.backbones.frames import FrameEncoder
from corrdit.integrations.diffusers.layouts import Config, Text, config_of


class PromptEncoder(FrameEncoder):
    """The part of a backbone that makes a transformer's text arguments.

    Attributes:
        text_option: name of the option of the transformer that says how many channels a prompt's embeddings have.
    """

    text_option: ClassVar[str] = "text_embed_dim"
    _empty_prompt: dict[str, torch.Tensor] | None = None

    @property
    def config(self) -> Config:
        """Options the transformer was built with."""
        return config_of(self.transformer)

    @property
    def text_tokens(self) -> int:
        """Tokens to which the pipeline pads a prompt."""
        return 512

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the transformer's text arguments for one prompt, by argument name; masks have it in theirs."""
        return {"encoder_hidden_states": (self.text_tokens, int(getattr(self.config, self.text_option)))}

    def encoded_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        """The transformer's text arguments for one prompt, batch 1, by argument name."""
        embeds = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
        )[0]
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def blank_prompt(self) -> dict[str, torch.Tensor]:
        """Zeros in the shapes of `encoded_prompt`, batch 1, none of them masked."""
        return {
            name: torch.full((1, *shape), float("mask" in name), device=self.device, dtype=self.dtype)
            for name, shape in self.prompt_shapes.items()
        }

    @torch.no_grad()
    def empty_prompt(self) -> dict[str, torch.Tensor]:
        """Text arguments of the empty prompt, batch 1; zeros, said once, for a pipeline without a text encoder."""
        if self._empty_prompt is None:
            if getattr(self.pipe, "text_encoder", None) is None:
                warnings.warn(
                    f"{self.name} has no text encoder; its empty prompt is taken as zeros", UserWarning, stacklevel=3
                )
                self._empty_prompt = self.blank_prompt()
            else:
                self._empty_prompt = self.encoded_prompt("")
        return self._empty_prompt

    def _text(
        self, prompt_embeds: torch.Tensor | Mapping[str, torch.Tensor] | None, batch: int
    ) -> dict[str, torch.Tensor]:
        text = dict(self.empty_prompt())
        if isinstance(prompt_embeds, Mapping):
            text = dict(prompt_embeds)
        elif prompt_embeds is not None:
            text = self.text_with(text, prompt_embeds)
        moved = {name: value.to(self.device) for name, value in text.items()}
        for name, value in moved.items():
            if len(value) not in (1, batch):
                raise ValueError(f"{name} has {len(value)} samples and the latents {batch}; give 1 or {batch} prompts")
        return {
            name: value.expand(batch, *value.shape[1:]) if value.shape[0] == 1 else value
            for name, value in moved.items()
        }

    def text_with(self, text: Text, prompt_embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Text arguments with other embeddings, all of whose tokens take part."""
        changed = {**text, "encoder_hidden_states": prompt_embeds.to(self.dtype)}
        if (mask := text.get("encoder_attention_mask")) is not None:
            changed["encoder_attention_mask"] = torch.ones(prompt_embeds.shape[:2]).to(mask)
        return changed
