"""What the sampler is given under guidance, against three whole branches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, UniPCMultistepScheduler

from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.testing import TINY_MODELS, tiny_generation, tiny_pipeline

SCALE = 1.7
LAYERS = (1, 2)
FIRST = ("cogvideox", "hunyuanvideo", "wan", "ltx", "mochi")
OWN_FORMULA = [
    name
    for name, model in TINY_MODELS.items()
    if (name.partition("-")[0] not in FIRST or model.variant) and not model.packed
]
"""Whose pipelines combine the branches in ways of their own."""
SHARED_FORMULA = [name for name, model in TINY_MODELS.items() if name not in OWN_FORMULA and not model.packed]


def guided_run(branches: ModuleType, pipe: Any, generation: dict[str, Any], guided: bool = True, **options: Any) -> Any:
    batch = generation["prompt_embeds"].shape[0]
    recorder = branches.Recorder(pipe, batch, guided)
    with recorder.recording(), CrossAttentionGuidance(pipe, **{"layers": LAYERS, "scale": SCALE, **options}):
        pipe(**generation)
    assert len(recorder.predictions) >= 2
    return recorder


def check_all_steps(branches: ModuleType, recorder: Any, weights: Any, heads: Any = None) -> None:
    for step, prediction in enumerate(recorder.predictions):
        branches.assert_close(prediction, recorder.expected(step, LAYERS, SCALE, weights, heads))


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("name", SHARED_FORMULA)
def test_prediction_is_that_of_three_branches(three_branches: ModuleType, name: str, guided: bool) -> None:
    renormalize = (name in ("cogvideox", "wan", "mochi")) == guided
    generation = tiny_generation(name, guided=guided, steps=2)
    recorder = guided_run(three_branches, tiny_pipeline(name), generation, guided, renormalize=renormalize)
    check_all_steps(three_branches, recorder, three_branches.cross_frame(renormalize))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if TINY_MODELS[n].variant else n for n in OWN_FORMULA]
)
def test_every_forward_is_shifted(three_branches: ModuleType, name: str) -> None:
    pipe = tiny_pipeline(name)
    separate = layout_of(pipe.transformer).guidance == "separate"
    guidance = CrossAttentionGuidance(pipe, layers=LAYERS, scale=SCALE, renormalize=True)
    generation = tiny_generation(name, steps=2)
    count = three_branches.check_outputs(
        pipe, generation, guidance, LAYERS, SCALE, (lambda index: index % 2 == 1) if separate else (lambda index: False)
    )
    assert count == (4 if separate else 2)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuanvideo", "mochi"])
def test_identity_attention_and_frame_windows(three_branches: ModuleType, name: str) -> None:
    pipe, generation = tiny_pipeline(name), tiny_generation(name, steps=2)
    recorder = guided_run(three_branches, pipe, generation, perturbation="identity")
    check_all_steps(three_branches, recorder, three_branches.identity)
    recorder = guided_run(three_branches, pipe, tiny_generation(name, steps=2), span=1, heads=[1])
    check_all_steps(three_branches, recorder, three_branches.cross_frame(True, span=1), heads=[1])


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "wan", "hunyuanvideo"])
def test_batches_of_prompts(three_branches: ModuleType, name: str) -> None:
    generation = tiny_generation(name, steps=2)
    other = tiny_generation(name, steps=2, seed=7)
    for key, value in generation.items():
        if isinstance(value, torch.Tensor):
            generation[key] = torch.cat([value, other[key]])
    check_all_steps(
        three_branches, guided_run(three_branches, tiny_pipeline(name), generation), three_branches.cross_frame(True)
    )


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_dynamic_guidance_changes_its_scale_after_the_forward(three_branches: ModuleType, scheduler: str) -> None:
    pipe = tiny_pipeline("cogvideox")
    if scheduler == "dpm":
        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    recorder = guided_run(
        three_branches, pipe, {**tiny_generation("cogvideox", steps=3), "use_dynamic_cfg": True, "eta": 0.0}
    )
    assert len(set(recorder.scales)) == 3
    check_all_steps(three_branches, recorder, three_branches.cross_frame(True))


def test_multistep_scheduler(three_branches: ModuleType) -> None:
    pipe = tiny_pipeline("wan")
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    recorder = guided_run(three_branches, pipe, tiny_generation("wan", steps=3))
    check_all_steps(three_branches, recorder, three_branches.cross_frame(True))


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuanvideo", "ltx", "mochi"])
def test_left_out_blocks_return_what_they_are_given(three_branches: ModuleType, name: str) -> None:
    pipe, generation = tiny_pipeline(name), {"guided": False, "steps": 2}

    def first_prediction() -> torch.Tensor:
        recorder = three_branches.Recorder(pipe, 1, False)
        with recorder.recording():
            pipe(**tiny_generation(name, **generation))
        return recorder.predictions[0]

    plain = first_prediction()
    blocks = pipe.transformer.blocks if name == "wan" else pipe.transformer.transformer_blocks
    left_out = blocks[1]
    del blocks[1]
    without = first_prediction()
    blocks.insert(1, left_out)
    with CrossAttentionGuidance(pipe, 1, scale=0.5, perturbation="skip"):
        guided = first_prediction()
    torch.testing.assert_close(guided, plain + 0.5 * (plain - without))


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "no-cfg"])
def test_published_variant_depends_on_classifier_free_guidance(three_branches: ModuleType, guided: bool) -> None:
    generation = tiny_generation("cogvideox", guided=guided, steps=2)
    recorder = guided_run(three_branches, tiny_pipeline("cogvideox"), generation, guided, preset="published")
    check_all_steps(three_branches, recorder, three_branches.cross_frame(renormalize=not guided))


@pytest.mark.parametrize("name", SHARED_FORMULA)
def test_scale_zero_is_bit_identical(name: str) -> None:
    pipe = tiny_pipeline(name)
    plain = pipe(**tiny_generation(name)).frames
    with CrossAttentionGuidance(pipe, LAYERS, scale=0.0):
        assert torch.equal(pipe(**tiny_generation(name)).frames, plain)


def test_start_stop_and_adaptive_scale(three_branches: ModuleType) -> None:
    pipe, steps = tiny_pipeline("cogvideox"), 4
    recorder = guided_run(
        three_branches, pipe, tiny_generation("cogvideox", steps=steps), start=0.25, stop=0.6, adaptive_scale=0.001
    )
    timesteps = pipe.scheduler.timesteps
    weights = three_branches.cross_frame(True)
    for step, prediction in enumerate(recorder.predictions):
        scale = max(0.0, SCALE - 0.001 * (1000 - float(timesteps[step]))) if step in (1, 2) else 0.0
        three_branches.assert_close(prediction, recorder.expected(step, LAYERS, scale, weights))


def test_half_precision_keeps_the_type() -> None:
    pipe = tiny_pipeline("cogvideox").to(torch.bfloat16)
    generation = tiny_generation("cogvideox", steps=2)
    generation = {
        key: value.bfloat16() if isinstance(value, torch.Tensor) else value for key, value in generation.items()
    }
    plain = pipe(**{**generation, "generator": torch.Generator().manual_seed(0)}).frames
    with CrossAttentionGuidance(pipe, LAYERS):
        guided = pipe(**{**generation, "generator": torch.Generator().manual_seed(0)}).frames
    assert guided.dtype == plain.dtype == torch.bfloat16
    assert not torch.equal(guided, plain)
    assert guided.isfinite().all()
