"""Guidance in the pipelines and settings that differ most from text-to-video: what each forward returns."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    CogVideoXVideoToVideoPipeline,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)

from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance
from corrdit.integrations.diffusers.guidance.perturbed_pass import PerturbedPass
from corrdit.testing import tiny_generation, tiny_pipeline

SCALE = 1.7
LAYERS = (1, 2)


def second_of_two(index: int) -> bool:
    return index % 2 == 1


def check(branches: ModuleType, pipe: Any, generation: dict[str, Any], uncond: Any = None) -> int:
    pipe.set_progress_bar_config(disable=True)
    guidance = CrossAttentionGuidance(pipe, LAYERS, SCALE)
    return branches.check_outputs(pipe, generation, guidance, LAYERS, SCALE, uncond)


def image(seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "no-cfg"])
def test_ltx_image_to_video(three_branches: ModuleType, guided: bool) -> None:
    pipe = LTXImageToVideoPipeline(**tiny_pipeline("ltx").components)
    generation = {**tiny_generation("ltx", steps=2, guided=guided), "image": torch.rand(1, 3, 128, 128)}
    assert check(three_branches, pipe, generation) == 2


@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "no-cfg"])
def test_wan_image_to_video(three_branches: ModuleType, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text_to_video = tiny_pipeline("wan")
    changes = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = WanTransformer3DModel(**{**text_to_video.transformer.config, **changes}).eval()
    parts = {**text_to_video.components, "transformer": transformer, "image_encoder": None, "image_processor": None}
    pipe = WanImageToVideoPipeline(**parts)
    monkeypatch.setattr(pipe, "encode_image", lambda *args: torch.full((1, 5, 16), 0.3))
    generation = {**tiny_generation("wan", steps=2, guided=guided), "image": image()}
    assert check(three_branches, pipe, generation, second_of_two if guided else None) == (4 if guided else 2)


@pytest.mark.parametrize("condition, channels", [("latent_concat", 9), ("token_replace", 4)])
def test_hunyuanvideo_image_to_video(three_branches: ModuleType, condition: str, channels: int) -> None:
    parts = tiny_pipeline("hunyuanvideo").components
    changes = {"in_channels": channels, "image_condition_type": condition, "guidance_embeds": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = HunyuanVideoTransformer3DModel(**{**parts["transformer"].config, **changes}).eval()
    pipe = HunyuanVideoImageToVideoPipeline(**{**parts, "transformer": transformer, "image_processor": None})
    generation = {**tiny_generation("hunyuanvideo", steps=2), "image": torch.rand(1, 3, 64, 64)}
    assert check(three_branches, pipe, generation, second_of_two) == 4


def test_conditions_that_add_tokens_are_refused() -> None:
    pipe = LTXConditionPipeline(**tiny_pipeline("ltx").components)
    pipe.scheduler.register_to_config(use_dynamic_shifting=False)
    with pytest.raises(ValueError, match="its tokens are not a grid of frames"), CrossAttentionGuidance(pipe, 1):
        pipe(**tiny_generation("ltx", steps=2))


def test_video_to_video_begins_in_the_middle(three_branches: ModuleType) -> None:
    pipe = CogVideoXVideoToVideoPipeline(**tiny_pipeline("cogvideox").components)
    pipe.set_progress_bar_config(disable=True)
    generation = tiny_generation("cogvideox", steps=5)
    del generation["num_frames"]
    generation |= {"video": torch.rand(1, 9, 3, 64, 64), "strength": 0.6}
    recorder = three_branches.Recorder(pipe, 1, True)
    with recorder.recording(), CrossAttentionGuidance(pipe, LAYERS, SCALE, start=0.3):
        pipe(**generation)
    assert len(recorder.predictions) == 3
    for step, prediction in enumerate(recorder.predictions):
        scale = SCALE if step else 0.0
        three_branches.assert_close(
            prediction, recorder.expected(step, LAYERS, scale, three_branches.cross_frame(True))
        )


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_second_order_scheduler(three_branches: ModuleType, name: str) -> None:
    pipe = tiny_pipeline(name)
    scheduler = HeunDiscreteScheduler if name == "cogvideox" else FlowMatchHeunDiscreteScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    recorder = three_branches.Recorder(pipe, 1, True)
    with recorder.recording(), CrossAttentionGuidance(pipe, LAYERS, SCALE):
        pipe(**tiny_generation(name, steps=3))
    assert len(recorder.predictions) == 5
    for step, prediction in enumerate(recorder.predictions):
        three_branches.assert_close(
            prediction, recorder.expected(step, LAYERS, SCALE, three_branches.cross_frame(True))
        )


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuanvideo", "ltx"])
def test_fused_projections(name: str) -> None:
    pipe = tiny_pipeline(name)
    with CrossAttentionGuidance(pipe, LAYERS):
        expected = pipe(**tiny_generation(name, steps=2)).frames
    pipe.transformer.fuse_qkv_projections()
    fused = [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]
    with CrossAttentionGuidance(pipe, LAYERS):
        torch.testing.assert_close(pipe(**tiny_generation(name, steps=2)).frames, expected)
    assert fused == [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("perturbation", ["cross_frame", "skip"])
def test_hooks_of_accelerate_stay_paired(perturbation: str) -> None:
    """As offloading puts them round every module: what is brought in is taken out again."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    open_modules = 0

    class Paired(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            nonlocal open_modules
            open_modules += 1
            return args, kwargs

        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            nonlocal open_modules
            open_modules -= 1
            return output

    pipe = tiny_pipeline("hunyuanvideo")
    generation = {"steps": 2}
    with CrossAttentionGuidance(pipe, LAYERS, perturbation=perturbation):
        expected = pipe(**tiny_generation("hunyuanvideo", **generation)).frames
    for module in pipe.transformer.modules():
        add_hook_to_module(module, Paired())
    forwards = [vars(module)["forward"] for module in pipe.transformer.modules()]
    with CrossAttentionGuidance(pipe, LAYERS, perturbation=perturbation):
        assert torch.equal(pipe(**tiny_generation("hunyuanvideo", **generation)).frames, expected)
    assert open_modules == 0
    assert all(own is vars(module)["forward"] for own, module in zip(forwards, pipe.transformer.modules(), strict=True))


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_low_rank_adapters(three_branches: ModuleType, name: str) -> None:
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(name)
    adapter = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(adapter)
    generation = {**tiny_generation(name, steps=2), "attention_kwargs": {"scale": 0.3}}
    if name == "wan":
        check(three_branches, pipe, generation, second_of_two)
        return
    recorder = three_branches.Recorder(pipe, 1, True)
    with recorder.recording(), CrossAttentionGuidance(pipe, LAYERS, SCALE):
        pipe(**generation)
    for step, prediction in enumerate(recorder.predictions):
        expected = recorder.expected(step, LAYERS, SCALE, three_branches.cross_frame(True))
        three_branches.assert_close(prediction, expected)


@pytest.mark.parametrize("name", ["ltx", "mochi"])
def test_several_videos_for_each_of_several_prompts(three_branches: ModuleType, name: str) -> None:
    pipe, generation = tiny_pipeline(name), tiny_generation(name, steps=2)
    encoded = {key: generation.pop(key) for key in list(generation) if "prompt" in key}

    def encode(prompt: Any, num_videos_per_prompt: int, **further: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        kind = "prompt" if prompts[0] else "negative_prompt"
        embeds = encoded[f"{kind}_embeds"] + torch.arange(len(prompts))[:, None, None]
        mask = encoded[f"{kind}_attention_mask"].expand(len(prompts), -1)
        return tuple(tensor.repeat_interleave(num_videos_per_prompt, dim=0) for tensor in (embeds, mask))

    pipe._get_t5_prompt_embeds = encode
    generation |= {"prompt": ["a dog", "a cat"], "num_videos_per_prompt": 2}
    assert check(three_branches, pipe, generation) == 2


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_classifier_free_guidance_that_a_callback_ends_half_way(three_branches: ModuleType, name: str) -> None:
    """As in diffusers' SDCFGCutoffCallback."""

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return tensors
        pipe._guidance_scale = 0.0
        return tensors if name == "wan" else {"prompt_embeds": tensors["prompt_embeds"][1:]}

    generation = tiny_generation(name, steps=4)
    for key, value in generation.items():
        if key.endswith("attention_mask"):  # the pipeline hands no masks to callbacks, so they stay two
            generation[key] = torch.ones_like(value)
    generation |= {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    count = check(
        three_branches, tiny_pipeline(name), generation, (lambda index: index in (1, 3)) if name == "wan" else None
    )
    assert count == (6 if name == "wan" else 4)


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
@pytest.mark.parametrize(("start", "stop", "guided"), [(0.0, 0.5, [0, 1]), (0.25, 0.75, [1, 2]), (0.5, 1.0, [2, 3])])
def test_the_share_of_the_steps_ends_before_its_last(
    name: str, start: float, stop: float, guided: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, steps = tiny_pipeline(name), []
    own = PerturbedPass.run

    def counted(self: PerturbedPass, *arguments: Any) -> torch.Tensor:
        steps.append(guidance._steps.step)
        return own(self, *arguments)

    monkeypatch.setattr(PerturbedPass, "run", counted)
    with CrossAttentionGuidance(pipe, 1, start=start, stop=stop) as guidance:
        pipe(**tiny_generation(name, steps=4))
    assert steps == guided
    assert [step for step in range(4) if guidance.options.includes(step, 4)] == guided


@pytest.mark.parametrize(
    "further",
    [
        {"stg_scale": 1.5, "spatio_temporal_guidance_blocks": [1]},
        {"modality_scale": 2.0},
        {"stg_scale": 1.5, "spatio_temporal_guidance_blocks": [1], "modality_scale": 2.0, "guidance_scale": 1.0},
    ],
    ids=["stg", "modality", "both without cfg"],
)
def test_further_calls_of_a_step_keep_their_differences(further: dict[str, Any]) -> None:
    """What the guidance adds to the latents in a step does not depend on what else the pipeline adds.

    (Rescaling, which follows, looks at the whole.)
    """
    seen: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            seen.append(tensors["latents"].clone())
        return {}

    pipe = tiny_pipeline("ltx2")

    def run(options: dict[str, Any]) -> None:
        call = {**tiny_generation("ltx2", steps=2), "guidance_scale": 3.0, "guidance_rescale": 0.0, **options}
        pipe(**call, callback_on_step_end=keep)

    for options in ({}, further):
        run(options)
        with CrossAttentionGuidance(pipe, layers=(1,), scale=2.0):
            run(options)
    plain, guided, plain_with_more, guided_with_more = seen
    assert (guided - plain).abs().max() > 1e-3
    assert not torch.equal(plain_with_more, plain)
    torch.testing.assert_close(guided_with_more - plain_with_more, guided - plain, rtol=1e-4, atol=1e-5)
