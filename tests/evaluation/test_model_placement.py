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


@pytest.mark.parametrize("parts", ["offload_layers", "shards"])
@pytest.mark.parametrize("weights", ["float8", "int8"])
def test_weights_that_accelerate_replaces_are_not_packed(parts, weights):
    with pytest.raises(ValueError, match=f'weights="{weights}" does not go with placement="{parts}"'):
        model_placement.Placement(parts, weights=weights)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"parts": "ofload"}, "placement must be one of device, .* did you mean offload"),
        ({"weights": "fp8"}, "weights must be one of own, float8, int8"),
        ({"codec_tiling": "yes"}, "codec_tiling must be True or False"),
        ({"codec_slicing": 2}, "codec_slicing must be True or False"),
    ],
)
def test_placements_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_placement.Placement(**arguments)
    with pytest.raises(ValueError, match="placement must be a Placement or one of"):
        model_placement.placement_of(3)


def test_int8_without_torchao_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(model_placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs torchao, which is not installed"):
        model_placement.placed_backbone(
            "no model", device=CPU, dtype=None, placement=model_placement.Placement(weights="int8")
        )


def test_released_transfers_are_offloaded_on_a_gpu_alone():
    cuda, released = torch.device("cuda"), model_placement.released_placement
    expected = model_placement.Placement("offload", codec_tiling=True, codec_slicing=True)
    for model in ("cogvideox-5b", "CogVideoX-2B", "THUDM/CogVideoX-5b"):
        assert released(model, cuda) == expected
        assert released(model, CPU) == released(model, None) == model_placement.Placement()
    for model in ("embedded", "hunyuanvideo", "some/folder"):
        assert released(model, cuda) == model_placement.Placement()


@pytest.mark.parametrize("name, dtype", [("cogvideox-2b", "float16"), ("THUDM/CogVideoX-5b", "bfloat16")])
def test_offloaded_models_have_their_published_precision(monkeypatch, name, dtype):
    asked = {}
    backbone = backbone_of(tiny_pipeline("cogvideox"))
    monkeypatch.setattr(
        model_placement.loading, "load_backbone", lambda model, **given: asked.update(given) or backbone
    )
    monkeypatch.setattr(model_placement, "place", lambda *given: asked.update(placed=given))
    cuda = torch.device("cuda")
    model_placement.placed_backbone(name, device=cuda, dtype=None, placement="offload")
    assert (asked["device"], asked["dtype"]) == ("cpu", getattr(torch, dtype))
    assert asked["placed"] == (backbone.pipe, model_placement.Placement("offload"), cuda)


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


def test_both_transformers_of_a_pipeline_are_spread(monkeypatch):
    monkeypatch.setattr(model_placement, "available_memory", lambda: {"cpu": 10**9})
    spread = []
    monkeypatch.setattr(model_placement, "spread", lambda transformer, memory: spread.append(transformer))
    pipe = tiny_pipeline("wan-2.2")
    both = [pipe.transformer, pipe.transformer_2]
    moved = []

    def full(device):
        moved.append((pipe.transformer, pipe.transformer_2))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pipe, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        model_placement.place(pipe, "shards", CPU)
    assert moved == [(None, None)]
    assert [pipe.transformer, pipe.transformer_2] == both
    monkeypatch.setattr(pipe, "to", lambda device: pipe)
    model_placement.place(pipe, "shards", CPU)
    assert spread == [pipe.transformer, pipe.transformer_2] == both


def test_a_model_is_loaded_with_the_precision_asked_for():
    backbone = model_placement.placed_backbone("embedded", device=CPU, dtype="float64", placement="device")
    assert backbone.dtype == torch.float64
    assert model_placement.placed_backbone(backbone, device=CPU, dtype=None, placement="device") is backbone
