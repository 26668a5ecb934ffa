"""Why some transformers are refused, seen in what diffusers' own classes do; and what has no pipeline."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from corrdit.integrations.diffusers.backbones.base import NO_IMAGE
from corrdit.integrations.diffusers.backbones.cogvideox import CogVideoXBackbone
from corrdit.integrations.diffusers.backbones.table import BACKBONES
from corrdit.integrations.diffusers.family_layouts import REFUSED_TRANSFORMERS
from corrdit.testing import tiny_generation, tiny_pipeline

FRAMES, SIDE = 3, 4
"""Of tokens."""


class Calls(TorchFunctionMode):
    """Queries and keys of every call of attention by softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
            self.sizes.append((query.shape[2], key.shape[2]))
        return func(*args, **(kwargs or {}))


def latte() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=8, video_length=FRAMES, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False, attention_bias=True,
    )  # fmt: skip
    return model, (torch.randn(1, 4, FRAMES, 8, 8), torch.tensor([500]), torch.randn(1, 5, 8))


def sana_video() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, patch_size=(1, 2, 2),
    )  # fmt: skip
    return model, (torch.randn(1, 4, FRAMES, 8, 8), torch.randn(1, 5, 8), torch.tensor([500]))


@pytest.mark.parametrize("build", [latte, sana_video])
@torch.no_grad()
def test_no_softmax_runs_over_all_frames(build: Any) -> None:
    model, arguments = build()
    with Calls() as calls:
        model.eval()(*arguments)
    tokens = FRAMES * SIDE * SIDE
    assert calls.sizes
    assert (tokens, tokens) not in calls.sizes
    if build is latte:
        assert {(SIDE * SIDE, SIDE * SIDE), (FRAMES, FRAMES)} <= set(calls.sizes)


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("AnyFlowFAR", "forward", {"chunk_partition", "kv_cache"}),
        ("Helios", "forward", {"latents_history_short", "indices_latents_history_short"}),
        ("HunyuanVideoFramepack", "forward", {"latents_history_2x", "indices_latents_history_2x"}),
        ("Kandinsky6SR", "__init__", {"nabla_threshold", "tile_sizes"}),
        ("SanaWM", "__init__", {"softmax_every_n", "linear_head_dim"}),
    ],
)
def test_what_the_others_are_given(name: str, function: str, arguments: set[str]) -> None:
    kind = getattr(diffusers, f"{name}Transformer3DModel", None)
    assert f"{name}Transformer3DModel" in REFUSED_TRANSFORMERS
    if kind is None:
        pytest.skip(f"this diffusers has no {name}Transformer3DModel")
    assert arguments <= set(inspect.signature(getattr(kind, function)).parameters)


def test_families_without_images_have_no_pipeline_for_one() -> None:
    for backbone in BACKBONES:
        if backbone.limits is NO_IMAGE:
            family = backbone.pipelines[0].removesuffix("Pipeline")
            found = [kind for kind in dir(diffusers) if kind.startswith(family) and "Image" in kind]
            assert not [kind for kind in found if kind.endswith("Pipeline")], backbone


@pytest.mark.slow
def test_cogvideox_2b_takes_no_image_but_begins_at_a_repeated_one() -> None:
    parts = tiny_pipeline("cogvideox").components
    call = tiny_generation("cogvideox", steps=2)
    image = torch.rand(1, 3, 64, 64)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        diffusers.CogVideoXImageToVideoPipeline(**parts)(image=image, **call)
    frames = [np.asarray(image[0].permute(1, 2, 0))] * 9
    given = {name: value for name, value in call.items() if name != "num_frames"}
    made = diffusers.CogVideoXVideoToVideoPipeline(**parts)(video=frames, strength=1.0, **given).frames
    assert torch.isfinite(torch.as_tensor(made)).all()
    assert "has no weights for it" in CogVideoXBackbone.partly["image"]
