"""Objectives: anyone's, those without a reference, and FlowMotion's, whose gradient stays out of the transformer."""

import numpy as np
import pytest
import torch

from corrdit import load_backbone, motion, ops
from corrdit.integrations.diffusers.motion_transfer import MotionObjective, MotionTransfer, TransferSettings
from corrdit.integrations.diffusers.motion_transfer.methods import _METHODS, PredictedMotion, objective_of, path_tokens
from corrdit.integrations.diffusers.motion_transfer.predicted import StepCalls, along
from corrdit.integrations.diffusers.motion_transfer.words import PromptWords
from corrdit.integrations.diffusers.transfer_settings import METHODS

SETTINGS = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 3, "learning_rate": 0.02}
FRAMES = {"num_frames": 9}
FAMILIES = ["cogvideox", "cogvideox-rotary", "hunyuanvideo", "ltx", "mochi", "wan"]


class Pan(MotionObjective):
    """Everything moves by one step from frame to frame."""

    reads = "attention"
    needs_reference = False

    def __init__(self, dx, dy):
        self.step = (dx, dy)

    def loss(self, read, wanted):
        assert wanted is None
        following = [(frame, frame + 1) for frame in range(read.grid.frames - 1)]
        flow = ops.soft_displacement(read.q, read.k, read.grid, temperature=2.0, frames=following)
        return (flow - flow.new_tensor(self.step)).square().mean()


class Brightness(MotionObjective):
    """Keeps what the reference has, in one number."""

    reads = "features"

    def of_reference(self, read):
        return read.features.mean()

    def loss(self, read, wanted):
        return (read.features.mean() - wanted).square()


def test_every_name_has_an_objective():
    assert tuple(_METHODS) == METHODS


def test_anyones_objective_is_minimised(case):
    backbone, video, arguments = case("cogvideox")
    pan = MotionTransfer(backbone, block=1, method=Pan(1.0, 0.0), **SETTINGS)
    result = pan(None, num_frames=len(video), **arguments)
    assert result.losses[0, 2] < result.losses[0, 0]
    assert result.reference is None
    own = pan.settings.described()["method"]
    assert own["class"].endswith("test_objectives.Pan")
    assert own["step"] == "(1.0, 0.0)"
    other = MotionTransfer(backbone, block=(0, 1), method=Brightness, optimise="embedding", **SETTINGS)
    assert other(video, **arguments).losses.shape == (2, 3)
    assert other.settings.described()["method"].endswith("test_objectives.Brightness")
    with pytest.raises(ValueError, match="give a reference video"):
        other(None, num_frames=9, **arguments)


def test_an_objective_made_with_something_else_is_another_run(case, tmp_path):
    backbone, _, arguments = case("cogvideox")
    state = tmp_path / "state.safetensors"
    call = {**arguments, **FRAMES, "state_file": state}
    MotionTransfer(backbone, block=1, method=Pan(1.0, 0.0), **SETTINGS)(None, keep_state=True, **call)
    with pytest.raises(ValueError, match="another reference, prompt, seed, model or settings"):
        MotionTransfer(backbone, block=1, method=Pan(0.0, 1.0), **SETTINGS)(None, **call)


class Mislabelled(MotionObjective):
    reads = "pixels"

    def loss(self, read, wanted):
        return wanted


class Misinjecting(MotionObjective):
    injects = ("keys",)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("tedium", ValueError, "method must be one of ditflow, smm"),
        (3, TypeError, "or a MotionObjective as a class or an instance, got 3"),
        (torch.nn.MSELoss, TypeError, "as a class or an instance"),
        (Mislabelled, TypeError, "reads must be one of attention, text attention, features, prediction"),
        (Misinjecting, TypeError, "injects may be query, key and value"),
        ("path", ValueError, '"path" needs word'),
        ("query-injection", ValueError, '"query-injection" needs injection_blocks'),
    ],
    ids=["name", "number", "class", "reads", "injects", "path", "queries"],
)
def test_what_is_no_objective(method, error, message):
    with pytest.raises(error, match=message):
        objective_of(TransferSettings((0,), method=method))


