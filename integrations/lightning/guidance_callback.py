"""A callback that puts anyone's generating LightningModule under cross-attention guidance while it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from corrdit.integrations.diffusers.backbones.presets import Preset
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.guidance.options import Heads
from corrdit.integrations.lightning.discovery import find_held_model
from corrdit.integrations.lightning.reading import BatchCallback


class GuidanceCallback(BatchCallback):
    """Runs every prediction batch of a module inside `corrdit.CrossAttentionGuidance`.

    ```python
    Trainer(callbacks=[GuidanceCallback(layers=(13, 17, 21))]).predict(module, prompts)
    ```

    The module holds a diffusers video pipeline (or a backbone) and calls it in `predict_step`; it is not changed, and
    the model is as before after every batch, also after an exception.

    Args:
        layers, scale, start, stop, renormalize, span, perturbation, heads, adaptive_scale, preset, backend: as for
            `corrdit.CrossAttentionGuidance`.
        attribute: dotted name of the pipeline in the module; None looks for it.

    Raises:
        ValueError: when prediction starts, no pipeline found (with what was found), or what the guidance refuses.
    """

    def __init__(
        self,
        layers: int | Iterable[int] | None = None,
        scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        *,
        renormalize: bool | None = None,
        span: int = 0,
        perturbation: str = "cross_frame",
        heads: Heads = None,
        adaptive_scale: float = 0.0,
        preset: Preset | str | None = None,
        backend: str = "auto",
        attribute: str | None = None,
    ) -> None:
        self.options: dict[str, Any] = {
            # Guidance is made anew for every prediction, so an iterator has to be kept as a list.
            "layers": list(layers) if isinstance(layers, Iterable) else layers,
            "scale": scale,
            "start": start,
            "stop": stop,
            "renormalize": renormalize,
            "span": span,
            "perturbation": perturbation,
            "heads": list(heads) if isinstance(heads, Iterable) and not isinstance(heads, Mapping) else heads,
            "adaptive_scale": adaptive_scale,
            "preset": preset,
            "backend": backend,
        }
        self.attribute = attribute

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guidance = CrossAttentionGuidance(find_held_model(pl_module, self.attribute), **self.options)

    def on_predict_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        self.open(self._guidance)

    def on_predict_batch_end(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        self.close()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del self._guidance
