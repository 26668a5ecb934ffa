"""What a transfer refuses or says instead of going on with something else than was asked for."""

import numpy as np
import pytest
import torch

from corrdit.array_files import content_digest
from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.motion_transfer import DivergedError, MotionTransfer, StoredMotion, TransferSettings
from corrdit.video import write_video

SETTINGS = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 2, "learning_rate": 0.05}


def transfer_of(backbone, **changes):
    return MotionTransfer(backbone, block=1, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def stored():
    """Latents of all three steps of a run, the first of which alone are guided by default."""
    tensors = {step: {"latent": torch.zeros(1, 3, 4, 8, 8)} for step in range(3)}
    return StoredMotion("latent", "tiny cogvideox", 3, 9, 64, 64, tensors)


@pytest.mark.parametrize("changes", [{"guided_share": 0.3}, {"method": "backbone"}], ids=str)
def test_stored_motion_goes_in_at_all_of_its_steps(case, stored, changes):
    backbone, _, arguments = case("cogvideox")
    seen = []
    hook = backbone.transformer.patch_embed.register_forward_pre_hook(
        lambda module, inputs: seen.append(float(inputs[1].abs().max()))
    )
    transfer_of(backbone, **changes)(None, stored=stored, **arguments)
    hook.remove()
    assert seen == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({"steps": 4}, {}, "made with steps 3, not 4; give steps=3"),
        ({}, {"num_frames": 17}, "made with num_frames 9, not 17"),
        ({}, {"height": 32}, "made with height 64, not 32"),
    ],
    ids=str,
)
def test_stored_motion_for_another_run_is_refused(case, stored, changes, call, message):
    backbone, _, arguments = case("cogvideox")
    with pytest.raises(ValueError, match=message):
        transfer_of(backbone, **changes)(None, stored=stored, **{**arguments, **call})


def test_stored_motion_of_another_model_is_warned_of(case, stored):
    backbone, _, arguments = case("cogvideox-rotary")
    with pytest.warns(UserWarning, match="made with the model tiny cogvideox and is given to tiny cogvideox-rotary"):
        transfer_of(backbone)(None, stored=stored, **arguments)


@pytest.mark.parametrize("method", ["ditflow", "smm", "moft", "motionclone"])
def test_every_method_names_the_step_at_which_it_diverges(case, method):
    backbone, video, arguments = case("cogvideox")
    changes = {"method": method, "learning_rate": 1e30, "motion_channels": 0.2}
    with pytest.raises(DivergedError, match="denoising step 0, optimisation step 1") as caught:
        transfer_of(backbone, **changes)(video, **arguments)
    assert np.shape(caught.value.losses) == (1, 2)
    assert np.isfinite(caught.value.losses[0][0])


