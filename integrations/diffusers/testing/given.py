"""A bare transformer, with the arguments of one of its forwards, as something that can be checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.layouts import Arguments, Text, layout_of


class GivenBackbone(Backbone):
    """A transformer without a pipeline, called as it was once called, with other latents and prompts.

    A subclass has the layout.

    Args:
        transformer: whose layout is known.
        arguments: of a forward, by name, one sample or more.
    """

    def __init__(self, transformer: Any, arguments: Arguments) -> None:
        self._given = dict(arguments)
        device = arguments["hidden_states"].device
        pipe: Any = SimpleNamespace(transformer=transformer, scheduler=None, vae=None, _execution_device=device)
        super().__init__(pipe, name=type(transformer).__name__)

    @property
    def latent_channels(self) -> int:
        return int(self._given["hidden_states"].shape[self.channel_axis])

    @property
    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        names = [name for name in self._given if name.startswith("encoder_") and torch.is_tensor(self._given[name])]
        return {name: tuple(self._given[name].shape[1:]) for name in names}

    def timestep(self, step: int, inference_steps: int | None = None) -> float:
        return float(torch.as_tensor(self._given["timestep"]).max())

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def call_arguments(
        self, latents: torch.Tensor, timestep: float, text: Text, image: torch.Tensor | None = None
    ) -> Arguments:
        own = len(self._given["hidden_states"])

        def sized(value: Any) -> Any:
            # A value a sample, as many as there are now.
            if not (torch.is_tensor(value) and value.ndim and value.shape[0] == own):
                return value
            return value[:1].expand(len(latents), *value.shape[1:])

        beside = {name: sized(value) for name, value in self._given.items() if name != "hidden_states"}
        return {**beside, "hidden_states": self.arranged(latents), **text}


def given_backbone(transformer: torch.nn.Module, arguments: Arguments) -> GivenBackbone:
    """What `check_backbone` takes for a transformer that has a layout and no backbone.

    Args:
        transformer: best tiny and random, on the CPU.
        arguments: of one of its forwards by name, `hidden_states` and `timestep` among them.
    """
    kind: type[GivenBackbone] = type("GivenBackbone", (GivenBackbone,), {"layout": type(layout_of(transformer))})
    return kind(transformer, arguments)
