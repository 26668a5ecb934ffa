"""Settings of motion transfer that others published, by the shape of the model and by method."""

from __future__ import annotations

from dataclasses import dataclass

from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

# The script's negative prompt is Wan's own in English, which is a matter of taste and left to the user. In the released
# code the view that is averaged over heads runs over neighbouring tokens; the mean over heads it stands for is taken.
FASTVMT = TransferSettings(
    blocks=(14,),
    guided_share=0.2,
    optimisation_steps=10,
    learning_rate=(0.003, 0.002),
    rate_falls="optimisation steps",
    optimizer="adamw",
    temperature=1.0,
    heads="features",
    loss="pairs",
    flow_reference="soft",
    span=(0, 3),
    window=10,
    tile=(3, 4),
    distance_weights=(1.0, 0.8),
    tracking_weight=0.2,
    optimiser_interval=3,
    reference_noised=True,
    strength=0.75,
    gradient_checkpointing=True,
    guidance_scale=5.8,
    size=(480, 832),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_options=(("shift", 7.0),),
    source="FastVMT's released code (arXiv 2602.05551): wan_video.py and the examples for Wan2.1",
)
FLOWMOTION = TransferSettings(
    blocks=(14,),
    method="flowmotion",
    guided_share=0.2,
    optimisation_steps=3,
    learning_rate=(0.003, 0.003),
    guidance_scale=6.0,
    size=(480, 720),
    scheduler="FlowMatchEulerDiscreteScheduler",
    scheduler_options=(("shift", 3.0),),
    source="FlowMotion's released code (arXiv 2603.06289): run.py for Wan2.1-T2V-1.3B",
)


@dataclass(frozen=True)
class PublishedTransfer:
    """Settings published for one model.

    Args:
        family: of the transformer.
        layers: attention layers.
        heads: attention heads.
        settings: as published.
    """

    family: str
    layers: int
    heads: int
    settings: TransferSettings


PUBLISHED_TRANSFERS = (
    *(
        PublishedTransfer(model.family, model.layers, model.heads, model.preset.transfer)
        for model in PUBLISHED_MODELS.values()
        if model.preset.transfer is not None
    ),
    PublishedTransfer("wan", 30, 12, FASTVMT),  # Wan2.1-T2V-1.3B
    PublishedTransfer("wan", 40, 40, FASTVMT),  # Wan2.1-T2V-14B
    PublishedTransfer("wan", 30, 12, FLOWMOTION),
)
"""For HunyuanVideo, LTX and Mochi none are known."""


def published_transfer(family: str, layers: int, heads: int, method: object = None) -> TransferSettings | None:
    """The settings published for a model of this shape, None where there are none.

    Args:
        family, layers, heads: of the model.
        method: those for this method, if there are any; None for the first.
    """
    found = [
        row.settings for row in PUBLISHED_TRANSFERS if (row.family, row.layers, row.heads) == (family, layers, heads)
    ]
    own = [settings for settings in found if settings.method == method]
    return next(iter([*own, *found]), None)
