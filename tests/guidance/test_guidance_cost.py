"""What guidance costs: blocks run, pairs attended to, memory held."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch.utils._python_dispatch import TorchDispatchMode

from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance
from corrdit.testing import tiny_generation, tiny_pipeline

HEADS, HEAD_DIM, TEXT = 2, 24, 8  # no layer but attention multiplies over 24 channels
FRAMES, SIDE = 5, 8
VIDEO = FRAMES * SIDE * SIDE


@pytest.fixture
def deep_pipeline() -> Any:
    """30 layers; its grid is 5 frames of 8 x 8 tokens, wider than any of its layers."""
    pipe = tiny_pipeline("cogvideox")
    torch.manual_seed(0)
    pipe.transformer = CogVideoXTransformer3DModel(
        **{
            **pipe.transformer.config,
            "num_layers": 30,
            "attention_head_dim": HEAD_DIM,
            "sample_height": 2 * SIDE,
            "sample_width": 2 * SIDE,
        }
    ).eval()
    return pipe


def generate(pipe: Any, guided: bool = True, steps: int = 1) -> torch.Tensor:
    size = {"height": 16 * SIDE, "width": 16 * SIDE, "num_frames": 4 * FRAMES - 3}
    return pipe(**{**tiny_generation("cogvideox", guided=guided, steps=steps), **size}).frames


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Samples of every block evaluation, in order."""
    seen: list[int] = []
    forward = CogVideoXBlock.forward

    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden_states.shape[0])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(CogVideoXBlock, "forward", counted)
    return seen


def test_prefix_blocks_are_not_run_again(deep_pipeline: Any, evaluations: list[int]) -> None:
    with CrossAttentionGuidance(deep_pipeline, layers=(13, 17, 21)):
        generate(deep_pipeline, steps=2)
    assert evaluations == 2 * ([2] * 30 + [1] * 17)
    evaluations.clear()
    with CrossAttentionGuidance(deep_pipeline, layers=(13, 17, 21), perturbation="skip"):
        generate(deep_pipeline, guided=False)
    assert evaluations == [1] * 30 + [1] * 14
    evaluations.clear()
    with CrossAttentionGuidance(deep_pipeline, layers=(13, 17, 21), scale=0.0):
        generate(deep_pipeline)
    assert evaluations == [2] * 30


class _Pairs(TorchDispatchMode):
    """Counts query-key pairs of attention and refuses maps of all tokens by all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.name()
        if "scaled_dot_product" in name or "flash_attention" in name:
            query, key = args[0], args[1]
            self.pairs += query.shape[:-1].numel() * key.shape[-2]
        elif name.startswith(("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")):
            left, right = args[1:3] if "add" in name else args[:2]
            if left.shape[-1] == HEAD_DIM:  # q.k; P.v has the same number
                self.pairs += left.shape[:-1].numel() * right.shape[-1]
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
                assert min(tensor.shape[-2:]) < VIDEO, f"{name} made a map of {tuple(tensor.shape)}"
        return output


def test_perturbed_attention_touches_few_pairs_and_makes_no_map(deep_pipeline: Any) -> None:
    def pairs(guidance: CrossAttentionGuidance | None) -> int:
        counter = _Pairs()
        with counter:
            if guidance is None:
                generate(deep_pipeline, guided=False)
            else:
                with guidance:
                    generate(deep_pipeline, guided=False)
        return counter.pairs

    full = HEADS * (VIDEO + TEXT) ** 2
    plain = pairs(None)
    assert plain == 30 * full
    extra = pairs(CrossAttentionGuidance(deep_pipeline, layers=(13, 17, 21), renormalize=True)) - plain
    perturbed = (extra - 14 * full) / 3
    assert perturbed <= HEADS * (VIDEO * VIDEO / FRAMES + VIDEO * TEXT + TEXT * (VIDEO + TEXT))
    assert perturbed > HEADS * VIDEO * VIDEO / FRAMES


class _Maps(TorchDispatchMode):
    """Results with as many rows and columns as there are video tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.found: dict[str, tuple[int, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and min(tensor.shape[-2:]) >= self.tokens:
                self.found[func.name()] = tuple(tensor.shape)
        return output


@pytest.mark.parametrize(
    "options", [{}, {"renormalize": False, "heads": [0]}, {"span": 1}, {"perturbation": "identity"}]
)
@pytest.mark.parametrize("name", ["wan", "hunyuanvideo", "ltx", "mochi"])
def test_no_family_gets_a_map_of_all_tokens(name: str, options: dict[str, Any]) -> None:
    side, frames = (256 if name == "ltx" else 128), (25 if name == "mochi" else 17)
    tokens = 3 * 8 * 8 if name == "ltx" else 5 * 8 * 8
    generation = {**tiny_generation(name, steps=2), "height": side, "width": side, "num_frames": frames}
    pipe = tiny_pipeline(name)
    with _Maps(tokens) as maps, CrossAttentionGuidance(pipe, (1, 2), **options):
        pipe(**generation)
    assert maps.found == {}


class _LiveMemory(TorchDispatchMode):
    """Peak of the bytes of tensors that were made inside and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._seen[key] = weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        del self._seen[key]
        self.live -= size


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "no-cfg"])
def test_memory_grows_by_one_sample_at_most(deep_pipeline: Any, guided: bool) -> None:
    def peak(scale: float) -> int:
        with _LiveMemory() as memory, CrossAttentionGuidance(deep_pipeline, layers=(13, 17, 21), scale=scale):
            generate(deep_pipeline, guided=guided)
        return memory.peak

    activations = 4 * HEADS * HEAD_DIM * (VIDEO + TEXT)
    predictions = 2 * 4 * 4 * FRAMES * (2 * SIDE) ** 2
    scores_of_a_frame = 2 * 4 * SIDE**2 * (SIDE**2 + TEXT)
    # With two samples in the pipeline's own forward, the second one of a single sample stays below its peak.
    further = 0 if guided else predictions + scores_of_a_frame
    assert 0 <= peak(1.0) - peak(0.0) <= activations + further
