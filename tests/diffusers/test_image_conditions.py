"""Image-to-video transformers get their image as their own pipelines give it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit.testing import tiny_backbone, tiny_generation

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
NAMES = ["cogvideox-image", "wan-image"]

pytestmark = pytest.mark.filterwarnings("ignore:.*no text encoder")


class Stopped(Exception):
    """Ends a pipeline at its transformer."""


def given_to_transformer(backbone, run) -> torch.Tensor:
    """The hidden states of the first call."""
    seen = []

    def stop(module, args, arguments):
        seen.append(arguments["hidden_states"])
        raise Stopped

    handle = backbone.transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with pytest.raises(Stopped):
            run()
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_frame_is_given_as_the_pipeline_gives_it(name):
    """Channels beside the noisy latents: the image's latents (and the mask of Wan) at the first frame."""
    backbone = tiny_backbone(name)
    axis, channels = backbone.channel_axis, backbone.latent_channels
    image = torch.from_numpy(VIDEO[0]).permute(2, 0, 1)[None] / 255
    arguments = {**tiny_generation(name, guided=False), "image": image}
    if name == "cogvideox-image":
        # The pipeline draws the image's latents from their distribution, and scales them; the backbone takes the mode.
        encode = backbone.pipe.vae.encode

        def mode_only(*args, **kwargs):
            encoded = encode(*args, **kwargs)
            encoded.latent_dist.sample = lambda generator=None: encoded.latent_dist.mode()
            return encoded

        backbone.pipe.vae.encode = mode_only
    pipelines = given_to_transformer(backbone, lambda: backbone.pipe(**arguments))
    latents = backbone.encode_frames(VIDEO)
    noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    ours = given_to_transformer(backbone, lambda: backbone.predict(noisy, 500.0, image=latents[:1]))
    assert ours.shape == pipelines.shape
    _, condition = ours.tensor_split([channels], dim=axis)
    _, expected = pipelines.tensor_split([channels], dim=axis)
    frame_axis = 3 - axis
    assert torch.allclose(condition.select(frame_axis, 0), expected.select(frame_axis, 0), atol=1e-4)
    if name == "cogvideox-image":
        assert torch.equal(condition.narrow(frame_axis, 1, 2), expected.narrow(frame_axis, 1, 2))
    else:
        assert torch.equal(condition[:, :4], expected[:, :4])
        grey = backbone._encode(torch.zeros(1, 3, 1, 64, 64))[:, :, 0]
        assert torch.allclose(condition[0, 4:, 1:].transpose(0, 1), grey.expand(2, -1, -1, -1), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_clean_beside_noisy_latents(name):
    """Without an image the first latents are taken; with one of all frames, every frame."""
    backbone = tiny_backbone(name)
    latents = backbone.encode_frames(VIDEO)
    noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    axis, channels = backbone.channel_axis, backbone.latent_channels

    def condition(image, batch=noisy):
        hidden = given_to_transformer(backbone, lambda: backbone.forward(batch, 500.0, {0: norms}, image=image))
        return hidden.movedim(axis, 2)[:, :, -channels:]

    def norms(q, k, grid, key_mask):
        return q.norm()

    assert torch.equal(condition(None)[0, 0], noisy[0])
    assert torch.equal(condition(latents[:1])[0, 0], latents[0])
    assert torch.equal(condition(latents)[0], latents)
    assert not torch.equal(condition(latents[:1])[0, 1], latents[1])
    two = torch.stack([noisy, noisy.flip(0)])
    assert torch.equal(condition(latents, two), torch.stack([latents, latents]))
    assert torch.equal(condition(torch.stack([latents, -latents])[:, :1], two)[1, 0], -latents[0])


def test_images_that_do_not_fit_and_models_that_take_none():
    backbone = tiny_backbone("cogvideox-image")
    latents = backbone.encode_frames(VIDEO)
    for image in (latents[:2], latents[:1, :, :4], latents[:1].expand(3, 1, -1, -1, -1)):
        with pytest.raises(ValueError, match="image must be latents of one frame or of all 3"):
            backbone.predict(latents, 500.0, image=image)
    for name in ("cogvideox", "wan", "ltx"):
        other = tiny_backbone(name)
        latents = torch.zeros(2, other.latent_channels, 4, 4)
        with pytest.raises(ValueError, match=f"tiny {name} takes no image beside the latents; leave image out"):
            other.predict(latents, 500.0, image=latents[:1])


def test_frames_are_resized_as_the_released_evaluation_does():
    """Bilinear to 256 x 256 and then on, without antialiasing and without rounding between."""
    backbone = tiny_backbone("cogvideox")
    video = np.random.default_rng(1).integers(0, 256, (2, 300, 400, 3), dtype=np.uint8)
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    for size in ((256, 256), (48, 64)):
        frames = torch.nn.functional.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    seen = []
    backbone._encode = lambda clips, seeds: seen.append(clips) or torch.zeros(len(clips), 4, 1, 6, 8)
    for resizing in ({"first": (256, 256), "antialias": False}, {"antialias": False}, {}):
        backbone.encode_frames(video, height=48, width=64, **resizing)
    assert torch.allclose(seen[0][:, :, 0], frames / 127.5 - 1, atol=1e-5)
    assert not torch.allclose(seen[1], seen[0], atol=0.05)
    assert not torch.allclose(seen[2], seen[1], atol=0.05)
