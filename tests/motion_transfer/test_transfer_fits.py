"""Motion transfer with a model made to fit: offloaded, cast layer by layer, quantised, in tiles; same results."""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup

from corrdit import MotionTransfer, capture
from corrdit.integrations.diffusers import placement as model_placement
from corrdit.integrations.diffusers.backbones.loading import backbone_of
from corrdit.integrations.diffusers.backbones.published_models import PUBLISHED_MODELS
from corrdit.integrations.diffusers.guidance.cross_attention import CrossAttentionGuidance
from corrdit.integrations.diffusers.placement import Placement
from corrdit.integrations.diffusers.testing.tiny_models import TEXT_TOKENS, tiny_generation, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*has no text encoder", "ignore:the reference")
CPU = torch.device("cpu")
NAME = "cogvideox-rotary"


def placed_pipeline(placement, dtype=torch.float32, name=NAME):
    pipe = tiny_pipeline(name).to(dtype)
    model_placement.place(pipe, placement, CPU)
    return pipe


def transferred(pipe, **changes):
    prompts = torch.randn(2, 1, TEXT_TOKENS, 16, generator=torch.Generator().manual_seed(0)).to(pipe.dtype)
    video = np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    settings = {"block": 1, "steps": 2, "guided_share": 0.5, "optimisation_steps": 2, **changes}
    call = {"prompt_embeds": prompts[0], "negative_prompt_embeds": prompts[1], "max_sequence_length": TEXT_TOKENS}
    return MotionTransfer(backbone_of(pipe), **settings)(video, "", **call)


def assert_same(result, expected):
    assert np.array_equal(result.video, expected.video)
    assert np.array_equal(result.losses, expected.losses)
    assert torch.equal(result.optimised.tensors[0]["latent"], expected.optimised.tensors[0]["latent"])


@pytest.fixture(scope="module")
def expected():
    return {method: transferred(placed_pipeline("device"), method=method) for method in ("ditflow", "smm")}


@pytest.fixture
def away_between_forwards(monkeypatch):
    """What group offloading keeps in the computer's memory is NaN on the device, as it would be gone on a GPU."""
    offload, onload = ModuleGroup._offload_to_memory, ModuleGroup._onload_from_memory
    kept = {}

    def tensors(group):
        held = [t for part in group.modules for t in (*part.parameters(), *part.buffers())]
        return [*held, *group.parameters, *group.buffers]

    def _offload(group):
        offload(group)
        for tensor in tensors(group):
            kept.setdefault(tensor, tensor.data)
            if tensor.is_floating_point():
                tensor.data = torch.full_like(tensor.data, torch.nan)

    def _onload(group):
        for tensor in tensors(group):
            tensor.data = kept.pop(tensor, tensor.data).clone()
        onload(group)

    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", _offload)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", _onload)


@pytest.fixture
def offloading_to_cpu(monkeypatch):
    """accelerate's hooks with the device called "cpu", as weights are; diffusers calls it "cpu:0"."""
    own = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **more: own(model, CPU, **more))


def hooks_of(pipe):
    names = set()
    for module in pipe.transformer.modules():
        names |= {type(hook).__name__ for hook in [getattr(module, "_hf_hook", None)] if hook is not None}
        registry = getattr(module, "_diffusers_hook", None)
        names |= set() if registry is None else set(registry.hooks)
    return names


HOOKS = {"offload": "CpuOffload", "offload_groups": "group_offloading", "offload_layers": "AlignDevicesHook"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["ditflow", "smm"])
@pytest.mark.parametrize("parts", list(HOOKS))
def test_offloading_changes_no_bit(
    parts, method, checkpointing, expected, offloading_to_cpu, away_between_forwards, request
):
    pipe = placed_pipeline(parts)
    assert HOOKS[parts] in hooks_of(pipe)
    result = transferred(pipe, method=method, gradient_checkpointing=checkpointing)
    assert_same(result, expected[method])


@pytest.mark.parametrize("parts", list(HOOKS))
def test_a_table_of_places_is_optimised_wherever_weights_rest(parts, offloading_to_cpu, away_between_forwards):
    plain, moved = (
        transferred(placed_pipeline(placement, name="cogvideox"), optimise="embedding")
        for placement in ("device", parts)
    )
    assert np.array_equal(plain.losses, moved.losses)


