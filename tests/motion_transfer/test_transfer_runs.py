"""What a run does step by step: gradients, resuming, stored motion, injection, baselines, failures."""

import numpy as np
import pytest
import torch

from corrdit import ops
from corrdit.integrations.diffusers.motion_transfer import (
    DivergedError,
    MotionTransfer,
    StoredMotion,
    TransferSettings,
)
from corrdit.integrations.diffusers.motion_transfer import step_reference as step_reference_module
from corrdit.integrations.diffusers.motion_transfer.latents import codec_latents
from corrdit.integrations.diffusers.motion_transfer.optimisation import OptimiserMemory, optimised

SETTINGS = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 2, "learning_rate": 0.05}


class Killed(Exception):
    """Stands for the end of the process."""


def kill_after(step):
    def report(done, steps, losses):
        if done == step:
            raise Killed

    return report


def plain_autograd(backbone, transfer, video, latents, timestep):
    """Loss and gradient by the pipeline's own layers and one materialised score map, written out by hand."""
    reference = transfer.reference_motion(video)
    wanted = reference.wanted[transfer.settings.blocks[0]].float()
    transformer, layer = backbone.transformer, transfer.settings.blocks[0]
    seen = {}
    attention = transformer.transformer_blocks[layer].attn1
    heads, text = attention.heads, reference.grid.text_tokens
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
        for name in ("norm_q", "norm_k")
    ]
    leaf = latents.clone().requires_grad_(True)
    arguments = backbone.call_arguments(leaf, timestep, backbone.empty_prompt())
    with torch.enable_grad():
        transformer(**arguments)
        for hook in hooks:
            hook.remove()
        q, k = seen["norm_q"][0, :, text:], seen["norm_k"][0, :, text:]
        frames, tokens = reference.grid.frames, reference.grid.tokens_per_frame
        logits = (q @ k.transpose(1, 2)).sum(0) / heads * q.shape[-1] ** -0.5
        weights = (2 * logits).unflatten(1, (frames, tokens)).softmax(-1)
        place = reference.grid.coordinates()
        flow = (weights @ place).unflatten(0, (frames, tokens)) - place[None, :, None]
        flow = flow.transpose(1, 2).unflatten(2, (reference.grid.height, reference.grid.width))[None]
        moving = wanted.norm(dim=-1) > 0
        loss = torch.nn.functional.mse_loss(flow[moving], wanted[moving])
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_first_step_are_those_of_plain_autograd(case, checkpointing):
    backbone, video, arguments = case("cogvideox", guided=False)
    arguments["prompt_embeds"] = torch.zeros_like(arguments["prompt_embeds"])
    transfer = MotionTransfer(
        backbone,
        block=1,
        steps=3,
        guided_share=0.3,
        optimisation_steps=1,
        optimizer="sgd",
        learning_rate=0.5,
        gradient_checkpointing=checkpointing,
    )
    result = transfer(video, seed=3, **arguments)
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    loss, gradient = plain_autograd(backbone, transfer, video, noise, backbone.timestep(0, 3))
    assert result.losses[0, 0] == pytest.approx(loss, rel=1e-4)
    moved = result.optimised.tensors[0]["latent"] - noise
    torch.testing.assert_close(moved, -0.5 * gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert not backbone.transformer.is_gradient_checkpointing


@pytest.mark.parametrize("scheduler", [None, "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("optimise", ["latent", "embedding"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_killed_run_goes_on_to_the_same_result(case, tmp_path, step, optimise, scheduler):
    backbone, video, arguments = case("cogvideox")
    transfer = MotionTransfer(
        backbone, block=1, optimise=optimise, scheduler=scheduler, **{**SETTINGS, "guided_share": 1}
    )
    whole = transfer(video, **arguments)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        transfer(video, state_file=state, report=kill_after(step), **arguments)
    assert state.is_file()
    computed = []
    resumed = transfer(video, state_file=state, report=lambda done, steps, losses: computed.append(done), **arguments)
    assert computed == list(range(step + 1, 4))
    np.testing.assert_array_equal(resumed.video, whole.video)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    for name, tensor in whole.optimised.tensors[2].items():
        torch.testing.assert_close(resumed.optimised.tensors[2][name], tensor, rtol=0, atol=0)
    assert not state.exists()


def test_a_flow_matching_run_goes_on_too(case, tmp_path):
    backbone, video, arguments = case("wan")
    transfer = MotionTransfer(backbone, block=1, **SETTINGS)
    whole = transfer(video, **arguments)
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        transfer(video, state_file=state, report=kill_after(2), **arguments)
    np.testing.assert_array_equal(transfer(video, state_file=state, **arguments).video, whole.video)


def test_the_state_of_another_run_is_refused(case, tmp_path):
    backbone, video, arguments = case("cogvideox")
    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        MotionTransfer(backbone, block=1, **SETTINGS)(video, state_file=state, report=kill_after(1), **arguments)
    with pytest.raises(ValueError, match="another reference, prompt, seed, model or settings"):
        MotionTransfer(backbone, block=1, **SETTINGS)(video, seed=1, state_file=state, **arguments)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"not a whole safetensors file.*remove it to begin anew"):
        MotionTransfer(backbone, block=1, **SETTINGS)(video, state_file=state, **arguments)


@pytest.mark.parametrize(
    ("name", "optimise"), [("cogvideox", "latent"), ("cogvideox-rotary", "embedding"), ("wan", "latent")]
)
def test_stored_motion_gives_the_same_video_again_and_another_with_another_prompt(case, tmp_path, name, optimise):
    backbone, video, arguments = case(name)
    transfer = MotionTransfer(backbone, block=1, optimise=optimise, **SETTINGS)
    first = transfer(video, **arguments)
    file = tmp_path / "motion.safetensors"
    first.optimised.save(file)
    again = transfer(None, stored=file, **arguments)
    np.testing.assert_array_equal(again.video, first.video)
    assert again.losses.size == 0
    assert again.optimised is None
    other = {**arguments, "prompt_embeds": arguments["prompt_embeds"].flip(-1)}
    assert (transfer(None, stored=StoredMotion.load(file), **other).video != first.video).any()
    plain = MotionTransfer(backbone, method="backbone", steps=3)(video, **other)
    assert (transfer(None, stored=file, **other).video != plain.video).any()


def test_stored_motion_of_another_size_is_refused(case, tmp_path):
    backbone, video, arguments = case("cogvideox")
    stored = MotionTransfer(backbone, block=1, **SETTINGS)(video, **arguments).optimised
    stored.tensors[0]["latent"] = stored.tensors[0]["latent"][:, :2]
    with pytest.raises(ValueError, match=r"latent \[1, 2, 4, 8, 8\].*latent \[1, 3, 4, 8, 8\]"):
        MotionTransfer(backbone, block=1, **SETTINGS)(None, stored=stored, **arguments)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        MotionTransfer(backbone, block=1, **SETTINGS)(None, stored=text, **arguments)


@pytest.mark.parametrize("method", ["smm", "moft", "motionclone"])
@pytest.mark.parametrize("name", ["cogvideox", "hunyuanvideo", "wan"])
def test_baselines_lower_their_own_loss(case, name, method):
    backbone, video, arguments = case(name)
    settings = {**SETTINGS, "optimisation_steps": 3, "motion_channels": 0.2}
    result = MotionTransfer(backbone, block=1, method=method, **settings)(video, **arguments)
    assert result.losses[0, 2] < result.losses[0, 0]
    assert np.isfinite(result.losses).all()


@pytest.mark.parametrize("method", ["smm", "ditflow"])
def test_gradient_checkpointing_changes_nothing(case, method):
    backbone, video, arguments = case("cogvideox-rotary")
    options = {"method": method, "optimise": "embedding", "injection_blocks": (0,), **SETTINGS}
    plain = MotionTransfer(backbone, block=1, **options)(video, **arguments)
    again = MotionTransfer(backbone, block=1, gradient_checkpointing=True, **options)(video, **arguments)
    np.testing.assert_allclose(again.losses, plain.losses, rtol=1e-4)


@pytest.mark.parametrize("name", ["cogvideox-rotary", "wan", "hunyuanvideo", "mochi"])
def test_injected_keys_and_values_are_the_references(case, name, monkeypatch):
    backbone, video, arguments = case(name)
    stored = []
    own = step_reference_module.attention_parts_of

    def spied(transformer, layout, given, grid, layers, parts):
        found = own(transformer, layout, given, grid, layers, parts)
        stored.append((given["hidden_states"].clone(), found))
        return found

    monkeypatch.setattr(step_reference_module, "attention_parts_of", spied)
    transfer = MotionTransfer(backbone, method="injection", injection_blocks=(0, 1), **SETTINGS)
    result = transfer(video, seed=5, **arguments)
    assert len(stored) == 2
    # At the first step the noise level is that of pure noise for flow matching, and below it the reference shows.
    reference = transfer.reference_motion(video)
    layout_latents = backbone.call_arguments(codec_latents(backbone, reference.latents), 0.0, {})["hidden_states"]
    noisy = [hidden for hidden, _ in stored]
    later = (noisy[1] * layout_latents).sum() / layout_latents.square().sum()
    earlier = (noisy[0] * layout_latents).sum() / layout_latents.square().sum()
    assert later > earlier
    assert stored[0][1].keys() == {0, 1}
    plain = MotionTransfer(backbone, method="backbone", steps=3)(video, seed=5, **arguments)
    assert (result.video != plain.video).any()
    assert result.losses.size == 0


def test_both_branches_get_the_injected_keys(case):
    backbone, video, arguments = case("cogvideox")
    seen = []
    own = torch.nn.functional.scaled_dot_product_attention

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is own and args[1].shape[0] == 2:
                seen.append(args[1].clone())
            return func(*args, **(kwargs or {}))

    for method in ("injection", "backbone"):
        with Recorder():
            transfer = MotionTransfer(backbone, method=method, injection_blocks=(1,), steps=2, guided_share=0.5)
            transfer(video, **arguments)
    text = backbone.grid(1, 8, 8).text_tokens
    injected, plain = seen[1], seen[6 + 1]
    assert torch.equal(injected[0, :, text:], injected[1, :, text:])
    assert not torch.equal(plain[0, :, text:], plain[1, :, text:])
    torch.testing.assert_close(injected[:, :, :text], plain[:, :, :text])
    assert not torch.equal(seen[4][0, :, text:], seen[4][1, :, text:])


def test_gradients_are_used_again_between_steps(case):
    backbone, video, arguments = case("cogvideox")
    settings = {**SETTINGS, "guided_share": 1.0, "gradient_interval": 2}
    result = MotionTransfer(backbone, block=1, **settings)(video, **arguments)
    assert np.isfinite(result.losses[[0, 2]]).all()
    assert np.isnan(result.losses[1]).all()
    assert not torch.equal(result.optimised.tensors[1]["latent"], result.optimised.tensors[0]["latent"])


@pytest.mark.parametrize(
    "options",
    [
        {"span": 1},
        {"window": 2},
        {"window": 1, "tile": 2},
        {"heads": "features"},
        {"heads": "probabilities"},
        {"loss": "paper"},
        {"flow_reference": "soft"},
        {"blocks": (0, 1)},
        {"optimizer": "adamw"},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_every_option_of_the_flow_lowers_the_loss(case, options):
    backbone, video, arguments = case("cogvideox")
    settings = {"blocks": (1,), **SETTINGS, "optimisation_steps": 3, **options}
    result = MotionTransfer(backbone, **settings)(video, **arguments)
    assert result.losses[0, 2] < result.losses[0, 0]
    assert list(result.flows) == list(settings["blocks"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_single_precision(case, dtype):
    backbone, video, arguments = case("cogvideox")
    single = MotionTransfer(backbone, block=1, **SETTINGS)(video, **arguments)
    backbone = case("cogvideox")[0]
    backbone.pipe.to(dtype=dtype)
    tensors = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    half = MotionTransfer(backbone, block=1, **SETTINGS)(video, **tensors)
    np.testing.assert_allclose(half.losses, single.losses, rtol=0.15)


def test_overflowing_gradients_are_computed_again_with_a_smaller_scale():
    settings = TransferSettings(blocks=(0,), optimisation_steps=1, optimizer="sgd", learning_rate=1.0)
    memory = OptimiserMemory()

    class Overflowing(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.sum()

        @staticmethod
        def backward(context, gradient):
            return (gradient * 8).half().float().expand(2)

    found, losses = optimised(
        {"x": torch.ones(2)}, lambda leaves: Overflowing.apply(leaves["x"]), settings, 0, memory, half_precision=True
    )
    assert memory.loss_scale == 2.0**12
    torch.testing.assert_close(found["x"], torch.full((2,), -7.0))
    assert losses == [2.0]


def test_a_loss_that_becomes_nan_stops_and_keeps_the_state(case, tmp_path, monkeypatch):
    from corrdit.integrations.diffusers.motion_transfer.methods import AttentionMotionFlow

    backbone, video, arguments = case("cogvideox")
    calls, own = [], AttentionMotionFlow.loss

    def failing(self, read, wanted):
        calls.append(1)
        loss = own(self, read, wanted)
        return loss * float("nan") if len(calls) == 4 else loss

    monkeypatch.setattr(AttentionMotionFlow, "loss", failing)
    state = tmp_path / "state.safetensors"
    transfer = MotionTransfer(backbone, block=1, **SETTINGS)
    with pytest.raises(DivergedError, match="denoising step 1, optimisation step 1") as caught:
        transfer(video, state_file=state, **arguments)
    assert (caught.value.step, caught.value.iteration) == (1, 1)
    assert torch.isfinite(caught.value.last_good["latent"]).all()
    assert np.shape(caught.value.losses[0]) == (2,)
    monkeypatch.undo()
    resumed = transfer(video, state_file=state, **arguments)
    np.testing.assert_array_equal(resumed.video, transfer(video, **arguments).video)


def test_the_learning_rate_falls_as_published():
    settings = TransferSettings(blocks=(0,))
    assert settings.guided_steps == 10
    np.testing.assert_allclose([settings.rate(step) for step in range(10)], np.linspace(0.002, 0.001, 11)[:10])


def test_the_reference_flow_is_the_hard_displacement(case):
    backbone, video, _ = case("cogvideox")
    transfer = MotionTransfer(backbone, block=(0, 2), steps=2)
    reference = transfer.reference_motion(video)
    expected = backbone.forward(
        backbone.encode_video(video), 0.0, {2: lambda q, k, grid, mask: ops.hard_displacement(q, k, grid)}
    )
    torch.testing.assert_close(reference.flows[2][None], expected[2])
    assert list(reference.flows) == [0, 2]


def test_the_optimised_latents_are_what_is_denoised(case):
    backbone, video, arguments = case("cogvideox", guided=False)
    seen = []

    def keep(module, inputs, keywords, output):
        if output is not None:
            seen.append((keywords, output[0].clone()))

    hook = backbone.transformer.register_forward_hook(keep, with_kwargs=True)
    result = MotionTransfer(backbone, block=1, **{**SETTINGS, "guided_share": 0.3})(video, **arguments)
    hook.remove()
    (first, predicted), (second, _) = seen[-3:-1]
    latents = result.optimised.tensors[0]["latent"]
    with torch.no_grad():
        torch.testing.assert_close(predicted, backbone.transformer(**{**first, "hidden_states": latents})[0])
    scheduler = type(backbone.pipe.scheduler).from_config(backbone.pipe.scheduler.config)
    scheduler.set_timesteps(3)
    expected = scheduler.step(predicted, scheduler.timesteps[0], latents).prev_sample
    torch.testing.assert_close(second["hidden_states"], expected)
