"""Motion features and losses for transferring the motion of one video to another."""

from corrdit.motion.moft import moft_channels, moft_loss

__all__ = ["moft_channels", "moft_loss"]