@pytest.mark.parametrize("parts", ["device", "offload", "offload_groups"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layerwise_casting_is_a_model_of_rounded_weights(parts, checkpointing, away_between_forwards):
    rounded = placed_pipeline(Placement(weights="float8"))
    stored = {name: weight.data for name, weight in rounded.transformer.named_parameters()}
    assert torch.float8_e4m3fn in {weight.dtype for weight in stored.values()}
    plain = placed_pipeline("device")
    for name, weight in plain.transformer.named_parameters():
        weight.data = stored[name].float()
    pipe = placed_pipeline(Placement(parts, weights="float8"))
    assert "layerwise_casting" in hooks_of(pipe)
    assert_same(transferred(pipe, gradient_checkpointing=checkpointing), transferred(plain))


def test_quantised_weights_have_gradients():
    pytest.importorskip("torchao")
    expected = transferred(placed_pipeline("device"))
    for parts in ("device", "offload_groups"):
        result = transferred(placed_pipeline(Placement(parts, weights="int8")))
        assert np.allclose(result.losses, expected.losses, rtol=1e-2)
        assert not np.array_equal(result.losses, expected.losses)


@pytest.mark.parametrize("placement", [Placement("offload_groups"), Placement(weights="float8")])
def test_captures_and_guidance(placement, away_between_forwards):
    """Scores of a capture and the guided video, against those without."""

    def scores(q, k, grid, key_mask):
        return q @ k.transpose(-1, -2)

    found = []
    rounded = placed_pipeline(Placement(weights=placement.weights)).transformer
    for wanted in (placement, "device"):
        pipe = placed_pipeline(wanted)
        if wanted == "device":
            for weight, stored in zip(pipe.transformer.parameters(), rounded.parameters(), strict=True):
                weight.data = stored.data.float()
        with capture(pipe, layers=[1], operation=scores) as captured, CrossAttentionGuidance(pipe, layers=(1,)):
            video = pipe(**tiny_generation(NAME, steps=2)).frames
        found.append((video, *captured.values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_of_a_kept_graph_outlive_the_weights(away_between_forwards):
    gradients = []
    for placement in ("device", "offload_groups"):
        backbone = backbone_of(placed_pipeline(placement))
        backbone.transformer.requires_grad_(False)
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        operation = {2: lambda q, k, grid, key_mask: (q * k).sum()}
        backbone.forward(latents, 19.0, operation, keep_graph=True)[2].backward()
        gradients.append(latents.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_optimised_latents_stay_float32_through_the_scheduler_step(monkeypatch):
    pipe = placed_pipeline("device", torch.bfloat16)
    steps = []
    own = type(pipe.scheduler).step

    def step(self, model_output, timestep, sample, *args, **kwargs):
        outputs = own(self, model_output, timestep, sample, *args, **kwargs)
        steps.append((sample, outputs[0]))
        return outputs

    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    result = transferred(pipe, learning_rate=1e-4)
    assert [sample.dtype for sample, _ in steps] == [torch.float32, torch.bfloat16]
    optimised = result.optimised.tensors[0]["latent"]
    torch.testing.assert_close(steps[0][0], optimised, rtol=0, atol=1e-6)
    assert not torch.equal(optimised, optimised.bfloat16().float())
    # The loop goes on in its own precision.
    assert torch.equal(steps[1][0], steps[0][1].bfloat16())


def test_published_transfers_checkpoint_gradients_as_released():
    for name in ("cogvideox-2b", "cogvideox-5b"):
        assert PUBLISHED_MODELS[name].preset.transfer.gradient_checkpointing


def test_codec_in_tiles_and_slices():
    pipe = placed_pipeline(Placement(codec_tiling=True, codec_slicing=True))
    assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (True, True)
    pipe.vae = torch.nn.Identity()
    with pytest.raises(ValueError, match="codec_tiling: the codec Identity has no tiling"):
        model_placement.place(pipe, Placement(codec_tiling=True), CPU)
