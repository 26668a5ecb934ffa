"""Which families of transformers can be used for what, and why the others cannot: the table of `corrdit models`."""

from __future__ import annotations

from typing import Literal, TypedDict

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.backbones.table import BACKBONES, CAPTURED_ALONE
from corrdit.integrations.diffusers.layouts import FAMILY_LAYOUTS, REFUSED_TRANSFORMERS

USES = ("tracking", "analysis", "guidance", "transfer", "image")
"""Reading given videos, analysing a generation, cross-attention guidance, motion transfer, image to video."""


class UseRow(TypedDict):
    """How far a family can be used for something; the reason is empty where nothing is against it."""

    supported: Literal["yes", "partly", "no"]
    reason: str


class FamilyRow(TypedDict):
    """What is known of a family of transformers.

    `missing` are the classes the installed diffusers does not have, for which it has to be newer.
    """

    family: str
    transformers: list[str]
    pipelines: list[str]
    missing: list[str]
    uses: dict[str, UseRow]


def coverage() -> list[FamilyRow]:
    """One row a family, then one for each transformer that no use is open to; asks the installed diffusers."""
    import diffusers

    present = set(dir(diffusers))
    rows = [
        FamilyRow(
            family=backbone.layout.family,
            transformers=list(backbone.layout.transformers),
            pipelines=list(backbone.pipelines),
            missing=[name for name in (*backbone.layout.transformers, *backbone.pipelines) if name not in present],
            uses={use: _use(backbone, use) for use in USES},
        )
        for backbone in BACKBONES
    ]
    return rows + [
        FamilyRow(
            family=FAMILY_LAYOUTS[name].family if name in FAMILY_LAYOUTS else "",
            transformers=[name],
            pipelines=[],
            missing=[] if name in present else [name],
            uses={use: UseRow(supported="no", reason=reason) for use in USES},
        )
        for name, reason in {**CAPTURED_ALONE, **REFUSED_TRANSFORMERS}.items()
    ]


def _use(backbone: type[Backbone], use: str) -> UseRow:
    if use in backbone.limits:
        return UseRow(supported="no", reason=backbone.limits[use])
    if use in backbone.partly:
        return UseRow(supported="partly", reason=backbone.partly[use])
    return UseRow(supported="yes", reason="")
