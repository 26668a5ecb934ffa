"""Every operation with its baselines and the work that it cannot do without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from corrdit import ops
from corrdit.benchmark import floors
from corrdit.benchmark.baselines import compiled, folded_chunks, materialized, sdpa, window_gather
from corrdit.benchmark.floors import QUERY_TOKENS, WINDOW, Work, WorkOf
from corrdit.benchmark.shapes import Shape
from corrdit.grid import TokenGrid

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scene:
    """Inputs of a call; `video` has no text tokens, and neither have its q and k."""

    grid: TokenGrid
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def video(self) -> tuple[Tensor, Tensor, TokenGrid]:
        part = self.grid.video_slice
        return self.q[:, :, part], self.k[:, :, part], self.grid.without_text()

    @functools.cached_property
    def chosen_tokens(self) -> Tensor:
        tokens = self.grid.tokens_per_frame
        return torch.linspace(0, tokens - 1, min(QUERY_TOKENS, tokens), device=self.q.device).round().long()


BASELINES = {
    "materialized": "all heads and all pairs at once, as the released code does",
    "folded-chunks": "one product over the joined heads, query rows in chunks",
    "folded-compiled": "torch.compile of those chunks",
    "folded-autotuned": "the same in its mode max-autotune-no-cudagraphs",
    "sdpa": "scaled_dot_product_attention: the coordinates as values, or frame by frame",
    "sdpa-flash": "the same by PyTorch's flash kernel alone",
    "sdpa-cudnn": "the same by that of cuDNN alone",
    "flash-3": "the same by FlashAttention-3, where it is installed",
    "flex": "FlexAttention: the coordinates as values, or a block mask",
    "flex-flash": "the same by FlashAttention's kernels, where torch and flash_attn have that",
    "compiled": "torch.compile of the reference",
    "windows": "keys gathered into a window for each query, as FastVMT does",
}
MapBytes = Callable[[Shape, int], float]


@dataclass(frozen=True)
class Baseline:
    """Another way to compute an operation.

    Attributes:
        run: the call.
        map_bytes: bytes of the score maps it holds at once, from the shape and the bytes of a number.
        forward_only_on: the kind of device on which it has no backward pass.
        missing: why it does not run at all on a kind of device, None where it does.
        compile_seconds: about what a compiler takes at its first call of a shape and pass; 0 where there is none.
        about: says what to know of a call, such as which library kernel it ends up in.
    """

    run: Callable[[Scene], Results]
    map_bytes: MapBytes = lambda shape, element_bytes: 0.0
    forward_only_on: str | None = None
    missing: Callable[[str], str | None] = lambda device_type: None
    compile_seconds: float = 0.0
    about: Callable[[Scene], str] | None = None


@dataclass(frozen=True)
class Comparison:
    """An operation, its baselines, and its work.

    Attributes:
        run: the call; takes the backend.
        forward: what the forward pass cannot do without.
        backward: the same of the backward pass; None without gradients.
        pair_maps: whether the reference holds the maps of one pair of frames at a time, not of all tokens.
    """

    run: Callable[[Scene, str], Results]
    forward: WorkOf
    backward: WorkOf | None = None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    pair_maps: bool = True

    def work(self, shape: Shape, backward: bool) -> Work:
        """What one timed call does: the forward pass, and the backward pass with it if asked for."""
        if not backward:
            return self.forward(shape)
        assert self.backward is not None, "an operation without gradients has no backward pass"
        return self.forward(shape) + self.backward(shape)


# About what inductor takes for one function, forward and backward, and what it takes to try its kernels' tiles.
_COMPILED, _AUTOTUNED = 30.0, 120.0


def _missing_on_cpu(device_type: str) -> str | None:
    return "does not run on cpu" if device_type == "cpu" else None


def _flash_3_missing(device_type: str) -> str | None:
    absent = None if compiled.installed("flash_attn_interface") else "flash_attn_interface is not installed"
    return _missing_on_cpu(device_type) or absent


def _flex_flash_missing(device_type: str) -> str | None:
    return _missing_on_cpu(device_type) or compiled.flash_missing()


def _all_pairs(maps: float) -> MapBytes:
    return lambda shape, element_bytes: maps * shape.heads * shape.grid.tokens**2 * element_bytes


def _source_pairs(maps: float) -> MapBytes:
    return lambda shape, element_bytes: (
        maps * shape.heads * shape.grid.video_tokens * shape.grid.tokens_per_frame * element_bytes
    )


def _soft(scene: Scene, backend: str, **options: object) -> Results:
    return (ops.soft_displacement(scene.q, scene.k, scene.grid, backend=backend, **options),)  # type: ignore[call-overload]


def _compiled_soft(**options: object) -> Baseline:
    return Baseline(
        lambda s: (compiled.soft_displacement(*s.video, **options),),  # type: ignore[arg-type]
        map_bytes=lambda shape, _: 8.0 * shape.heads * shape.grid.tokens_per_frame**2,
        compile_seconds=_COMPILED,
    )


def _sdpa_soft(heads: str) -> Baseline:
    return Baseline(
        lambda s: (sdpa.soft_displacement(*s.video, heads=heads),),
        about=lambda s: sdpa.displacement_kernel(*s.video, heads),
    )


def _attention_of(call: Callable[[Scene, sdpa.Attend], Results]) -> dict[str, Baseline]:
    """What `sdpa` does, by one kernel each."""
    flash, cudnn = (sdpa.only(backend) for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION))
    return {
        "sdpa-flash": Baseline(lambda s: call(s, flash)),
        "sdpa-cudnn": Baseline(lambda s: call(s, cudnn), missing=_missing_on_cpu),
        "flash-3": Baseline(lambda s: call(s, sdpa.flash_attention_3), missing=_flash_3_missing),
    }


def _folded_compiled(mode: str, seconds: float) -> Baseline:
    return Baseline(lambda s: (compiled.folded_soft_displacement(*s.video, mode=mode),), compile_seconds=seconds)


def _matching(bidirectional: bool) -> Comparison:
    directions = 2 if bidirectional else 1
    return Comparison(
        lambda s, backend: tuple(ops.match(s.q, s.k, s.grid, bidirectional=bidirectional, backend=backend)),
        floors.match(directions),
        baselines={
            "materialized": Baseline(
                lambda s: tuple(materialized.match(*s.video, bidirectional=bidirectional)),
                map_bytes=_source_pairs(2.0),
            ),
            "compiled": Baseline(
                lambda s: compiled.match(*s.video, bidirectional=bidirectional), compile_seconds=_COMPILED
            ),
        },
    )


def _frame_local(renormalize: bool, baselines: Mapping[str, Baseline]) -> Comparison:
    everywhere = {
        "materialized": Baseline(
            lambda s: (materialized.frame_local_attention(s.q, s.k, s.v, s.grid, renormalize=renormalize),),
            map_bytes=_all_pairs(2.0),
        ),
        "compiled": Baseline(
            lambda s: (compiled.frame_local_attention(s.q, s.k, s.v, s.grid, renormalize=renormalize),),
            map_bytes=lambda shape, _: _all_pairs(2.0)(shape, 4),
            compile_seconds=_COMPILED,
        ),
        "flex": Baseline(
            lambda s: (compiled.flex_frame_local_attention(s.q, s.k, s.v, s.grid, renormalize=renormalize),),
            forward_only_on="cpu",
            # Zeroing after the softmax needs the sums of both softmaxes, which FlexAttention does not give on a CPU.
            missing=(lambda device_type: None) if renormalize else _missing_on_cpu,
            compile_seconds=_COMPILED,
        ),
    }
    return Comparison(
        lambda s, backend: (
            ops.frame_local_attention(s.q, s.k, s.v, s.grid, renormalize=renormalize, backend=backend),
        ),
        floors.frame_local(zeroed=not renormalize),
        floors.frame_local(zeroed=not renormalize, backward=True),
        baselines={**everywhere, **baselines},
        pair_maps=False,
    )


def _displacement_work(maps: Callable[[Shape], int], pairs: Callable[[Shape], float]) -> tuple[WorkOf, WorkOf]:
    return floors.displacement(maps, pairs), floors.displacement(maps, pairs, backward=True)


COMPARISONS = {
    "soft_displacement:logits": Comparison(
        _soft,
        *_displacement_work(lambda shape: 1, floors.all_pairs),
        baselines={
            "materialized": Baseline(lambda s: (materialized.soft_displacement(*s.video),), map_bytes=_all_pairs(2.0)),
            "folded-chunks": Baseline(lambda s: (folded_chunks.soft_displacement(*s.video),)),
            "folded-compiled": _folded_compiled("default", _COMPILED),
            "folded-autotuned": _folded_compiled("max-autotune-no-cudagraphs", _AUTOTUNED),
            "sdpa": _sdpa_soft("logits"),
            "compiled": _compiled_soft(heads="logits"),
        },
    ),
    "soft_displacement:probabilities": Comparison(
        functools.partial(_soft, heads="probabilities"),
        *_displacement_work(lambda shape: shape.heads, floors.all_pairs),
        baselines={
            "sdpa": _sdpa_soft("probabilities"),
            **_attention_of(
                lambda s, attend: (sdpa.soft_displacement(*s.video, heads="probabilities", attend=attend),)
            ),
            "flex": Baseline(
                lambda s: (compiled.flex_soft_displacement(*s.video),), forward_only_on="cpu", compile_seconds=_COMPILED
            ),
            "flex-flash": Baseline(
                lambda s: (compiled.flex_soft_displacement(*s.video, options=compiled.FLASH),),
                missing=_flex_flash_missing,
                compile_seconds=_COMPILED,
            ),
            "compiled": _compiled_soft(heads="probabilities"),
        },
    ),
    "soft_displacement:window": Comparison(
        functools.partial(_soft, window=WINDOW),
        *_displacement_work(lambda shape: 1, floors.window_pairs),
        baselines={
            "windows": Baseline(
                lambda s: (window_gather.soft_displacement(*s.video, window=WINDOW),),
                map_bytes=lambda shape, size: window_gather.ROWS * (2 * WINDOW + 1) ** 2 * shape.channels * float(size),
            ),
            "compiled": _compiled_soft(heads="logits", window=WINDOW),
        },
    ),
    "hard_displacement:logits": Comparison(
        lambda s, backend: (ops.hard_displacement(s.q, s.k, s.grid, backend=backend),),
        floors.displacement(lambda shape: 0, floors.all_pairs),
        baselines={
            "materialized": Baseline(lambda s: (materialized.hard_displacement(*s.video),), map_bytes=_all_pairs(2.0)),
            "folded-chunks": Baseline(lambda s: (folded_chunks.hard_displacement(*s.video),)),
            "compiled": Baseline(lambda s: (compiled.hard_displacement(*s.video),), compile_seconds=_COMPILED),
        },
    ),
    "match:bidirectional": _matching(True),
    "match:forward": _matching(False),
    "cost_rows": Comparison(
        lambda s, backend: (ops.cost_rows(s.q, s.k, s.grid, s.chosen_tokens, backend=backend),),
        floors.cost_rows,
        baselines={
            "materialized": Baseline(
                lambda s: (materialized.cost_rows(*s.video, s.chosen_tokens),), map_bytes=_source_pairs(3.0)
            ),
            "compiled": Baseline(lambda s: (compiled.cost_rows(*s.video, s.chosen_tokens),), compile_seconds=_COMPILED),
        },
    ),
    "attention_mass": Comparison(
        lambda s, backend: tuple(ops.attention_mass(s.q, s.k, s.grid, s.chosen_tokens, backend=backend)),
        floors.attention_mass,
        baselines={
            "materialized": Baseline(
                lambda s: materialized.attention_mass(s.q, s.k, s.grid, s.chosen_tokens),
                map_bytes=lambda shape, size: 2.0 * shape.heads * QUERY_TOKENS * shape.grid.tokens * size,
            ),
            "compiled": Baseline(
                lambda s: compiled.attention_mass(s.q, s.k, s.grid, s.chosen_tokens), compile_seconds=_COMPILED
            ),
        },
        pair_maps=False,
    ),
    "frame_local_attention:masked": _frame_local(
        True,
        {
            "sdpa": Baseline(
                lambda s: (sdpa.frame_local_attention(s.q, s.k, s.v, s.grid),),
                about=lambda s: sdpa.frame_local_kernel(s.q, s.k, s.v, s.grid),
            ),
            **_attention_of(lambda s, attend: (sdpa.frame_local_attention(s.q, s.k, s.v, s.grid, attend=attend),)),
            "flex-flash": Baseline(
                lambda s: (compiled.flex_frame_local_attention(s.q, s.k, s.v, s.grid, options=compiled.FLASH),),
                missing=_flex_flash_missing,
                compile_seconds=_COMPILED,
            ),
        },
    ),
    "frame_local_attention:zeroed": _frame_local(False, {}),
}
