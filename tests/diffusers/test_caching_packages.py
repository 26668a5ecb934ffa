"""cache-dit and ParaAttention, where they are installed: what they leave out is noticed, or computed beside the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from corrdit import capture
from corrdit.testing import tiny_generation, tiny_pipeline

STEPS = 6
LAYERS = [0, 2]


def with_para_attention(pipe: Any) -> None:
    caching = pytest.importorskip("para_attn.first_block_cache.diffusers_adapters")
    caching.apply_cache_on_pipe(pipe, residual_diff_threshold=1e6)


def with_cache_dit(pipe: Any) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=1e6
    )
    cache_dit.enable_cache(pipe, cache_config=config)


PACKAGES: dict[str, Callable[[Any], None]] = {"ParaAttention": with_para_attention, "cache-dit": with_cache_dit}


def cached_pipeline(package: str) -> Any:
    pipe = tiny_pipeline("wan")
    # The packages replace the call of the pipeline's class; this one goes with the test.
    pipe.__class__ = type("WanPipeline", (type(pipe),), {"__module__": type(pipe).__module__})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PACKAGES[package](pipe)
    return pipe


def scores(q: torch.Tensor, k: torch.Tensor, *further: Any) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).mean(1)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_left_out_is_named(package: str) -> None:
    pipe = cached_pipeline(package)

    def run() -> None:
        with capture(pipe, layers=[2], operation=scores):
            pipe(**tiny_generation("wan", steps=STEPS))

    with pytest.raises(
        ValueError, match=rf"never fired for \(step \d, layer 2\).*{package}, which replaced the forward"
    ):
        run()


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_left_out_is_computed_beside(package: str) -> None:
    pipe = cached_pipeline(package)
    calls: list[dict[str, Any]] = []

    def keep(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append({key: value.clone() if torch.is_tensor(value) else value for key, value in kwargs.items()})

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    plain = pipe(**tiny_generation("wan", steps=STEPS)).frames
    handle.remove()
    assert not torch.equal(plain, tiny_pipeline("wan")(**tiny_generation("wan", steps=STEPS)).frames)
    with capture(pipe, layers=LAYERS, operation=scores, on_skip="compute") as captured:
        again = pipe(**tiny_generation("wan", steps=STEPS)).frames
    assert torch.equal(plain, again)
    clean = tiny_pipeline("wan").transformer
    for step, arguments in enumerate(calls[::2]):
        with torch.no_grad(), capture(clean, layers=LAYERS, operation=scores) as expected:
            clean(**arguments)
        for layer in LAYERS:
            torch.testing.assert_close(captured[step, layer], expected[0, layer])
