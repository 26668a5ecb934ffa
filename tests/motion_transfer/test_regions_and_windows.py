"""Regions, composed motion, guided windows, FastVMT's settings, noised and prompted references."""

import numpy as np
import pytest
import torch

from corrdit import ops
from corrdit.integrations.diffusers.backbones.published_transfers import FASTVMT, FLOWMOTION, published_transfer
from corrdit.integrations.diffusers.motion_transfer import MotionTransfer, StoredMotion, TransferSettings
from corrdit.integrations.diffusers.motion_transfer.latents import LatentLayout, codec_latents
from corrdit.integrations.diffusers.motion_transfer.methods import PredictedMotion
from corrdit.integrations.diffusers.motion_transfer.optimisation import OptimiserMemory, optimised
from corrdit.integrations.diffusers.motion_transfer.region import region_tokens
from corrdit.integrations.diffusers.motion_transfer.schedule import run_scheduler

SETTINGS = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 2, "learning_rate": 0.05}
LEFT = (0.0, 0.0, 0.5, 1.0)
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)
METHODS = ["ditflow", "smm", "moft", "motionclone", "flowmotion"]
FAST = {
    "window": 1, "tile": (2, 2), "span": (0, 3), "distance_weights": (1, 0.8), "tracking_weight": 0.2, "loss": "pairs",
    "flow_reference": "soft", "reference_noised": True, "optimiser_interval": 2, "rate_falls": "optimisation steps",
    "strength": 0.75,
}  # fmt: skip


