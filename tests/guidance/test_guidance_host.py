"""The pipeline round the guidance: restored, composed, refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import diffusers
import pytest
import torch
from diffusers import LattePipeline, LatteTransformer3DModel
from diffusers.hooks import apply_group_offloading

from corrdit import TokenGrid, capture
from corrdit.integrations.diffusers import CorrespondenceProcessor, Preset, ReadingPreset
from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS, PublishedModel
from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance, GuidancePreset, guidance_preset
from corrdit.integrations.diffusers.host.forwards import OneThread
from corrdit.testing import TINY_MODELS, tiny_generation, tiny_pipeline


def state_of(pipe: Any) -> dict[str, tuple[Any, ...]]:
    """Everything a module's instance holds besides weights, by module."""
    return {
        name: (
            sorted(set(vars(module)) - {"_diffusers_hook"}),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks_with_kwargs),
            vars(module).get("forward"),
            vars(module).get("processor"),
            module._compiled_call_impl,
        )
        for name, module in pipe.transformer.named_modules()
    }


@pytest.mark.parametrize("name", ["cogvideox", "hunyuanvideo", "wan"])
def test_model_is_restored(name: str) -> None:
    pipe = tiny_pipeline(name)
    plain = pipe(**tiny_generation(name, steps=2)).frames
    before = state_of(pipe)
    for perturbation in ("cross_frame", "skip"):
        with CrossAttentionGuidance(pipe, (-1,), perturbation=perturbation):
            guided = pipe(**tiny_generation(name, steps=2)).frames
        assert not torch.equal(guided, plain)
        assert state_of(pipe) == before
    assert torch.equal(pipe(**tiny_generation(name, steps=2)).frames, plain)