def test_a_prediction_moves_latents_only():
    with pytest.raises(ValueError, match="the gradient of PredictedMotion reaches latent only"):
        objective_of(TransferSettings((0,), method="flowmotion", optimise="embedding"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["flowmotion", "query-injection"])
def test_autograd_never_enters_the_transformer(case, name, method):
    backbone, video, arguments = case(name)
    seen = []

    def look(module, args, kwargs, output):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        first = output[0] if isinstance(output, tuple) else output
        seen.append(torch.is_grad_enabled() or hidden.requires_grad or (first is not None and first.requires_grad))

    for block in backbone.layout().block_lists(backbone.transformer):
        for module in backbone.transformer.get_submodule(block).children():
            module.register_forward_hook(look, with_kwargs=True)
    options = {"method": method, "injection_blocks": (0,) if method != "flowmotion" else (), **SETTINGS}
    transfer = MotionTransfer(backbone, block=1, **options)
    result = transfer(video, **arguments)
    assert seen
    assert not any(seen)
    plain = MotionTransfer(backbone, method="backbone", steps=3)(video, **arguments)
    assert (result.video != plain.video).any()
    if method == "flowmotion":
        assert result.losses.shape == (2, 3)
        noise = initial_latents(backbone, arguments, video)
        assert not torch.equal(result.optimised.tensors[0]["latent"], noise)


def initial_latents(backbone, arguments, video, seed=0):
    """The latents a pipeline begins with for a seed."""
    seen = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][-1:].clone()), with_kwargs=True
    )
    MotionTransfer(backbone, method="backbone", steps=3)(video, seed=seed, **arguments)
    hook.remove()
    # The first is the reference's.
    return seen[1]


def test_flowmotion_by_hand(case):
    """One guided step of plain gradient descent on Wan, with the loss and its gradient written out."""
    backbone, video, arguments = case("wan")
    options = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 1, "learning_rate": 0.5, "optimizer": "sgd"}
    transfer = MotionTransfer(backbone, block=1, method="flowmotion", **options)
    calls = []
    own = PredictedMotion.loss

    def spied(self, read, wanted):
        calls.append((read.clean.detach().clone(), wanted.clone()))
        return own(self, read, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictedMotion, "loss", spied)
        result = transfer(video, seed=3, **arguments)
    noise = initial_latents(backbone, arguments, video, 3)
    sigma = float(backbone.schedule(3)[0]) / 1000
    reference = transfer.reference_motion(video).latents
    moved = result.optimised.tensors[0]["latent"]
    assert moved.shape == noise.shape
    clean, wanted = calls[0]
    noisy = (1 - sigma) * reference + sigma * noise[0].transpose(0, 1)
    given = backbone.call_arguments(noisy[None], sigma * 1000, backbone.empty_prompt())
    with torch.no_grad():
        velocity = backbone.transformer(**given, return_dict=False)[0][0].transpose(0, 1)
    torch.testing.assert_close(wanted, noisy - sigma * velocity, rtol=1e-4, atol=1e-4)
    leaf = clean.clone().requires_grad_(True)
    alike = (leaf - wanted).square().mean()
    frames = len(leaf)
    changes = [(leaf[1:] - leaf[:-1]).abs() - (wanted[1:] - wanted[:-1]).abs()]
    for frame in range(frames):
        others = [other for other in range(frames) if other != frame]
        changes.append((leaf[frame] - leaf[others]).abs() - (wanted[frame] - wanted[others]).abs())
    loss = 20 * alike + 5 * torch.stack(changes).square().mean()
    assert result.losses[0, 0] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradient = torch.autograd.grad(loss, leaf)[0].transpose(0, 1)[None]
    torch.testing.assert_close(moved - noise, -0.5 * gradient, rtol=1e-3, atol=1e-5)


def test_branches_are_combined_as_the_pipeline_combined_them():
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 1, 3, 4, generator=generator)
    prediction = unconditional + 5.5 * (conditional - unconditional)
    joined = torch.cat([unconditional, conditional])
    batched = StepCalls([lambda latents: joined + latents], [joined], batched=True)
    separate = StepCalls(
        [lambda latents: conditional + latents, lambda latents: unconditional + latents], [conditional, unconditional]
    )
    for calls in (batched, separate):
        torch.testing.assert_close(calls.combined(prediction)(torch.ones(1, 3, 4)), prediction + 1)
    with pytest.raises(ValueError, match="more than a conditional and an unconditional branch"):
        batched.combined(prediction * torch.rand(1, 3, 4, generator=generator))
    with pytest.raises(ValueError, match="more than a conditional and an unconditional branch"):
        StepCalls([], [conditional, unconditional, conditional]).combined(prediction)


def test_what_lies_across_the_mean_velocity_is_kept_by_a_share():
    velocity, mean = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(along(velocity, mean, 0.1).flatten(), torch.tensor([3.0, 0.4]))


