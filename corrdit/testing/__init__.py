"""Checks for backbones, and tiny random models to run them on.

`check_backbone` tells the author of a backbone whether its queries and keys, token order, text position, masks, early
exit and restoring are right, `given_backbone` makes one of a bare transformer, and `tiny_backbone` builds each family
with random weights, on the CPU, in well under a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_LAZY_ATTRIBUTES = {
    "CheckResult": "corrdit.integrations.diffusers.testing.conformance",
    "TINY_MODELS": "corrdit.integrations.diffusers.testing.tiny_models",
    "check_backbone": "corrdit.integrations.diffusers.testing.conformance",
    "given_backbone": "corrdit.integrations.diffusers.testing.given",
    "tiny_backbone": "corrdit.integrations.diffusers.testing.tiny_models",
    "tiny_generation": "corrdit.integrations.diffusers.testing.tiny_models",
    "tiny_pipeline": "corrdit.integrations.diffusers.testing.tiny_models",
}
__all__ = [
    "TINY_MODELS",
    "CheckResult",
    "check_backbone",
    "given_backbone",
    "tiny_backbone",
    "tiny_generation",
    "tiny_pipeline",
]

if TYPE_CHECKING:
    from corrdit.integrations.diffusers.testing.conformance import CheckResult, check_backbone
    from corrdit.integrations.diffusers.testing.given import given_backbone
    from corrdit.integrations.diffusers.testing.tiny_models import (
        TINY_MODELS,
        tiny_backbone,
        tiny_generation,
        tiny_pipeline,
    )


def __getattr__(name: str) -> Any:
    if name in _LAZY_ATTRIBUTES:
        value = getattr(importlib.import_module(_LAZY_ATTRIBUTES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'corrdit.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
