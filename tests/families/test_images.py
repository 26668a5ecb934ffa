"""Image to video: what a generation from a picture can be used for, and why not for more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import MotionTransfer, TokenGrid, capture
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.integrations.diffusers.analysis import analyze_generation
from corrdit.integrations.diffusers.backbones.easyanimate import EasyAnimateBackbone
from corrdit.integrations.diffusers.backbones.hunyuanvideo import HunyuanVideoBackbone
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation, tiny_pipeline
from corrdit.tracking import Tracks

VIDEO = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)

pytestmark = pytest.mark.filterwarnings("ignore:.*no text encoder")


def standing(video: np.ndarray, queries: np.ndarray) -> Tracks:
    xy = np.repeat(queries[None, :, 1:], len(video), axis=0)
    return Tracks(xy=xy, visible=np.ones(xy.shape[:2], bool), score=np.ones(xy.shape[:2]))


@pytest.mark.skipif("kandinsky6" not in TINY_MODELS, reason="this diffusers has no Kandinsky 6")
def test_an_image_of_kandinsky_6_is_a_further_frame() -> None:
    backbone = tiny_backbone("kandinsky6")
    call = {**tiny_generation("kandinsky6", steps=2), "image": torch.rand(1, 3, 64, 64)}
    with capture(backbone.pipe, layers=0, steps=0, operation=lambda q, k, grid, mask: grid) as captured:
        backbone.pipe(**call)
    whole = TokenGrid.of(backbone, height=64, width=64, num_frames=9)
    assert captured[0, 0].frames == whole.frames + 1
    given = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    with pytest.raises(ValueError, match="the video has 9 frames, which is 3 frames of tokens, but 4 were denoised"):
        analyze_generation(backbone, "", tracker=standing, options=AnalysisOptions(steps=(0,)), call=given)
    given = {name: value for name, value in given.items() if name not in ("num_frames", "num_inference_steps")}
    with pytest.raises(ValueError, match="the reference has 3 frames of 4 x 4 tokens and the new video 4 of 4 x 4"):
        MotionTransfer(backbone, block=1, steps=2, guided_share=0.6, optimisation_steps=1)(VIDEO, **given)
    assert "as a further frame behind those of the video" in backbone.partly["image"]


@pytest.mark.slow
@pytest.mark.skipif("hunyuanvideo-i2v" not in TINY_MODELS, reason="this diffusers has no such pipeline")
def test_hunyuanvideo_drops_the_frames_of_an_image_beside_the_latents() -> None:
    backbone = tiny_backbone("hunyuanvideo-i2v")
    call = {**tiny_generation("hunyuanvideo-i2v", steps=3)}
    given = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    with pytest.raises(ValueError, match="the video has 5 frames, which is 2 frames of tokens, but 3 were denoised"):
        analyze_generation(backbone, "", tracker=standing, options=AnalysisOptions(steps=(0,)), call=given)
    given = {name: value for name, value in given.items() if name not in ("num_frames", "num_inference_steps")}
    settings = {"block": 1, "steps": 3, "guided_share": 0.6, "optimisation_steps": 3, "learning_rate": 0.05}
    result = MotionTransfer(backbone, **settings)(VIDEO, **given)
    assert len(result.video) == len(VIDEO) - backbone.temporal_compression
    assert result.losses[0, 2] < result.losses[0, 0]
    assert "drops the first latent frame" in HunyuanVideoBackbone.partly["image"]


@pytest.mark.skipif("easyanimate-inpaint" not in TINY_MODELS, reason="this diffusers has no such pipeline")
def test_easyanimate_makes_no_video_of_an_image() -> None:
    call = tiny_generation("easyanimate-inpaint", steps=1)
    call["mask_video"][:, :, 0] = 0
    with pytest.raises(AttributeError, match="cache_mag_vae"):
        tiny_pipeline("easyanimate-inpaint")(**call)
    assert "cache_mag_vae" in EasyAnimateBackbone.limits["image"]
