"""Features of an attention layer in place of its queries and keys: what the attention itself has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from corrdit.grid import TokenGrid
from corrdit.integrations.diffusers.analysis.capturing import reading_forward
from corrdit.integrations.diffusers.processors import Operation

FEATURES = ("attention output", "projected output")


class FeatureBackbone:
    """A backbone whose queries and keys are both the normalised output of an attention layer, one head.

    Cosine similarity between features, as feature trackers such as DIFT use it, through the same tracker as the
    queries and keys.

    Args:
        backbone: what `corrdit.load_backbone` returns.
        feature: "attention output" (heads joined, before the projection) or "projected output".

    Raises:
        ValueError: an unknown feature.
    """

    heads = 1

    def __init__(self, backbone: Any, feature: str = FEATURES[0]) -> None:
        if feature not in FEATURES:
            raise ValueError(f"feature must be one of {', '.join(map(repr, FEATURES))}, got {feature!r}")
        self.backbone, self.feature = backbone, feature

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)

    def fingerprint(self) -> str:
        """As the model's, of these features."""
        return f"{self.backbone.fingerprint()} {self.feature}"

    def forward(
        self,
        latents: Tensor,
        timestep: float,
        operations: Mapping[int, Operation],
        *,
        image: Tensor | None = None,
    ) -> dict[int, Any]:
        """As `Backbone.forward`, the operations being given features for both queries and keys."""
        grid = self.backbone.grid(latents.shape[-4], *latents.shape[-2:]).without_text()
        results: dict[int, Any] = {}

        def deliver(layer: int, name: str, result: Tensor) -> None:
            if name == self.feature:
                results[layer] = operations[layer](result, result, grid, None)

        reading_forward(
            self.backbone,
            latents,
            timestep,
            layers=tuple(operations),
            operation=lambda q, k, grid, key_mask: q.new_zeros(1),
            feature_operation=_as_head,
            deliver=deliver,
            image=image,
        )
        return results


def _as_head(features: Tensor, grid: TokenGrid) -> Tensor:
    """`[1, 1, N, C]` with products between -sqrt(C) and sqrt(C)."""
    return F.normalize(features.float(), dim=-1)[:, None] * features.shape[-1] ** 0.25
