"""A video diffusion model as a source of correspondence: encode, run once, read chosen layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from corrdit.arguments import resolved_index, whole_number
from corrdit.display import table_html
from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.backbones.frames import conditioning_latents
from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.backbones.prompts import PromptEncoder
from corrdit.integrations.diffusers.backbones.published_models import preset_for
from corrdit.integrations.diffusers.captures import Capture
from corrdit.integrations.diffusers.fingerprint import weights_fingerprint
from corrdit.integrations.diffusers.host.parallel import output_options
from corrdit.integrations.diffusers.inversion import Path, Scheduler, denoised_latents, inverted_latents
from corrdit.integrations.diffusers.layouts import (
    Arguments,
    Pipeline,
    Text,
    TransformerLayout,
    has_layout,
    register_layout,
)
from corrdit.integrations.diffusers.processors import Operation, named_operations

if TYPE_CHECKING:
    from corrdit.integrations.diffusers.feature_backbone import FeatureBackbone


NO_IMAGE = MappingProxyType({"image": "diffusers has no pipeline that gives it an image"})
"""Limits of a family without image-to-video models."""


class Backbone(PromptEncoder):
    """A diffusers video pipeline seen as encoder, transformer and token grid.

    Latents are `[F, C, h, w]` (or `[B, F, C, h, w]`), where one entry of F is one frame of tokens; families that join
    several latent frames in a token hold them side by side in C.

    Args:
        pipe: a loaded pipeline of the family.
        name: how the backbone is called in messages and tables.
        preset: settings for reading correspondence; None for the published ones of a model of this shape.

    Attributes:
        layout: where its transformers keep their attention.
        pipelines: names of the classes of diffusers that run its models, those that are given an image last.
        limits: why its models cannot be used for something, by its name: "tracking", "analysis" (of a generation),
            "guidance", "transfer" or "image" (to video). Nothing stands there for what they can be used for.
        partly: likewise, what holds for some of the models only.
        call_options: arguments that make its pipelines denoise every frame of a video at every step.
        layers: number of attention layers, over all blocks.
        heads: attention heads.
    """

    layout: ClassVar[type[TransformerLayout]]
    pipelines: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[Mapping[str, str]] = MappingProxyType({})
    partly: ClassVar[Mapping[str, str]] = MappingProxyType({})
    call_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    _kept_fingerprint: str | None = None

    def __init__(self, pipe: Pipeline, *, name: str, preset: Preset | None = None) -> None:
        self.pipe = pipe
        self.name = name
        self.transformer: torch.nn.Module = pipe.transformer
        self._layout = self.layout()
        if not has_layout(self.transformer):
            register_layout(type(self.transformer).__name__, self.layout)
        self.layers = len(self._layout.attention_modules(self.transformer))
        self.heads = self._layout.heads(self.transformer)
        self.preset = preset or preset_for(self.family, self.layers, self.heads)
        layer = self.preset.reading.layer
        if layer >= self.layers:
            raise ValueError(f"the preset of {name} reads layer {layer}, but there are {self.layers} layers")
        weights = self.preset.reading.head_weights
        if weights is not None and len(weights) != self.heads:
            raise ValueError(
                f"the preset of {name} weighs {len(weights)} heads (head_weights), but it has {self.heads}"
            )
        if (head := self.preset.reading.head) is not None and head >= self.heads:
            raise ValueError(f"the preset of {name} reads head {head}, but there are {self.heads} heads")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.layers} layers of {self.heads} heads>"

    def _repr_html_(self) -> str:
        reading = self.preset.reading
        rows = {
            "family": self.family,
            "transformer": type(self.transformer).__name__,
            "layers x heads": f"{self.layers} x {self.heads}",
            "parameters": f"{sum(weight.numel() for weight in self.transformer.parameters()) / 1e6:,.1f} million",
            "dtype, device": f"{self.dtype}, {self.device}",
            "reads": f"layer {reading.layer}, step {reading.step} of {reading.inference_steps}",
            "not for": "; ".join(f"{use}: {reason}" for use, reason in self.limits.items()) or "nothing",
        }
        return table_html(f"{type(self).__name__} {self.name}", rows)

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.layout.family

    def check_use(self, use: str) -> None:
        """Raises ValueError, with the reason, where `limits` has one against this use."""
        if use in self.limits:
            raise ValueError(f"{self.name} cannot be used for {use}: {self.limits[use]}")

    @property
    def token_stride(self) -> tuple[int, int]:
        """(dy, dx): pixels of the encoded video a token spans."""
        _, patch_h, patch_w = self._layout.patch_size(self.transformer)
        return (self.spatial_compression * patch_h, self.spatial_compression * patch_w)

    @property
    def frames_per_token(self) -> int:
        """Latent frames of the codec that one frame of tokens stands for."""
        return self._layout.patch_size(self.transformer)[0]

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the latents the transformer is given."""
        return self.layout.axes.index("C")

    def call_arguments(
        self,
        latents: torch.Tensor,
        timestep: float,
        text: Text,
        image: torch.Tensor | None = None,
    ) -> Arguments:
        """The transformer's arguments for latents `[B, F, C, h, w]`, C and F as the codec counts them.

        Args:
            latents: noisy ones.
            timestep: as the scheduler counts it.
            text: the text arguments by name.
            image: `[B, 1 or F, C, h, w]`, clean ones, of a model that takes an image; None for the first of `latents`.
        """
        times = self.times(latents, timestep, image)
        return {
            "hidden_states": self.arranged(self.conditioned(latents, image)),
            "timestep": times,
            **text,
            **self.further_arguments(latents, times, text, image),
        }

    def conditioned(self, latents: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """Latents `[B, F, C + ..., h, w]` with the channels a model is given beside the noisy ones."""
        return latents

    def times(self, latents: torch.Tensor, timestep: float, image: torch.Tensor | None) -> torch.Tensor:
        """The timestep of each sample as the pipeline gives it."""
        return torch.full((len(latents),), timestep, device=latents.device)

    def further_arguments(
        self, latents: torch.Tensor, times: torch.Tensor, text: Text, image: torch.Tensor | None
    ) -> Arguments:
        """What the transformer is given beside latents, timestep and text."""
        return {}

    def arranged(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `[B, F, C, h, w]` in the order of the layout's axes."""
        return latents.permute(*("BFCHW".index(axis) for axis in self.layout.axes))

    @property
    def takes_image(self) -> bool:
        """Whether the transformer is given the latents of an image beside the noisy ones."""
        return False

    @property
    def has_condition(self) -> bool:
        """Whether the transformer is given any channels behind those of the noisy latents."""
        return self.takes_image

    def output_latents(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's output for latents `[B, F, C, h, w]` in their shape."""
        channels = latents.shape[2]
        return output.permute(*(self.layout.axes.index(axis) for axis in "BFCHW"))[:, :, :channels]

    def transformer_at(self, timestep: float) -> torch.nn.Module:
        """The transformer that denoises at this timestep."""
        return self.transformer

    def timestep(self, step: int, inference_steps: int | None = None) -> float:
        """The timestep of a denoising step, by the pipeline's scheduler with trailing spacing.

        Args:
            step: 0 is the noisiest; negative steps count from the last.
            inference_steps: steps of the schedule; None for the preset's.

        Raises:
            ValueError: a step outside the schedule.
        """
        given = self.preset.reading.inference_steps if inference_steps is None else inference_steps
        steps = whole_number("inference_steps", given, 1)
        return float(self.schedule(steps)[resolved_index("step", step, steps, f"a schedule of {steps} steps")])

    def schedule(self, inference_steps: int) -> torch.Tensor:
        """Timesteps from the noisiest to the cleanest; the pipeline's own scheduler is left as it is."""
        return self.stepping_scheduler(inference_steps).timesteps

    def stepping_scheduler(self, inference_steps: int) -> Scheduler:
        """A copy of the pipeline's scheduler with so many steps."""
        scheduler = self.pipe.scheduler
        changes = {"timestep_spacing": "trailing"} if "timestep_spacing" in scheduler.config else {}
        copy: Scheduler = type(scheduler).from_config(scheduler.config, **changes)
        copy.set_timesteps(inference_steps)
        return copy

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: float) -> torch.Tensor:
        """Latents noised to a timestep, by the pipeline's scheduler."""
        at = torch.tensor([timestep], device=latents.device).long()
        return self.pipe.scheduler.add_noise(latents, noise, at)

    def grid(self, frames: int, latent_height: int, latent_width: int) -> TokenGrid:
        """The token axis of a forward of latents `[frames, C, latent_height, latent_width]` with the empty prompt."""
        video = self._layout.video_grid(self.transformer, frames * self.frames_per_token, latent_height, latent_width)
        return self.with_text(video)

    def generation_grid(self, height: int, width: int, num_frames: int) -> TokenGrid:
        """The token axis while a video of this size is generated, in pixels and video frames.

        Raises:
            ValueError: a size that is not a whole number of tokens, or frames that do not fill the codec's latents.
        """
        for name, size, stride in zip(("height", "width"), (height, width), self.token_stride, strict=True):
            if whole_number(name, size, stride) % stride:
                raise ValueError(
                    f"{name} must be a multiple of the {stride} pixels that a token of {self.name} spans, got {size}"
                )
        fitting = self.fitting_frames(whole_number("num_frames", num_frames, 1))
        if fitting != num_frames:  # which pipelines round, each in its way
            near = [str(count) for count in (fitting, fitting + self.temporal_compression) if count > 0]
            raise ValueError(
                f"num_frames must be a number that the codec of {self.name} takes as it is, got {num_frames}; near it:"
                f" {', '.join(near)}"
            )
        frames = len(self.latent_frame_map(num_frames))
        return self.grid(frames, height // self.spatial_compression, width // self.spatial_compression)

    def with_text(self, video: TokenGrid) -> TokenGrid:
        """The grid with the text tokens of the empty prompt where this family puts them."""
        if self.layout.text is None:
            return video
        return self._layout.with_text(video, self._layout.text_tokens(self.empty_prompt()))

    def forward(
        self,
        latents: torch.Tensor,
        timestep: float,
        operations: Mapping[int, Operation | Mapping[str, Operation]],
        *,
        prompt_embeds: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        early_exit: bool = True,
        keep_graph: bool = False,
        image: torch.Tensor | None = None,
    ) -> dict[int, Any]:
        """One call of the transformer with the conditional prompt; the results of operations on chosen layers.

        Args:
            latents: `[F, C, h, w]` or `[B, F, C, h, w]`, as `encode_frames` or `encode_video` gives them.
            timestep: as the scheduler counts it.
            operations: `operation(q, k, grid, key_mask)`, or a dict of them by name, for each layer.
            prompt_embeds: text embeddings `[1 or B, tokens, C]`, or the transformer's text arguments by name; None for
                the empty prompt.
            early_exit: stop after the last layer that is needed.
            keep_graph: leave results attached to the autograd graph.
            image: for models that take one, clean latents `[1, C, h, w]` of the first frame, behind which there is
                nothing, or `[F, C, h, w]` of all frames; a batch of them, or one for all. None takes the first frame
                of `latents`.

        Returns:
            Results by layer, as the layers were given.

        Raises:
            ValueError: latents or an image that do not fit the model, no operations, or what `capture` refuses.
        """
        if not isinstance(operations, Mapping):
            raise ValueError(f"operations must be a dict {{layer: operation}}, got {type(operations).__name__}")
        if not operations:
            raise ValueError("operations is empty; give at least one {layer: operation}")
        transformer = self.transformer_at(timestep)
        arguments = self.forward_arguments(latents, timestep, prompt_embeds=prompt_embeds, image=image)
        reader = Capture(
            transformer,
            operations={layer: named_operations(operation) for layer, operation in operations.items()},
            named=True,
            keep_graph=keep_graph,
            early_exit=early_exit,
        )
        with torch.set_grad_enabled(keep_graph and torch.is_grad_enabled()), reader:
            transformer(**arguments, **output_options(transformer))
        results = {}
        for layer, operation in operations.items():
            by_name = reader[0, layer % self.layers]
            results[layer] = by_name if isinstance(operation, Mapping) else by_name["operation"]
        return results

    @torch.no_grad()
    def predict(self, latents: torch.Tensor, timestep: float, *, image: torch.Tensor | None = None) -> torch.Tensor:
        """The transformer's output for the empty prompt, in the shape of the latents, float32.

        Arguments and errors as for `forward`.
        """
        arguments = self.forward_arguments(latents, timestep, image=image)
        transformer = self.transformer_at(timestep)
        output = transformer(**arguments, **output_options(transformer))[0]
        return self.output_latents(output, self._batched(latents)).reshape(latents.shape).float()

    def fingerprint(self) -> str:
        """What tells these weights from others: `corrdit.integrations.diffusers.fingerprint.weights_fingerprint`, as
        they were loaded where they have been placed since."""
        return self._kept_fingerprint or weights_fingerprint(self.pipe)

    def keep_fingerprint(self) -> None:
        """Before weights are placed: what tells them from others stays what it is now."""
        self._kept_fingerprint = weights_fingerprint(self.pipe)

    def with_features(self, feature: str = "attention output") -> FeatureBackbone:
        """This model with the output of an attention layer in place of its queries and keys.

        Args and errors: as `corrdit.integrations.diffusers.feature_backbone.FeatureBackbone`.
        """
        from corrdit.integrations.diffusers.feature_backbone import FeatureBackbone

        return FeatureBackbone(self, feature)

    def inverted(
        self,
        latents: torch.Tensor,
        steps: Sequence[int],
        inference_steps: int,
        *,
        rule: str = "ddim",
        image: torch.Tensor | None = None,
    ) -> Path:
        """Clean latents at denoising steps: `corrdit.integrations.diffusers.inversion.inverted_latents`."""
        return inverted_latents(self, latents, steps, inference_steps, rule=rule, image=image)

    def denoised(
        self,
        latents: torch.Tensor,
        start: int,
        steps: Sequence[int],
        inference_steps: int,
        *,
        image: torch.Tensor | None = None,
    ) -> Path:
        """Latents of one step at later ones: `corrdit.integrations.diffusers.inversion.denoised_latents`."""
        return denoised_latents(self, latents, start, steps, inference_steps, image=image)

    def forward_arguments(
        self,
        latents: torch.Tensor,
        timestep: float,
        *,
        prompt_embeds: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        image: torch.Tensor | None = None,
    ) -> Arguments:
        """The transformer's arguments; arguments and errors as for `forward`."""
        batched = self._batched(latents)
        text = self._text(prompt_embeds, len(batched))
        if image is None:
            return self.call_arguments(batched, timestep, text)
        if not self.takes_image:
            raise ValueError(f"{self.name} takes no image beside the latents; leave image out")
        given = conditioning_latents(self._batched(image), batched, frames_per_token=self.frames_per_token)
        return self.call_arguments(batched, timestep, text, given)

    def _batched(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as `[B, frames, C, h, w]`, frames and C as the codec counts them."""
        latents = torch.as_tensor(latents)
        latents = latents[None] if latents.ndim == 4 else latents
        channels = self.latent_channels * self.frames_per_token
        if latents.ndim != 5 or latents.shape[2] != channels:
            raise ValueError(
                f"latents must be [F, {channels}, h, w] or [B, F, {channels}, h, w] for {self.name}, got "
                f"{tuple(latents.shape)}; make them with encode_frames or encode_video"
            )
        batch, frames, _, height, width = latents.shape
        latents = latents.to(device=self.device, dtype=self.dtype)
        return latents.reshape(batch, frames * self.frames_per_token, self.latent_channels, height, width)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.config.in_channels)
