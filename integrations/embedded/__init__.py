"""The embedded video diffusion transformer: CogVideoX's architecture, small, trained on the generated world."""

from corrdit.integrations.embedded.loading import load_embedded_pipeline
from corrdit.integrations.embedded.preset import read_preset

__all__ = ["load_embedded_pipeline", "read_preset"]
