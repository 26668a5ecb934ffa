"""Models that do not fit one GPU: which of diffusers' and accelerate's ways is taken, and the same result."""

from __future__ import annotations

import pytest
import torch

from corrdit.integrations.diffusers import placement as model_placement
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.testing.tiny_models import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*has no text encoder")
CPU = torch.device("cpu")


class RecordingPipe:
    """Notes what it is asked to do."""

    def __init__(self):
        self.asked = []

    def enable_model_cpu_offload(self, device):
        self.asked.append(("model", device))

    def enable_sequential_cpu_offload(self, device):
        self.asked.append(("sequential", device))


@pytest.mark.parametrize("placement, way", [("offload", "model"), ("offload_layers", "sequential")])
def test_offloading_is_that_of_diffusers(placement, way):
    pipe, device = RecordingPipe(), torch.device("cuda", 1)
    model_placement.place(pipe, placement, device)
    assert pipe.asked == [(way, device)]


def test_a_spread_transformer_is_read_like_a_whole_one(monkeypatch):
    monkeypatch.setattr(model_placement, "available_memory", lambda: {"cpu": 10**9})
    results = []
    for spread in (False, True):
        pipe = tiny_pipeline("cogvideox-rotary")
        transformer = pipe.transformer
        if spread:
            model_placement.place(pipe, "shards", CPU)
        assert pipe.transformer is transformer
        backbone = backbone_of(pipe)
        latents = torch.randn(3, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        operation = {1: lambda q, k, grid, key_mask: q @ k.transpose(-1, -2)}
        results.append(backbone.forward(latents, 19.0, operation)[1])
    assert torch.equal(*results)


def test_a_model_is_loaded_with_the_precision_asked_for():
    backbone = model_placement.placed_backbone("embedded", device=CPU, dtype="float64", placement="device")
    assert backbone.dtype == torch.float64
    assert model_placement.placed_backbone(backbone, device=CPU, dtype=None, placement="device") is backbone
