"""Clean latents to noisy steps and back: diffusers' own schedulers say where each step leads."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, DDIMInverseScheduler, UniPCMultistepScheduler

from corrdit.integrations.diffusers.inversion import DDIMPath, EulerPath, noise_path, released_moves
from corrdit.testing import tiny_backbone

STEPS = 5
FAMILIES = ["cogvideox-rotary", "cogvideox-1.5", "cogvideox-image", "hunyuanvideo", "wan", "wan-image", "ltx", "mochi"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no text encoder"),
    pytest.mark.filterwarnings("ignore:.*CPU autocast"),
]


def clean(backbone, frames: int = 2, batch: int | None = None) -> torch.Tensor:
    _, rows, columns = backbone.layout().patch_size(backbone.transformer)
    shape = (frames, backbone.latent_channels * backbone.frames_per_token, 4 * rows, 4 * columns)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*(() if batch is None else (batch,)), *shape, generator=generator)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_predicts_in_the_shape_of_its_latents(name):
    """The output moved one step is what the family's own pipeline code makes of it: channels, frames and places."""
    backbone = tiny_backbone(name)
    latents = clean(backbone, batch=2)
    output = backbone.predict(latents, 300.0)
    assert output.shape == latents.shape
    alone = backbone.predict(latents[1], 300.0)
    assert torch.allclose(output[1], alone, atol=1e-4)
    moved = latents.clone()
    moved[1, 1] += 3 * torch.randn(latents.shape[2:], generator=torch.Generator().manual_seed(1))
    changed = (backbone.predict(moved, 300.0) - output).abs()
    # Attention spreads the change, but it stays largest where it was made.
    assert changed[0].max() < 1e-4
    assert changed[1, 1].mean() > 1.5 * changed[1, 0].mean()


@pytest.mark.parametrize("name", ["ltx", "wan", "mochi", "hunyuanvideo"])
def test_predictions_are_laid_out_as_the_pipelines_lay_them_out(name):
    """A transformer that gives back its input predicts the latents themselves."""
    backbone = tiny_backbone(name)
    latents = torch.arange(2 * backbone.latent_channels * 4 * 8, dtype=torch.float32)
    latents = latents.reshape(2, backbone.latent_channels, 4, 8)
    backbone.transformer.forward = lambda hidden_states, **arguments: (hidden_states,)
    assert torch.equal(backbone.predict(latents, 300.0), latents)


