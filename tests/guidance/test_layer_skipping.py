"""diffusers' own guiders that skip parts of layers, on the video transformers where they raise by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry
from diffusers.models.attention_dispatch import AttentionBackendName

from corrdit import capture
from corrdit.integrations.diffusers.guidance import CrossAttentionGuider, layer_skipping
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.testing.subject import Subject
from corrdit.testing import TINY_MODELS, tiny_backbone

STEPS = 4
FAST = ("cogvideox-rotary", "hunyuanvideo", "wan", "ltx", "mochi")
OTHERS = [
    name
    for name, model in TINY_MODELS.items()
    if "-" not in name and not model.variant and not model.packed and name not in FAST
]
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name != "cogvideox")]
WITHOUT_WHOLE_BLOCKS = ("kandinsky5", "kandinsky6", "ltx2")
"""Their blocks give their tensors other names than diffusers' hook asks for."""


def subject(name: str) -> Subject:
    return Subject.random(tiny_backbone(name), frames=3, batch=1, seed=0)


def predicted(found: Subject, guider: Any, step: int = 1) -> torch.Tensor:
    """As the denoising blocks of modular pipelines drive a guider; the unconditional prompt is the other reversed."""
    texts = {"cond": found.text, "uncond": {key: value.flip(-1) for key, value in found.text.items()}}
    guider.set_state(step=step, num_inference_steps=STEPS, timestep=torch.tensor(500.0))
    predictions = {}
    for name in guider._input_predictions[: guider.num_conditions]:
        text = texts["uncond" if name == "pred_uncond" else "cond"]
        guider.prepare_models(found.transformer)
        with torch.no_grad():
            predictions[name] = found.transformer(**found.arguments(text=text))[0].clone()
        guider.cleanup_models(found.transformer)
    result = guider.forward(**predictions)
    return result.pred


def config(found: Subject, layer: int, **options: Any) -> LayerSkipConfig:
    """Of a layer by its number over all lists of blocks; "auto" finds one of several lists by chance."""
    names = layout_of(found.transformer).block_lists(found.transformer)
    for name in names:
        count = len(found.transformer.get_submodule(name))
        if layer < count:
            return LayerSkipConfig(indices=[layer], fqn=name, **options)
        layer -= count
    raise AssertionError(f"layer {layer} is in none of {names}")


def pag(found: Subject, layer: int) -> Any:
    options = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
    chosen = config(found, layer, **options)
    return PerturbedAttentionGuidance(5.0, 1.7, 0.0, 1.0, perturbed_guidance_config=chosen)


def slg(found: Subject, layer: int, **options: Any) -> Any:
    return SkipLayerGuidance(5.0, 1.7, 0.0, 1.0, skip_layer_config=config(found, layer, **options))


def own(perturbation: str, layer: int) -> CrossAttentionGuider:
    return CrossAttentionGuider(5.0, layers=[layer], perturbation_scale=1.7, perturbation=perturbation)


def tables() -> tuple[dict[Any, Any], dict[Any, Any]]:
    for registry in (AttentionProcessorRegistry, TransformerBlockRegistry):
        registry._register()
    return dict(AttentionProcessorRegistry._registry), dict(TransformerBlockRegistry._registry)


@pytest.mark.parametrize("name", FAMILIES)
def test_guiders_run_as_the_perturbations_of_this_package(name: str) -> None:
    found = subject(name)
    layer = len(found.modules) - 1
    before = tables()
    stock = [module.processor for module in found.modules]
    plain = found.prediction()
    with layer_skipping(found.transformer):
        assert torch.equal(found.prediction(), plain)
        perturbed = predicted(found, pag(found, layer))
        stg = predicted(found, slg(found, layer, skip_attention=True, skip_ff=False))
        skipped = None if name in WITHOUT_WHOLE_BLOCKS else predicted(found, slg(found, layer))
        assert torch.equal(found.prediction(), plain)
    torch.testing.assert_close(perturbed, own_prediction(found, "identity", layer), rtol=1e-4, atol=1e-4)
    if skipped is not None and "skip" in perturbations_of(found, layer):
        torch.testing.assert_close(skipped, own_prediction(found, "skip", layer), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stg, with_attention_skipped(found, layer), rtol=1e-4, atol=1e-4)
    assert tables() == before
    assert [module.processor for module in found.modules] == stock


def own_prediction(found: Subject, perturbation: str, layer: int) -> torch.Tensor:
    return predicted(found, own(perturbation, layer))


def perturbations_of(found: Subject, layer: int) -> list[str]:
    block = [
        block
        for n in layout_of(found.transformer).block_lists(found.transformer)
        for block in found.transformer.get_submodule(n).children()
    ][layer]
    return ["identity", *(["skip"] if type(block) in TransformerBlockRegistry._registry else [])]


def with_attention_skipped(found: Subject, layer: int) -> torch.Tensor:
    """The same guidance written out, the attention module of the layer giving back what it is given."""
    module = found.modules[layer]
    joint = layout_of(found.transformer).text is not None

    def given(hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **further: Any) -> Any:
        return (hidden_states, encoder_hidden_states) if joint else hidden_states

    uncond = {key: value.flip(-1) for key, value in found.text.items()}
    with torch.no_grad():
        c, u = (found.transformer(**found.arguments(text=text))[0] for text in (found.text, uncond))
        module.forward = given
        p = found.transformer(**found.arguments())[0]
        del module.forward
    return u + 5.0 * (c - u) + 1.7 * (c - p)


@pytest.mark.parametrize("name", ["cogvideox-rotary", "hunyuanvideo", "wan", "ltx", "mochi"])
def test_they_raise_without(name: str) -> None:
    found = subject(name)
    with pytest.raises((ValueError, AttributeError), match=r"not registered|is_cross_attention"):
        predicted(found, pag(found, 1))


@pytest.mark.parametrize("backend", ["_native_math", "flex"])
def test_scores_are_skipped_under_any_attention_backend(backend: str) -> None:
    found = subject("wan")
    with layer_skipping(found.transformer):
        native = predicted(found, pag(found, 1))
        for module in found.modules:
            module.processor._attention_backend = AttentionBackendName(backend)
        other = predicted(found, pag(found, 1))
    torch.testing.assert_close(other, native, rtol=1e-4, atol=1e-4)


def test_a_capture_round_it_reads_and_all_is_restored_after_an_exception() -> None:
    def scores(q: torch.Tensor, *further: Any) -> torch.Tensor:
        return q.sum()

    found = subject("wan")
    before, stock = tables(), [module.processor for module in found.modules]
    with torch.no_grad(), capture(found.transformer, layers=[0], operation=scores) as alone:
        found.transformer(**found.arguments())

    def run_and_fail() -> None:
        with capture(found.transformer, layers=[0], operation=scores) as captured, layer_skipping(found.transformer):
            found.prediction()
            assert torch.equal(captured[0, 0], alone[0, 0])
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        run_and_fail()
    assert tables() == before
    assert [module.processor for module in found.modules] == stock
    assert not found.transformer._forward_pre_hooks
