"""Motion transfer through unmodified pipelines: DiTFlow, baselines, and zero-shot injection of what was optimised."""

from corrdit.integrations.diffusers.motion_transfer.objectives import MotionObjective
from corrdit.integrations.diffusers.motion_transfer.optimisation import DivergedError
from corrdit.integrations.diffusers.motion_transfer.reference import ReferenceMotion
from corrdit.integrations.diffusers.motion_transfer.result import TransferResult
from corrdit.integrations.diffusers.motion_transfer.stored import StoredMotion
from corrdit.integrations.diffusers.motion_transfer.transfer import MotionTransfer, settings_for
from corrdit.integrations.diffusers.transfer_settings import TransferSettings

__all__ = [
    "DivergedError",
    "MotionObjective",
    "MotionTransfer",
    "ReferenceMotion",
    "StoredMotion",
    "TransferResult",
    "TransferSettings",
    "settings_for",
]