@pytest.mark.parametrize("name", FAMILIES)
def test_denoising_is_the_schedulers_own(name):
    backbone = tiny_backbone(name)
    scheduler = backbone.stepping_scheduler(STEPS)
    latents = clean(backbone)
    image = {"image": latents[:1]} if backbone.takes_image else {}
    found = dict(backbone.denoised(latents, 1, [1, 2, 4], STEPS, **image))
    assert torch.equal(found[1], latents)
    expected = latents
    for step in range(1, 4):
        timestep = scheduler.timesteps[step]
        output = backbone.predict(expected, float(timestep), **image)
        expected = scheduler.step(output, timestep, expected, return_dict=False)[0]
        if step + 1 in found:
            assert torch.allclose(found[step + 1], expected, atol=1e-4), step


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_inversion_is_that_of_diffusers(prediction):
    backbone = tiny_backbone("cogvideox-rotary")
    backbone.pipe.scheduler.register_to_config(prediction_type=prediction)
    scheduler = DDIMInverseScheduler(clip_sample=False, timestep_spacing="trailing", prediction_type=prediction)
    # CogVideoX shifts its signal-to-noise ratio, which the inverse scheduler does not know of.
    scheduler.alphas_cumprod = backbone.pipe.scheduler.alphas_cumprod
    scheduler.set_timesteps(STEPS)
    latents = expected = clean(backbone)
    found = dict(backbone.inverted(latents, [1, 3], STEPS))
    assert list(found) == [3, 1]
    for step, timestep in zip((4, 3, 2, 1), scheduler.timesteps, strict=False):
        expected = scheduler.step(backbone.predict(expected, float(timestep)), int(timestep), expected).prev_sample
        if step in found:
            assert torch.allclose(found[step], expected, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_says_the_same_everywhere_is_inverted_exactly(name):
    backbone = tiny_backbone(name)
    latents = clean(backbone)
    constant = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    if "cogvideox" in name:
        backbone.pipe.scheduler.register_to_config(prediction_type="epsilon")
    backbone.predict = lambda latents, timestep, image=None: constant
    noisy = dict(backbone.inverted(latents, [1, 2], STEPS))
    (_, back) = list(backbone.denoised(noisy[1], 1, [2], STEPS))[-1]
    assert torch.allclose(back, noisy[2], atol=1e-4)
    # One more move leads to the clean latents.
    path = noise_path(backbone.stepping_scheduler(STEPS), name=name)
    for step in range(2, STEPS):
        back = path.moved(back, constant, step, step + 1)
    assert torch.allclose(back, latents, atol=1e-3)


@pytest.mark.parametrize(
    ("steps", "some"),
    [
        (50, {0: (0, 20), 1: (19, 39), 2: (39, 59), 9: (179, 199), 49: (979, 999)}),
        (30, {0: (0, 33), 1: (32, 65), 2: (66, 99), 29: (966, 999)}),
        (20, {0: (0, 50), 1: (49, 99), 19: (949, 999)}),
        (7, {0: (0, 142), 1: (142, 284), 6: (856, 998)}),
        (1, {0: (0, 999)}),  # the released code fails here, beyond its last level
    ],
)
def test_where_the_released_inversion_asks_and_arrives(steps, some):
    """By hand from the released loop: t = 0 before the ascending timesteps, each call `1000 // N` further."""
    backbone = tiny_backbone("cogvideox-rotary")
    asked = []
    backbone.predict = lambda latents, timestep, image=None: asked.append(timestep) or torch.zeros_like(latents)
    timesteps = backbone.stepping_scheduler(steps).timesteps.tolist()
    moves = released_moves(timesteps)
    assert {call: moves[call] for call in some} == some
    assert [at for at, _ in moves] == [0, *timesteps[:0:-1]]
    assert {reached - at for at, reached in moves} == {1000 // steps} if steps > 1 else {999}
    latents = clean(backbone)
    for step in {0, 1, steps // 2, steps - 2, steps - 1} & set(range(steps)):
        asked.clear()
        dict(backbone.inverted(latents, [step], steps, rule="released"))
        assert asked == [at for at, _ in moves[: steps - step]], step


def test_at_fifty_steps_the_released_inversion_arrives_at_the_level_that_is_read():
    timesteps = tiny_backbone("cogvideox-rotary").stepping_scheduler(50).timesteps.tolist()
    reached = [after for _, after in released_moves(timesteps)][::-1]
    assert reached == [*timesteps[:49], 20]


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("step", range(STEPS))
def test_the_released_inversion(step, prediction):
    """As the released `inverse_step`: from alphas[t] to alphas[t + 1000 // steps]."""
    backbone = tiny_backbone("cogvideox-rotary")
    backbone.pipe.scheduler.register_to_config(prediction_type=prediction)
    scheduler = backbone.stepping_scheduler(STEPS)
    latents = expected = clean(backbone)
    for timestep in [0, *reversed(scheduler.timesteps.tolist())][: STEPS - step]:
        output = backbone.predict(expected, float(timestep))
        now, after = (float(scheduler.alphas_cumprod[at]) for at in (timestep, timestep + 1000 // STEPS))
        if prediction == "epsilon":
            original, noise = (expected - math.sqrt(1 - now) * output) / math.sqrt(now), output
        else:
            original = math.sqrt(now) * expected - math.sqrt(1 - now) * output
            noise = math.sqrt(now) * output + math.sqrt(1 - now) * expected
        expected = math.sqrt(after) * original + math.sqrt(1 - after) * noise
    found = dict(backbone.inverted(latents, [step], STEPS, rule="released"))[step]
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, dict(backbone.inverted(latents, [step], STEPS))[step], atol=1e-3)


def test_paths_by_scheduler():
    backbone = tiny_backbone("cogvideox-rotary")
    backbone.pipe.scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction")
    assert isinstance(noise_path(backbone.stepping_scheduler(STEPS), name="m"), DDIMPath)
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    wan = tiny_backbone("wan")
    wan.pipe.scheduler = flow
    path = noise_path(wan.stepping_scheduler(STEPS), name="m")
    assert isinstance(path, EulerPath)
    assert path.sigmas[-1] == 0
    assert path.sigmas[0] > 0.99


def test_what_cannot_be_inverted_is_refused():
    backbone = tiny_backbone("cogvideox-rotary")
    latents = clean(backbone)
    for options, message in (
        ({"steps": [STEPS]}, "steps must be from 0 to 4"),
        ({"steps": []}, "at least one"),
        ({"steps": [-1]}, "step must be a whole number of at least 0"),
        ({"steps": [1], "rule": "exact"}, "rule must be one of ddim, released"),
    ):
        with pytest.raises(ValueError, match=message):
            dict(backbone.inverted(latents, inference_steps=STEPS, **options))
    with pytest.raises(ValueError, match="step 1 is noisier than step 2, where denoising begins"):
        dict(backbone.denoised(latents, 2, [1], STEPS))
    with pytest.raises(ValueError, match="and tiny wan is a model of flow matching; use 'ddim'"):
        dict(tiny_backbone("wan").inverted(clean(tiny_backbone("wan")), [1], STEPS, rule="released"))
    backbone.predict = lambda latents, timestep, image=None: latents * float("nan")
    with pytest.raises(ValueError, match="latents inverted to step 4 by tiny cogvideox-rotary are NaN or infinite"):
        dict(backbone.inverted(latents, [1], STEPS))
    backbone.pipe.scheduler = DDIMInverseScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="DDIMInverseScheduler with predictions of sample, for which no inversion is"):
        dict(backbone.inverted(latents, [1], STEPS))