def test_steady_attention_is_smoother(case):
    backbone, _, arguments = case("cogvideox-rotary")
    result = MotionTransfer(backbone, block=1, method="steady", **{**SETTINGS, "learning_rate": 0.003})(
        None, **FRAMES, **arguments
    )
    assert (result.losses[:, 2] < result.losses[:, 0]).all()
    assert result.flows == {}


def test_words_are_found_where_they_stand():
    tokenizer = load_backbone("embedded").pipe.tokenizer
    words = PromptWords("a red disc moves left over blue water", tokenizer)
    assert words.places("red disc") == (1, 2)
    assert words.places("left") == (4,)
    with pytest.raises(ValueError, match="the word 'star' is not in the prompt"):
        words.places("star")
    with pytest.raises(ValueError, match="came as embeddings"):
        PromptWords("a red disc", tokenizer, embedded=True).places("red")


def test_an_object_follows_its_path():
    """On the embedded model the share of the word's attention inside the moving box rises."""
    backbone = load_backbone("embedded")
    path = ((0, 0.0, 0.2, 0.5, 0.8), (1, 0.5, 0.2, 1.0, 0.8))
    options = {"steps": 4, "guided_share": 0.5, "optimisation_steps": 3, "learning_rate": 0.05, "guidance_scale": 1.0}
    transfer = MotionTransfer(backbone, method="path", word="disc", path=path, **options)
    result = transfer(None, "a red disc over grass", num_frames=4, height=32, width=32)
    assert result.losses[0, 2] < result.losses[0, 0]
    with pytest.raises(ValueError, match="leave region out"):
        transfer(None, "a red disc over grass", region=(0, 0, 1, 1), num_frames=4, height=32, width=32)
    grid = backbone.grid(4, 16, 16)
    assert path_tokens(path, grid).shape == (4, 8, 8)
    with pytest.raises(ValueError, match="the word 'star' is not in the prompt"):
        MotionTransfer(backbone, method="path", word="star", path=path, **options)(
            None, "a red disc over grass", num_frames=4, height=32, width=32
        )


@pytest.mark.parametrize("family", ["wan", "ltx"])
def test_an_object_follows_its_path_through_cross_attention(case, family, monkeypatch):
    backbone, _, arguments = case(family)
    monkeypatch.setattr(PromptWords, "places", lambda self, word: (1,))
    path = ((0, 0.0, 0.0, 0.5, 1.0), (1, 0.5, 0.0, 1.0, 1.0))
    transfer = MotionTransfer(backbone, block=1, method="path", word="disc", path=path, **SETTINGS)
    losses = transfer(None, **FRAMES, **arguments).losses
    assert (losses[:, -1] < losses[:, 0]).all()
    assert ((losses > 0) & (losses < 1)).all()


def test_injected_queries_are_the_references(case):
    backbone, video, arguments = case("cogvideox")
    seen = []
    own = torch.nn.functional.scaled_dot_product_attention

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is own and args[0].shape[0] == 2:
                seen.append([tensor.clone() for tensor in args[:3]])
            return func(*args, **(kwargs or {}))

    options = {"steps": 2, "guided_share": 0.5, "injection_blocks": (1,)}
    for region in (None, (0, 0, 0.5, 1)):
        seen.clear()
        for method in ("query-injection", "backbone"):
            with Recorder():
                MotionTransfer(backbone, method=method, **options)(video, region=region, **arguments)
        text = backbone.grid(1, 8, 8).text_tokens
        injected, plain = seen[1], seen[6 + 1]
        queries = injected[0][:, :, text:].unflatten(2, (3, 4, 4))
        own_queries = plain[0][:, :, text:].unflatten(2, (3, 4, 4))
        left = (Ellipsis, slice(None, 2), slice(None))
        assert torch.equal(queries[0][left], queries[1][left])
        assert not torch.equal(own_queries[0][left], own_queries[1][left])
        right = (Ellipsis, slice(2, None), slice(None))
        assert torch.equal(queries[0][right], queries[1][right]) == (region is None)
        for number in (1, 2):
            torch.testing.assert_close(injected[number], plain[number])


def test_the_temporal_attention_of_a_still_video_is_not_rough():
    grid_tokens = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 4, 1)
    from corrdit import TokenGrid

    attention = motion.temporal_attention(grid_tokens, grid_tokens, TokenGrid(4, 2, 3))
    assert float(motion.diagonal_roughness(attention)) == pytest.approx(0, abs=1e-12)
    assert np.isfinite(attention.numpy()).all()
