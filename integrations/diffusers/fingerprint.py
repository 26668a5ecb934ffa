"""What tells one model from another in a folder of results: a digest of samples of its weights, and its preset."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import torch

from corrdit.tracking.options import ReadingPreset

_READ = (*(field.name for field in fields(ReadingPreset)), "tracking", "guidance", "transfer")
MODEL_FACTS = ("weights", *(f"preset.{name}" for name in _READ))
"""The names `model_facts` gives."""

SAMPLES_PER_TENSOR = 64


def model_facts(backbone: Any) -> dict[str, Any]:
    """What decides a reading of the model beside its name, as plain JSON values: `MODEL_FACTS` with their values.

    Args:
        backbone: what `corrdit.load_backbone` returns.
    """
    preset = backbone.preset.described()
    return {"weights": backbone.fingerprint(), **{f"preset.{name}": preset.get(name) for name in _READ}}


def weights_fingerprint(pipe: Any) -> str:
    """Precision and digest of all weights of a pipeline, such as "float32 91d2c0a87be44f10".

    The digest is of the name, shape and type of every tensor and of at most `SAMPLES_PER_TENSOR` of its values, evenly
    spread, so that a model of many gigabytes costs no more than reading a few megabytes. Any training step changes it;
    a change of single values may not. It does not depend on the device; tensors that are not in memory (layers that
    diffusers offloads one by one) count by name, shape and type only.

    Args:
        pipe: a diffusers pipeline.
    """
    digest = hashlib.sha256()
    components = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for name, component in sorted(components.items()):
        for key, tensor in sorted(component.state_dict().items()):
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            for part in _held(tensor.detach()):
                digest.update(_sampled(part))
    precision = str(pipe.transformer.dtype).removeprefix("torch.")
    return f"{precision} {digest.hexdigest()[:16]}"


def _held(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a tensor is made of: itself, or values and scales of a quantised one."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    return [tensor] if inner is None else [getattr(tensor, name) for name in inner()[0]]


def _sampled(tensor: torch.Tensor) -> bytes:
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    stride = max(1, tensor.numel() // SAMPLES_PER_TENSOR)
    values = tensor.reshape(-1)[::stride][:SAMPLES_PER_TENSOR].cpu().contiguous()
    return values.view(torch.uint8).numpy().tobytes()