def test_a_mask_a_box_and_a_path_as_tokens(case):
    backbone, video, _ = case("cogvideox")
    size = video.shape[:3]
    left = region_tokens(backbone, LEFT, size)
    assert left.shape == (3, 4, 4)
    assert left[:, :, :2].all()
    assert not left[:, :, 2:].any()
    mask = np.zeros(video.shape[:3], dtype=bool)
    mask[:, :, :32] = True
    assert torch.equal(region_tokens(backbone, mask, size), left)
    assert torch.equal(region_tokens(backbone, mask[0], size), left)
    assert torch.equal(region_tokens(backbone, (255 * mask[:2, ::2, ::2]).astype(np.uint8), size), left)
    moving = region_tokens(backbone, ((0, 0, 0, 0.5, 1), (1, 0.5, 0, 1, 1)), size)
    assert [int(frame.any(0).nonzero().min()) for frame in moving] == [0, 1, 2]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (np.zeros((9, 64, 64), dtype=bool), "covers no token of 16 x 16 pixels by half"),
        (np.zeros((9, 64, 64, 3), dtype=bool), r"\[T, H, W\] or \[H, W\]"),
        (np.full((64, 64), 1.5), "bool, uint8"),
        ((0.5, 0, 0.2, 1), "left < right"),
        ((0, 0, 1), "such boxes with their times in front"),
    ],
    ids=["empty", "axes", "range", "order", "length"],
)
def test_what_is_no_region(case, region, message):
    backbone, video, arguments = case("cogvideox")
    with pytest.raises(ValueError, match=message):
        MotionTransfer(backbone, block=1, **SETTINGS)(video, region=region, **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_everywhere_is_no_region(case, method):
    backbone, video, arguments = case("cogvideox")
    transfer = MotionTransfer(backbone, block=1, method=method, motion_channels=0.2, **SETTINGS)
    whole, region = (transfer(video, region=region, **arguments) for region in (None, EVERYWHERE))
    np.testing.assert_allclose(region.losses, whole.losses, rtol=1e-4)
    assert bool(region.region.all())
    assert whole.region is None


@pytest.mark.parametrize("name", ["cogvideox", "wan", "ltx"])
@pytest.mark.parametrize("method", METHODS)
def test_latents_outside_a_region_are_left_as_they_were(case, name, method):
    backbone, video, arguments = case(name)
    if (name, method) == ("ltx", "motionclone"):
        return  # two latent frames
    transfer = MotionTransfer(
        backbone, block=1, method=method, motion_channels=0.2, **{**SETTINGS, "guided_share": 0.3}
    )
    result = transfer(video, region=LEFT, **arguments)
    plain = MotionTransfer(backbone, block=1, method="ditflow", **{**SETTINGS, "learning_rate": 1e-30})(
        video, **arguments
    )
    moved = result.optimised.tensors[0]["latent"] != plain.optimised.tensors[0]["latent"]
    inside = LatentLayout(backbone).region(result.region).bool()
    assert not moved[~inside].any()
    assert moved[inside].any()
    assert 0.2 < float(inside.float().mean()) < 0.8


def test_the_flow_outside_a_region_counts_nothing(case):
    """The loss is that of the tokens inside, written out."""
    backbone, video, arguments = case("cogvideox")
    settings = {"block": 1, "loss": "paper", "steps": 3, "guided_share": 0.3, "optimisation_steps": 1}
    transfer = MotionTransfer(backbone, **settings)
    seen = []

    class Spy(type(transfer.objective)):
        def loss(self, read, wanted):
            flow = ops.soft_displacement(read.q, read.k, read.grid, temperature=2.0, backend="reference")
            squared = (flow - wanted).square().sum(-1)[0]
            seen.append(float(squared[read.region[:, None].expand_as(squared)].sum()))
            return super().loss(read, wanted)

    result = MotionTransfer(backbone, method=Spy, **settings)(video, region=LEFT, **arguments)
    assert result.losses[0, 0] == pytest.approx(seen[0], rel=1e-4)


def test_injection_into_a_region_keeps_the_rest(case):
    backbone, video, arguments = case("cogvideox")
    options = {"method": "injection", "injection_blocks": (0,), "steps": 2}
    whole, part, everywhere = (
        MotionTransfer(backbone, **options)(video, region=region, **arguments).video
        for region in (None, LEFT, EVERYWHERE)
    )
    np.testing.assert_array_equal(everywhere, whole)
    assert (part != whole).any()


@pytest.mark.parametrize(
    ("name", "optimise"), [("cogvideox", "latent"), ("wan", "latent"), ("cogvideox", "embedding"), ("wan", "embedding")]
)
def test_stored_motions_are_composed_by_region(case, name, optimise):
    backbone, video, arguments = case(name)
    transfer = MotionTransfer(backbone, block=1, optimise=optimise, **SETTINGS)
    first, second = (transfer(clip, **arguments).optimised for clip in (video, video[::-1].copy()))
    again = transfer(None, stored=first, region=EVERYWHERE, elsewhere=second, **arguments).video
    np.testing.assert_array_equal(again, transfer(None, stored=first, **arguments).video)
    empty = np.zeros((64, 64), dtype=bool)
    empty[:16, :16] = True
    both = transfer(None, stored=first, region=LEFT, elsewhere=second, **arguments).video
    swapped = transfer(None, stored=second, region=(0.5, 0, 1, 1), elsewhere=first, **arguments).video
    np.testing.assert_array_equal(both, swapped)
    assert (both != again).any()
    with pytest.raises(ValueError, match="elsewhere goes with stored and region"):
        transfer(None, stored=first, elsewhere=second, **arguments)
    second.tensors.pop(1)
    with pytest.raises(ValueError, match="do not go together: at is"):
        transfer(None, stored=first, region=LEFT, elsewhere=second, **arguments)


def test_stored_motion_goes_into_a_region_alone(case):
    backbone, video, arguments = case("cogvideox", guided=False)
    transfer = MotionTransfer(backbone, block=1, **{**SETTINGS, "guided_share": 0.3})
    stored = transfer(video, **arguments).optimised
    seen = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    plain = MotionTransfer(backbone, method="backbone", steps=3)(video, **arguments)
    start = seen[1]  # the first is the reference's
    patched = []
    watched = backbone.transformer.patch_embed.register_forward_pre_hook(
        lambda module, args: patched.append(args[1].clone())
    )
    part = transfer(None, stored=stored, region=LEFT, **arguments)
    hook.remove()
    watched.remove()
    inside = LatentLayout(backbone).region(part.region).bool()
    torch.testing.assert_close(patched[0][inside], stored.tensors[0]["latent"][inside])
    torch.testing.assert_close(patched[0][~inside], start[~inside])
    assert (part.video != plain.video).any()


def test_the_guided_window_can_begin_later(case):
    settings = TransferSettings((0,), steps=10, guided_start=0.3, guided_share=0.2, learning_rate=(0.4, 0.2))
    assert settings.guided_window == range(3, 5)
    assert [settings.rate(step) for step in settings.guided_window] == pytest.approx([0.4, 0.3])
    assert TransferSettings((0,), steps=10, guided_start=0.9, guided_share=0.5).guided_window == range(9, 10)
    backbone, video, arguments = case("cogvideox")
    reported = []
    result = MotionTransfer(backbone, block=1, **{**SETTINGS, "guided_start": 0.3, "guided_share": 0.3})(
        video, report=lambda done, steps, losses: reported.append(len(losses)), **arguments
    )
    assert result.guided == range(1, 2)
    assert reported == [0, 2, 0]
    assert list(result.optimised.tensors) == [1]
    again = MotionTransfer(backbone, block=1, **SETTINGS)(None, stored=result.optimised, **arguments)
    np.testing.assert_array_equal(again.video, result.video)


def test_gradients_are_kept_between_steps_of_the_optimiser():
    settings = TransferSettings(
        (0,), optimisation_steps=5, optimiser_interval=3, optimizer="sgd", learning_rate=(0.5, 0.25),
        rate_falls="optimisation steps",
    )  # fmt: skip
    computed = []

    def loss_of(leaves):
        computed.append(leaves["x"].detach().clone())
        return leaves["x"].square().sum()

    found, losses = optimised({"x": torch.ones(1)}, loss_of, settings, 4, OptimiserMemory(), half_precision=False)
    assert len(computed) == 2
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True, False, True])
    x = gradient = 1.0
    for iteration, rate in enumerate([0.5, 0.45, 0.4, 0.35, 0.3]):
        if iteration % 3 == 0:
            gradient = 2 * x
        x -= rate * gradient
    assert float(found["x"]) == pytest.approx(x)


