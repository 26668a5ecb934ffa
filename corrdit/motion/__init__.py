"""Motion features and losses for transferring the motion of one video to another, and errors of motion."""

from corrdit.motion.flow_loss import attention_flow_loss, coarse_centers, flow_loss
from corrdit.motion.key_tracking import tracking_loss
from corrdit.motion.latent_displacement import latent_displacement
from corrdit.motion.moft import moft_channels, moft_loss
from corrdit.motion.motion_error import MotionError, direction_agreement, motion_error
from corrdit.motion.prompt_similarity import PromptSimilarity
from corrdit.motion.smm import smm_loss
from corrdit.motion.temporal_attention import diagonal_roughness, temporal_attention, temporal_attention_loss
from corrdit.motion.word_attention import boxes_on_path, inside_loss, word_attention

__all__ = [
    "MotionError",
    "PromptSimilarity",
    "attention_flow_loss",
    "boxes_on_path",
    "coarse_centers",
    "diagonal_roughness",
    "direction_agreement",
    "flow_loss",
    "inside_loss",
    "latent_displacement",
    "moft_channels",
    "moft_loss",
    "motion_error",
    "smm_loss",
    "temporal_attention",
    "temporal_attention_loss",
    "tracking_loss",
    "word_attention",
]