def test_a_result_that_overflows_after_the_last_loss_is_found(case):
    backbone, video, arguments = case("cogvideox")
    changes = {"learning_rate": 1e38, "optimizer": "sgd", "loss": "paper", "optimisation_steps": 1, "guided_share": 0.3}
    with pytest.raises(DivergedError, match="the optimised latent became infinite at denoising step 0") as caught:
        transfer_of(backbone, **changes)(video, **arguments)
    assert torch.isfinite(caught.value.last_good["latent"]).all()
    # A finite latent that no model can denoise has a finite loss, too.
    changes |= {"learning_rate": 1e30, "optimizer": "adam"}
    with pytest.raises(ValueError, match="made frames that are NaN"):
        transfer_of(backbone, **changes)(video, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 0}, "height must be a whole number of at least 1"),
        ({"width": -32}, "width must be a whole number of at least 1"),
        ({"height": 32.5}, "height must be a whole number"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1"),
        ({"return_dict": False}, "return_dict cannot be given to the pipeline"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["ditflow", "backbone"])
def test_sizes_and_arguments_that_cannot_serve(case, method, call, message):
    backbone, video, arguments = case("cogvideox")
    with pytest.raises(ValueError, match=message):
        transfer_of(backbone, method=method)(video, **{**arguments, **call})


def test_no_frames_without_a_reference(case):
    backbone, _, arguments = case("cogvideox")
    with pytest.raises(ValueError, match="num_frames must be a whole number"):
        transfer_of(backbone, method="backbone")(None, num_frames=0, **arguments)


def test_motionclone_needs_a_third_latent_frame(case):
    backbone, video, arguments = case("cogvideox")
    with pytest.raises(ValueError, match="of 2 latent frames each has one other"):
        transfer_of(backbone, method="motionclone")(video[:5], **arguments)


def test_a_reference_can_be_a_path(case, tmp_path):
    backbone, video, _ = case("cogvideox")
    write_video(tmp_path / "clip.gif", list(video), 8)
    frames = transfer_of(backbone).reference_motion(tmp_path / "clip.gif").frames
    assert frames.shape == video.shape
    with pytest.raises(ValueError, match="no file or folder"):
        transfer_of(backbone).reference_motion("nothing.mp4")


def test_smm_follows_its_paper_unless_told():
    assert TransferSettings(blocks=(0,), method="smm").loss_variant == "paper"
    assert TransferSettings(blocks=(0,), method="smm", loss="released").loss_variant == "released"
    assert TransferSettings(blocks=(0,)).loss_variant == "released"
    assert TransferSettings(blocks=(0,), method="smm").described()["loss"] == "paper"


def test_fingerprints_are_of_values_and_not_of_addresses():
    from PIL import Image

    big = np.zeros((300, 300), dtype=np.uint8)
    other = big.copy()
    other[150, 150] = 1
    pictures = [Image.fromarray(array) for array in (big, big, other)]
    assert content_digest(pictures[0]) == content_digest(pictures[1]) != content_digest(pictures[2])
    assert content_digest(big) != content_digest(other)
    half = torch.ones(2, dtype=torch.bfloat16)
    assert (
        content_digest({"a": half, "b": 1})
        == content_digest({"b": 1, "a": half.clone()})
        != content_digest({"a": half})
    )

    def made_anew():
        def callback():
            return None

        return callback

    first, second = made_anew(), made_anew()
    assert repr(first) != repr(second)
    assert content_digest(first) == content_digest(second) != content_digest(made_anew)


class Interrupted:
    """Presses Ctrl-C in the chosen forward of an attention layer."""

    def __init__(self, call):
        self.calls, self.call = 0, call

    def __call__(self, module, inputs):
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt


@pytest.mark.parametrize("call", [2, 6])
@pytest.mark.parametrize("optimise", ["latent", "embedding"])
def test_ctrl_c_leaves_the_model_as_it_was(case, optimise, call):
    backbone, video, arguments = case("cogvideox-rotary")
    pipe, transformer = backbone.pipe, backbone.transformer
    modules = layout_of(transformer).attention_modules(transformer)
    transformer.requires_grad_(True)
    before = (pipe.scheduler, [module.processor for module in modules])
    pressing = modules[1].register_forward_pre_hook(Interrupted(call))
    changes = {"optimise": optimise, "injection_blocks": (0,), "gradient_checkpointing": True}
    with pytest.raises(KeyboardInterrupt):
        transfer_of(backbone, **changes)(video, **arguments)
    pressing.remove()
    assert (pipe.scheduler, [module.processor for module in modules]) == before
    assert "forward" not in transformer.__dict__
    assert all(weight.requires_grad for weight in transformer.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    assert not transformer.is_gradient_checkpointing


def test_a_run_whose_video_was_not_put_in_safety_goes_on(case, tmp_path):
    backbone, video, arguments = case("cogvideox")
    transfer, state = transfer_of(backbone), tmp_path / "state.safetensors"
    whole = transfer(video, state_file=state, keep_state=True, **arguments)
    assert state.exists()
    computed = []
    again = transfer(video, state_file=state, report=lambda *step: computed.append(step), **arguments)
    assert not computed
    np.testing.assert_array_equal(again.video, whole.video)
    np.testing.assert_array_equal(again.losses, whole.losses)
    assert not state.exists()
