"""The digest that tells models apart: the same wherever a model is loaded, another after any training step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from corrdit import load_backbone
from corrdit.integrations.diffusers.fingerprint import MODEL_FACTS, model_facts, weights_fingerprint
from corrdit.integrations.diffusers.placement import Placement, placed_backbone
from corrdit.testing import tiny_backbone, tiny_pipeline


def test_it_is_the_models_whoever_loads_it(tmp_path):
    pipe = tiny_pipeline("wan-2.2", seed=3)
    pipe.save_pretrained(tmp_path)
    found = weights_fingerprint(pipe)
    assert found == weights_fingerprint(load_backbone(tmp_path).pipe)
    assert found != weights_fingerprint(tiny_pipeline("wan-2.2", seed=4))
    assert found.startswith("float32 ")
    assert weights_fingerprint(pipe.to(torch.bfloat16)).startswith("bfloat16 ")


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae"])
def test_a_training_step_of_any_part_changes_it(component):
    pipe = tiny_pipeline("wan-2.2")
    before = weights_fingerprint(pipe)
    parameters = list(getattr(pipe, component).parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter += 1e-6 * torch.randn(parameter.shape)
    assert weights_fingerprint(pipe) != before


def test_all_tensors_count_and_none_is_read_whole(monkeypatch):
    pipe = tiny_pipeline("cogvideox")
    before = weights_fingerprint(pipe)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            kept = parameter.flatten()[0].clone()
            parameter.view(-1)[0] += 1
            assert weights_fingerprint(pipe) != before
            parameter.view(-1)[0] = kept
    assert weights_fingerprint(pipe) == before
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.numel()) or cpu(tensor))
    weights_fingerprint(pipe)
    assert max(moved) <= 64
    assert len(moved) > 100


def test_tensors_that_are_not_in_memory_count_by_name():
    pipe = tiny_pipeline("cogvideox")
    pipe.transformer.to("meta")
    assert weights_fingerprint(pipe) == weights_fingerprint(pipe)
    pipe.transformer.register_buffer("another", torch.zeros(2, device="meta"))
    assert weights_fingerprint(pipe) != weights_fingerprint(tiny_pipeline("cogvideox"))


def test_facts_are_plain_and_follow_the_preset():
    backbone = tiny_backbone("cogvideox")
    facts = model_facts(backbone)
    assert tuple(facts) == MODEL_FACTS
    assert json.loads(json.dumps(facts)) == facts
    backbone.preset = replace(
        backbone.preset, reading=replace(backbone.preset.reading, head_weights=(0.5, 0.5)), source="elsewhere"
    )
    changed = {name for name, value in model_facts(backbone).items() if value != facts[name]}
    assert changed == {"preset.head_weights"}


def test_weights_that_are_placed_in_another_form_are_those_that_were_loaded():
    plain = placed_backbone("embedded", device=None, dtype=None)
    packed = placed_backbone("embedded", device=None, dtype=None, placement=Placement(weights="float8"))
    assert weights_fingerprint(packed.pipe) != weights_fingerprint(plain.pipe)
    assert model_facts(packed) == model_facts(plain)
    assert packed.with_features().fingerprint() == plain.with_features().fingerprint()