@pytest.mark.parametrize("name", ["cogvideox", "wan", "hunyuanvideo"])
def test_fastvmt_lowers_its_loss(case, name):
    backbone, video, arguments = case(name)
    options = {**SETTINGS, "optimisation_steps": 4, "learning_rate": (0.01, 0.005), "optimizer": "adamw", **FAST}
    result = MotionTransfer(backbone, block=1, **options)(video, **arguments)
    assert np.isnan(result.losses).tolist() == [[False, True, False, True]] * 2
    assert result.losses[1, 2] < result.losses[1, 0]


def test_the_pairs_of_a_signed_span():
    assert TransferSettings((0,), span=[0, 3]).span == (0, 3)
    for span, message in (((3, 0), "least, most"), ((1, 2, 3), "number of frames or"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=message):
            TransferSettings((0,), span=span)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tracking_weight": 0.2}, "tile is None"),
        ({"distance_weights": (1, -1)}, "distance_weights must be finite and at least 0"),
        ({"distance_weights": 1}, "same frame, farthest"),
        ({"strength": 0}, "strength is a share above 0"),
        ({"guided_start": 1.5}, "guided_start is a share of the steps"),
        ({"rate_falls": "never"}, "rate_falls must be one of"),
        ({"source_prompt": None}, "must be texts"),
        ({"tile": (1, 1), "window": 2}, "single token"),
    ],
    ids=str,
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TransferSettings((0,), **options)


@pytest.mark.parametrize(
    ("name", "scheduler"), [("cogvideox", None), ("cogvideox", "CogVideoXDPMScheduler"), ("wan", None)]
)
def test_a_run_begins_at_the_noised_reference(case, name, scheduler):
    backbone, video, arguments = case(name, guided=False)
    settings = {"steps": 4, "guided_share": 0.25, "scheduler": scheduler, "strength": 0.5}
    made = run_scheduler(backbone, TransferSettings((0,), **settings))
    made.set_timesteps(4)
    whole = run_scheduler(backbone, TransferSettings((0,), **{**settings, "strength": 1.0}))
    whole.set_timesteps(8)
    assert made.timesteps.tolist() == whole.timesteps[4:].tolist()
    seen = []
    hook = backbone.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"].clone(), kwargs["timestep"])),
        with_kwargs=True,
    )
    MotionTransfer(backbone, method="backbone", **{**settings, "strength": 1.0})(video, seed=3, **arguments)
    noise = seen[-4][0]
    seen.clear()
    patched = []
    embed = backbone.transformer.patch_embed if name == "cogvideox" else backbone.transformer.patch_embedding
    watched = embed.register_forward_pre_hook(lambda module, args: patched.append(args[-1].clone()))
    transfer = MotionTransfer(backbone, method="backbone", **settings)
    result = transfer(video, seed=3, **arguments)
    hook.remove()
    watched.remove()
    times = [float(time.max()) for _, time in seen][-4:]
    assert times == pytest.approx(whole.timesteps[4:].tolist())
    reference = transfer.reference_motion(video).latents
    clean = backbone.call_arguments(codec_latents(backbone, reference), 0.0, {})["hidden_states"]
    torch.testing.assert_close(patched[-4], backbone.add_noise(clean, noise, times[0]))
    assert result.video.shape == video.shape
    with pytest.raises(ValueError, match="begins at a reference"):
        transfer(None, num_frames=9, **arguments)


def test_time_that_runs_the_other_way_has_no_later_beginning(case):
    with pytest.raises(ValueError, match="time of tiny mochi runs from noise to clean"):
        MotionTransfer(case("mochi")[0], strength=0.5)


