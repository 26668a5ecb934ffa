"""The guider of modular pipelines, in diffusers' own denoising blocks."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser

from corrdit.integrations.diffusers.guidance import CrossAttentionGuider
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.testing import tiny_pipeline

STEPS = 4
TIMESTEP = torch.tensor(700.0)


def state() -> BlockState:
    source = torch.Generator().manual_seed(0)
    prompts = {name: torch.randn(1, 8, 16, generator=source) for name in ("prompt_embeds", "negative_prompt_embeds")}
    latents = torch.randn(1, 4, 3, 8, 8, generator=source)
    return BlockState(
        latent_model_input=latents,
        dtype=torch.float32,
        num_inference_steps=STEPS,
        attention_kwargs=None,
        **prompts,
    )


def denoise(transformer: torch.nn.Module, guider: Any, step: int = 1) -> torch.Tensor:
    components = SimpleNamespace(transformer=transformer, guider=guider)
    with torch.no_grad():
        return WanLoopDenoiser()(components, state(), step, TIMESTEP)[1].noise_pred


def branches(helper: ModuleType, transformer: torch.nn.Module, layers: tuple[int, ...], weights: Any) -> Any:
    inputs = state()
    arguments = {"hidden_states": inputs.latent_model_input, "timestep": TIMESTEP[None], "return_dict": False}
    call = layout_of(transformer).read_call(transformer, arguments)
    with torch.no_grad():
        cond, uncond = (
            transformer(encoder_hidden_states=text, **arguments)[0]
            for text in (inputs.prompt_embeds, inputs.negative_prompt_embeds)
        )
        with helper.perturbed(transformer, layers, call, weights):
            perturbed = transformer(encoder_hidden_states=inputs.prompt_embeds, **arguments)[0]
    return cond, uncond, perturbed


@pytest.mark.parametrize("renormalize", [True, False])
def test_guided_prediction(three_branches: ModuleType, renormalize: bool) -> None:
    transformer = tiny_pipeline("wan").transformer
    cond, uncond, perturbed = branches(three_branches, transformer, (1, 2), three_branches.cross_frame(renormalize))
    options = {"layers": [1, -1], "perturbation_scale": 1.7, "renormalize": renormalize}
    guided = denoise(transformer, CrossAttentionGuider(5.0, **options))
    three_branches.assert_close(guided, uncond + 5 * (cond - uncond) + 1.7 * (cond - perturbed))
    without_cfg = denoise(transformer, CrossAttentionGuider(1.0, **options))
    three_branches.assert_close(without_cfg, cond + 1.7 * (cond - perturbed))


def test_schedule_and_zero_scale() -> None:
    transformer = tiny_pipeline("wan").transformer
    plain = denoise(transformer, ClassifierFreeGuidance(5.0))
    assert torch.equal(denoise(transformer, CrossAttentionGuider(5.0, layers=[1], perturbation_scale=0.0)), plain)
    early = CrossAttentionGuider(5.0, layers=[1], perturbation_start=0.5)
    assert torch.equal(denoise(transformer, early, step=1), plain)
    assert not torch.equal(denoise(transformer, early, step=2), plain)
    assert torch.equal(denoise(transformer, early, step=1), plain)
    fading = CrossAttentionGuider(5.0, layers=[1], adaptive_scale=0.001)
    steady = CrossAttentionGuider(5.0, layers=[1], perturbation_scale=0.7)
    torch.testing.assert_close(denoise(transformer, fading), denoise(transformer, steady))
    assert not transformer._forward_hooks


def test_config_round_trip() -> None:
    guider = CrossAttentionGuider(guidance_scale=4.0, layers=[1], perturbation="identity")
    other = guider.new(perturbation_scale=0.3)
    assert (other.guidance_scale, list(other.config.layers), other.config.perturbation) == (4.0, [1], "identity")
    assert other._options.scale == 0.3


@pytest.mark.parametrize("batch", ["own", "perturbed"])
def test_model_is_clean_after_an_exception(batch: str) -> None:
    transformer = tiny_pipeline("wan").transformer
    plain = denoise(transformer, ClassifierFreeGuidance(5.0))
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == (1 if batch == "own" else 2):
            raise RuntimeError("stop")

    handle = transformer.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        denoise(transformer, CrossAttentionGuider(5.0, layers=[1]))
    handle.remove()
    assert not transformer._forward_hooks
    assert not transformer._forward_pre_hooks
    assert all(not block._forward_hooks and "forward" not in vars(block) for block in transformer.blocks)
    assert torch.equal(denoise(transformer, ClassifierFreeGuidance(5.0)), plain)


def test_a_share_that_holds_no_step_is_refused() -> None:
    guider = CrossAttentionGuider(5.0, layers=[1], perturbation_start=0.8)
    with pytest.raises(ValueError, match="is none of the 4 denoising steps"):
        denoise(tiny_pipeline("wan").transformer, guider, step=0)


def test_one_layer_and_one_head_as_numbers() -> None:
    transformer = tiny_pipeline("wan").transformer
    numbers = denoise(transformer, CrossAttentionGuider(5.0, layers=0, heads=1))
    assert torch.equal(numbers, denoise(transformer, CrossAttentionGuider(5.0, layers=[0], heads=[1])))
    assert not torch.equal(numbers, denoise(transformer, CrossAttentionGuider(5.0, layers=0)))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="layers is empty"):
        CrossAttentionGuider(5.0)
    with pytest.raises(ValueError, match="layers is empty"):
        CrossAttentionGuider(5.0, layers=None)
    with pytest.raises(ValueError, match="scale must be a finite number"):
        CrossAttentionGuider(5.0, layers=[1], perturbation_scale=-1.0)
    with pytest.raises(ValueError, match="layer 9 is outside"):
        denoise(tiny_pipeline("wan").transformer, CrossAttentionGuider(5.0, layers=[9]))