@pytest.mark.parametrize(
    "where, forward",
    [
        ("transformer_blocks.0", "own"),
        ("transformer_blocks.1.attn1", "own"),
        ("transformer_blocks.1.attn1", "perturbed"),
        ("transformer_blocks.2.ff", "perturbed"),
    ],
)
def test_model_is_restored_after_an_exception(where: str, forward: str) -> None:
    pipe = tiny_pipeline("cogvideox")
    plain = pipe(**tiny_generation("cogvideox", steps=2)).frames
    module = pipe.transformer.get_submodule(where)
    batch = 2 if forward == "own" else 1

    def fail(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[0] == batch:
            raise RuntimeError("stop")

    handle = module.register_forward_pre_hook(fail, with_kwargs=True)
    before = state_of(pipe)
    guidance = CrossAttentionGuidance(pipe, 1)
    with pytest.raises(RuntimeError, match="stop"), guidance:
        pipe(**tiny_generation("cogvideox", steps=2))
    assert state_of(pipe) == before
    handle.remove()
    assert torch.equal(pipe(**tiny_generation("cogvideox", steps=2)).frames, plain)
    with guidance:
        assert not torch.equal(pipe(**tiny_generation("cogvideox", steps=2)).frames, plain)


def test_a_copy_made_inside_is_not_guided() -> None:
    pipe = tiny_pipeline("wan")
    plain = pipe(**tiny_generation("wan", steps=2)).frames
    with CrossAttentionGuidance(pipe, 1):
        copied = copy.deepcopy(pipe.transformer)
    pipe.transformer = copied
    assert torch.equal(pipe(**tiny_generation("wan", steps=2)).frames, plain)


@pytest.mark.parametrize("order", ["capture first", "guidance first"])
@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_capture_reads_the_unperturbed_forward(name: str, order: str) -> None:
    def operation(q: torch.Tensor, k: torch.Tensor, grid: TokenGrid, key_mask: Any) -> torch.Tensor:
        return q.sum(dim=(1, 3)) + k.sum(dim=(1, 3))

    pipe = tiny_pipeline(name)
    with capture(pipe, layers=[0, 2], operation=operation, branch="both") as alone:
        pipe(**tiny_generation(name, steps=2))
    guidance = CrossAttentionGuidance(pipe, 2)
    with guidance:
        guided = pipe(**tiny_generation(name, steps=2)).frames
    reader = capture(pipe, layers=[0, 2], operation=operation, branch="both")
    outer, inner = (reader, guidance) if order == "capture first" else (guidance, reader)
    with outer, inner:
        both = pipe(**tiny_generation(name, steps=2)).frames
    assert torch.equal(both, guided)
    assert reader.keys() == alone.keys()
    for layer in (0, 2):
        for branch in ("cond", "uncond"):
            assert torch.equal(reader[0, layer][branch], alone[0, layer][branch])
        assert not torch.equal(reader[1, layer]["cond"], alone[1, layer]["cond"])


def test_processor_put_in_by_hand_keeps_its_result() -> None:
    pipe = tiny_pipeline("cogvideox")
    attention = pipe.transformer.transformer_blocks[2].attn1
    stock = attention.processor
    attention.processor = CorrespondenceProcessor(
        stock, TokenGrid(3, 4, 4, text_tokens=8), lambda q, k, grid, key_mask: q.mean(dim=(1, 2))
    )
    with CrossAttentionGuidance(pipe, 2):
        pipe(**tiny_generation("cogvideox", steps=2))
    assert attention.processor.result.shape[0] == 2
    assert isinstance(attention.processor, CorrespondenceProcessor)


def test_group_offloading_hooks_run_in_skipped_blocks() -> None:
    pipe = tiny_pipeline("cogvideox")
    with CrossAttentionGuidance(pipe, 1):
        expected = pipe(**tiny_generation("cogvideox", steps=2)).frames
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with CrossAttentionGuidance(pipe, 1):
        assert torch.equal(pipe(**tiny_generation("cogvideox", steps=2)).frames, expected)


@pytest.mark.slow
def test_compiled_blocks() -> None:
    pipe = tiny_pipeline("cogvideox")
    with CrossAttentionGuidance(pipe, 1):
        expected = pipe(**tiny_generation("cogvideox", steps=2)).frames
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager", dynamic=True)
    before = state_of(pipe)
    with CrossAttentionGuidance(pipe, 1):
        compiled = pipe(**tiny_generation("cogvideox", steps=2)).frames
    torch.testing.assert_close(compiled, expected)
    assert state_of(pipe) == before


def test_a_refused_guidance_leaves_nothing_behind() -> None:
    pipe = tiny_pipeline("wan")
    entered, left = threading.Event(), threading.Event()

    def read() -> None:
        with OneThread(pipe.transformer):
            entered.set()
            left.wait(60)

    before = state_of(pipe)
    thread = threading.Thread(target=read)
    thread.start()
    assert entered.wait(60)
    guidance = CrossAttentionGuidance(pipe, layers=[1])
    try:
        with pytest.raises(ValueError, match="thread"), guidance:
            pass
    finally:
        left.set()
        thread.join()
    assert state_of(pipe) == before


def test_one_guidance_at_a_time() -> None:
    pipe = tiny_pipeline("cogvideox")
    guidance = CrossAttentionGuidance(pipe, 1)
    with guidance:
        with pytest.raises(ValueError, match="already under a guidance"), CrossAttentionGuidance(pipe, 2):
            pass
        with pytest.raises(ValueError, match="already open"), guidance:
            pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": 3}, "layer 3 is outside CogVideoXTransformer3DModel, which has 3"),
        ({"layers": (-4,)}, "outside"),
        ({"layers": ()}, "layers is empty"),
        ({"layers": (1, -2)}, "twice"),
        ({"layers": 1.5}, "whole numbers"),
        ({"layers": None}, "no layers"),
        ({"layers": None, "preset": "published"}, "published for CogVideoX-2B and 5B"),
        ({"preset": "best"}, "preset must be"),
        ({"scale": -1.0}, "scale must be a finite number"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        ({"scale": "1"}, "scale must be a finite number"),
        ({"adaptive_scale": -0.1}, "adaptive_scale must be"),
        ({"start": -0.1}, "start is a share"),
        ({"stop": 1.1}, "stop is a share"),
        ({"stop": float("nan")}, "stop is a share"),
        ({"start": 0.5, "stop": 0.5}, "start must be below stop"),
        ({"span": -1}, "span"),
        ({"span": 1, "perturbation": "identity"}, "span and renormalize belong to"),
        ({"perturbation": "blur"}, "perturbation must be one of"),
        ({"renormalize": 1}, "renormalize must be"),
        ({"heads": [2]}, "heads of layer 1 must be different numbers from 0 to 1"),
        ({"heads": {2: [0]}}, "not perturbed"),
        ({"heads": [0], "perturbation": "skip"}, "no heads to choose"),
        ({"layers": True}, "whole numbers"),
        ({"heads": 2}, "heads of layer 1 must be different numbers from 0 to 1"),
        ({"heads": {1: 2}}, "heads of layer 1 must be different numbers from 0 to 1"),
        ({"heads": 0.5}, "heads must be whole numbers"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossAttentionGuidance(tiny_pipeline("cogvideox"), **{"layers": 1, **options})


@pytest.mark.parametrize("heads", [1, [1], {1: 1, 2: [1]}, "iterator"])
def test_heads_may_be_one_number_or_any_iterable(heads: Any) -> None:
    given = iter([1]) if heads == "iterator" else heads
    assert CrossAttentionGuidance(tiny_pipeline("cogvideox"), (1, 2), heads=given).heads == {1: (1,), 2: (1,)}


def test_models_that_cannot_be_guided_are_refused() -> None:
    pipe = tiny_pipeline("cogvideox")
    with pytest.raises(ValueError, match="needs a diffusers video pipeline"):
        CrossAttentionGuidance(pipe.transformer, 1)
    latte = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        num_layers=1,
        caption_channels=8,
        sample_size=8,
        patch_size=2,
    )
    with pytest.raises(ValueError, match="factored attention"):
        CrossAttentionGuidance(LattePipeline(None, None, None, latte, pipe.scheduler), 0)
    wan = tiny_pipeline("wan")
    module = wan.transformer.blocks[1].attn1

    class Own(type(module.processor)):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    module.processor = Own()
    # Not by set_attention_backend, which also changes the backend of every other model in the process.
    module.processor._attention_backend = "flex"
    with (
        pytest.raises(ValueError, match="cannot be guided: the attention backend 'flex'"),
        CrossAttentionGuidance(wan, 1),
    ):
        pass


@pytest.mark.parametrize("start, stop", [(0.8, 1.0), (0.1, 0.4)])
def test_a_share_that_holds_no_step_is_refused(start: float, stop: float) -> None:
    pipe = tiny_pipeline("cogvideox")
    with (
        pytest.raises(ValueError, match=f"from start={start} to stop={stop} is none of the 2 denoising steps"),
        CrossAttentionGuidance(pipe, 1, start=start, stop=stop),
    ):
        pipe(**tiny_generation("cogvideox", steps=2))
    with CrossAttentionGuidance(pipe, 1, scale=0.0, start=start, stop=stop):
        pipe(**tiny_generation("cogvideox", steps=2))


def test_optimising_through_the_model_is_refused() -> None:
    pipe = tiny_pipeline("cogvideox")
    arguments = {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 8, 16),
        "timestep": torch.tensor([500, 500]),
    }

    def optimise(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with torch.enable_grad():
            pipe.transformer(**arguments)
        return tensors

    with CrossAttentionGuidance(pipe, 1):
        pipe(**tiny_generation("cogvideox", steps=2))
        with pytest.raises(ValueError, match="a forward with gradients ran under guidance"):
            pipe(**tiny_generation("cogvideox", steps=2), callback_on_step_end=optimise)
    assert pipe.transformer(**arguments).sample.requires_grad


def test_published_settings_are_found_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline("cogvideox")
    assert guidance_preset(pipe.transformer) is None
    published = {model.preset.guidance.layers for model in PUBLISHED_MODELS.values() if model.family == "cogvideox"}
    assert published == {(13, 17, 21), (15, 17, 18)}
    preset = Preset(ReadingPreset(0), guidance=GuidancePreset((0, 2)))
    monkeypatch.setitem(PUBLISHED_MODELS, "tiny", PublishedModel("tiny", "cogvideox", 3, 2, "float32", preset))
    assert CrossAttentionGuidance(pipe, preset="published").layers == (0, 2)
    assert CrossAttentionGuidance(pipe, 1, preset="published").layers == (1,)


@pytest.mark.skipif("cosmos-2" not in TINY_MODELS, reason="this diffusers has no Cosmos Predict2")
@pytest.mark.parametrize("name", ["cosmos", "cosmos-2"])
def test_a_scale_that_falls_needs_timesteps_that_do(name: str) -> None:
    """Cosmos counts levels of noise: a quarter of their logarithm, or up to 80,000."""
    pipe = tiny_pipeline(name)
    guidance = CrossAttentionGuidance(pipe, layers=[0], adaptive_scale=0.001)
    with pytest.raises(ValueError, match="adaptive_scale falls with timesteps of 0 to 1000, and those of"), guidance:
        pipe(**tiny_generation(name, steps=2))


def test_a_video_made_in_windows_is_refused_when_the_second_begins() -> None:
    """Steps go on counting there, so that the windows after the first would be left without guidance."""
    pipe = diffusers.SkyReelsV2DiffusionForcingPipeline(**tiny_pipeline("skyreelsv2").components)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}
    pipe.scheduler = diffusers.UniPCMultistepScheduler(num_train_timesteps=1000, **flow)
    windows = {"prompt": None, "base_num_frames": 9, "overlap_history": 5, "ar_step": 0}
    one, several = ({**tiny_generation("skyreelsv2", steps=3), "num_frames": frames} for frames in (9, 17))
    before = state_of(pipe)
    with CrossAttentionGuidance(pipe, layers=[0]):
        pipe(**one, **windows)
    guidance = CrossAttentionGuidance(pipe, layers=[0])
    with pytest.raises(ValueError, match="goes through its 3 steps more than once"), guidance:
        pipe(**several, **windows)
    assert state_of(pipe) == before