@pytest.mark.parametrize("method", ["ditflow", "smm", "flowmotion"])
def test_a_noised_reference_is_read_at_every_guided_step(case, method):
    backbone, video, arguments = case("cogvideox")
    transfer = MotionTransfer(backbone, block=1, method=method, reference_noised=True, **SETTINGS)
    read = []
    own = type(transfer.objective).of_reference
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(transfer.objective), "of_reference", lambda self, found: read.append(1) or own(self, found))
        transfer(video, **arguments)
    assert len(read) == 2
    assert transfer.reference_motion(video).wanted == {}


def test_a_source_prompt_is_what_the_reference_is_read_with(case):
    from corrdit import load_backbone

    backbone = load_backbone("embedded")
    _, video, _ = case("cogvideox")
    plain, told = (
        MotionTransfer(backbone, block=4, method="smm", source_prompt=prompt).reference_motion(
            video, num_frames=4, height=32, width=32
        )
        for prompt in ("", "a red disc moves left over grass")
    )
    assert not torch.equal(plain.wanted[4], told.wanted[4])
    tiny, video, arguments = case("cogvideox")
    with pytest.raises(ValueError, match="no text encoder for the source prompt"):
        MotionTransfer(tiny, block=1, source_prompt="a disc", **SETTINGS)(video, **arguments)


def test_a_resumed_run_says_so(case, tmp_path):
    backbone, video, arguments = case("cogvideox")
    state = tmp_path / "state.safetensors"
    transfer = MotionTransfer(backbone, block=1, method="flowmotion", strength=0.75, **SETTINGS)
    whole = transfer(video, **arguments)
    assert whole.resumed_after == 0

    def stop(done, steps, losses):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transfer(video, state_file=state, report=stop, **arguments)
    with pytest.warns(UserWarning, match="goes on after denoising step 1 of 3"):
        again = transfer(video, state_file=state, **arguments)
    assert again.resumed_after == 1
    np.testing.assert_array_equal(again.video, whole.video)
    np.testing.assert_array_equal(again.losses, whole.losses)


def test_the_differences_of_predictions_are_weighed_by_the_region(case):
    backbone, video, arguments = case("cogvideox")
    seen = []
    own = PredictedMotion.loss

    def spied(self, read, wanted):
        inside = read.latent_region.expand_as(read.clean)
        seen.append(float((read.clean - wanted).square()[inside].mean()))
        return own(self, read, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PredictedMotion, "loss", spied)
        patch.setattr(PredictedMotion, "weights", (1.0, 0.0))
        result = MotionTransfer(backbone, block=1, method="flowmotion", **SETTINGS)(video, region=LEFT, **arguments)
    assert result.losses.flatten() == pytest.approx(seen, rel=1e-4)
    assert isinstance(result.optimised, StoredMotion)


def test_published_settings_are_those_of_a_models_shape_and_of_the_method():
    for shape, method, source, method_found in (
        (("wan", 30, 12), None, "FastVMT", "ditflow"),
        (("wan", 30, 12), "flowmotion", "FlowMotion", "flowmotion"),
        (("wan", 30, 12), "moft", "FastVMT", "ditflow"),
        (("wan", 40, 40), None, "FastVMT", "ditflow"),
        (("cogvideox", 30, 30), None, "DiTFlow", "ditflow"),
    ):
        settings = published_transfer(*shape, method)
        assert settings.source.startswith(source)
        assert settings.method == method_found
    assert published_transfer("ltx", 28, 32) is None
    wan = published_transfer("wan", 30, 12)
    assert [wan.rate(7, iteration) for iteration in range(10)] == pytest.approx(np.linspace(0.003, 0.002, 11)[:10])
    assert wan.guided_window == range(10)
    assert (wan.span, wan.window, wan.tile, wan.optimiser_interval, wan.strength) == ((0, 3), 10, (3, 4), 3, 0.75)


@pytest.mark.parametrize("published", [FASTVMT, FLOWMOTION], ids=["fastvmt", "flowmotion"])
def test_published_settings_run_on_a_small_model(case, published):
    backbone, video, arguments = case("wan")
    options = {"block": 1, "steps": 4, "optimisation_steps": 4, "guided_share": 0.5}
    result = MotionTransfer(backbone, settings=published, **options)(video, **arguments)
    assert np.isfinite(result.losses[:, 0]).all()
    scheduler = run_scheduler(backbone, published)
    scheduler.set_timesteps(50)
    sigmas = published.strength * np.linspace(1, 0, 51)[:50]
    shift = dict(published.scheduler_options)["shift"]
    # How the last steps are spaced is the scheduler's own.
    expected = shift * sigmas / (1 + (shift - 1) * sigmas)
    np.testing.assert_allclose(scheduler.sigmas[:30], expected[:30], atol=0.01)
