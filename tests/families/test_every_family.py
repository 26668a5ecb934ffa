"""What a user does with a model, on a tiny random one of every family, loaded from the folder it was saved to."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from corrdit import MotionTransfer, PointTracker, load_backbone
from corrdit.analysis.protocols import AnalysisOptions
from corrdit.integrations.diffusers import Backbone
from corrdit.integrations.diffusers.analysis import analyze_generation, analyze_video
from corrdit.integrations.diffusers.backbones.coverage import USES
from corrdit.integrations.diffusers.backbones.table import BACKBONES
from corrdit.integrations.diffusers.layouts import forward_arguments
from corrdit.integrations.diffusers.motion_transfer.embeddings import positional_tables
from corrdit.integrations.diffusers.testing.subject import Subject
from corrdit.testing import TINY_MODELS, tiny_backbone, tiny_generation
from corrdit.tracking import Tracks

FIRST = ("cogvideox", "hunyuanvideo", "ltx", "mochi", "wan")
"""Families whose transfer and analysis other tests look at closely."""
IMAGES = ("hunyuanvideo-i2v-replace", "ltx-image")
"""Their models that are given an image in ways of their own."""
LATER = [name for name in TINY_MODELS if name.partition("-")[0] not in FIRST or name in IMAGES]
NAMES = [pytest.param(name, marks=pytest.mark.slow) if TINY_MODELS[name].variant else name for name in LATER]
SHAPED = ("num_inference_steps", "num_frames")
"""Arguments of a call that a transfer gives."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no text encoder"),
    pytest.mark.filterwarnings("ignore:.*of one colour"),
]


@dataclass
class Case:
    """A backbone, a video it takes, and the arguments of a call of its pipeline that makes one like it."""

    name: str
    backbone: Backbone
    video: np.ndarray
    call: dict[str, Any]


def _case(name: str, backbone: Backbone) -> Case:
    model, call = TINY_MODELS[name], tiny_generation(name, steps=2)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (model.height // 8, model.height // 8, 3), dtype=np.uint8)
    picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
    video = np.stack([np.roll(picture, 5 * frame, axis=1) for frame in range(model.frames)])
    return Case(name, backbone, video, {key: call[key] for key in call if key not in ("generator", "output_type")})


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One loaded model for all tests of its family."""
    from corrdit.integrations.diffusers.testing.tiny_cosmos import NoSafetyChecker
    from corrdit.testing import tiny_pipeline

    pipe = tiny_pipeline(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    pipe.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if request.param.startswith("cosmos"):
            patch.setattr(f"{type(pipe).__module__}.CosmosSafetyChecker", NoSafetyChecker)
        warnings.simplefilter("ignore")
        if request.param.startswith("consisid") and importlib.util.find_spec("cv2") is None:
            with pytest.raises(ValueError, match=r"is a ConsisIDPipeline, for which a package is missing: .*OpenCV"):
                load_backbone(folder)
            backbone = tiny_backbone(request.param)
        else:
            backbone = load_backbone(folder)
        if hasattr(pipe, "tokenizer_2_max_length"):
            for length in ("tokenizer_max_length", "tokenizer_2_max_length", "vision_num_semantic_tokens"):
                setattr(backbone.pipe, length, getattr(pipe, length))
        yield _case(request.param, backbone)


def standing(video: np.ndarray, queries: np.ndarray) -> Tracks:
    xy = np.repeat(queries[None, :, 1:], len(video), axis=0)
    return Tracks(xy=xy, visible=np.ones(xy.shape[:2], bool), score=np.ones(xy.shape[:2]))


def test_points_are_tracked(family: Case) -> None:
    tracks = PointTracker(family.backbone).track(family.video[:6], "grid:2")
    assert tracks.xy.shape == (6, 4, 2)
    assert np.isfinite(tracks.xy).all()


def test_given_videos_are_analysed(family: Case) -> None:
    options = AnalysisOptions(steps=(30,), layers=(0, -1), max_frames=4)
    xy = np.repeat(np.array([[[20.0, 20.0], [40.0, 30.0]]], np.float32), len(family.video), axis=0)
    table = analyze_video(family.backbone, family.video, xy, np.ones(xy.shape[:2], bool), options)
    assert (table.cases > 0).all()


def test_generation_is_analysed(family: Case) -> None:
    options = AnalysisOptions(steps=(0, -1))
    if (reason := family.backbone.limits.get("analysis")) is not None:
        with pytest.raises(ValueError, match=f"cannot be used for analysis: {reason}"):
            analyze_generation(family.backbone, "", tracker=standing, options=options, call=family.call)
        return
    found = analyze_generation(family.backbone, "", tracker=standing, options=options, call=family.call)
    assert (found.table.cases > 0).all()
    assert found.video.shape == family.video.shape


@pytest.mark.parametrize("optimise", ["latent", pytest.param("embedding", marks=pytest.mark.slow)])
def test_motion_is_transferred(family: Case, optimise: str) -> None:
    arguments = {name: value for name, value in family.call.items() if name not in SHAPED and value is not None}
    settings = {"block": 1, "steps": 3, "guided_share": 0.6, "optimisation_steps": 3, "learning_rate": 0.05}

    def transferred() -> Any:
        return MotionTransfer(family.backbone, optimise=optimise, **settings)(family.video, **arguments)

    refusal = REFUSED_TRANSFERS.get(family.name, REFUSED_TRANSFERS.get((family.name, optimise)))
    if refusal is not None:
        with pytest.raises(ValueError, match=refusal):
            transferred()
        return
    result = transferred()
    assert result.video.shape == family.video.shape
    assert result.losses[0, 2] < result.losses[0, 0]
    assert result.losses[1, 2] < result.losses[0, 0]


REFUSED_TRANSFERS: dict[Any, str] = {
    "cosmos3": "cannot be used for transfer: its transformer is given its latents in a list",
    "wananimate": "cannot be used for transfer: its pipeline denoises a character",
    "cosmos": "cannot be used for transfer: the pipeline of Cosmos 1 takes two steps",
    "cosmos-image": "cannot be used for transfer: the pipeline of Cosmos 1 takes two steps",
    ("hunyuanvideo-i2v-replace", "latent"): "scales the latents before the transformer sees them",
    ("ltx-image", "latent"): "scales the latents before the transformer sees them",
    ("cosmos-2", "latent"): "scales the latents before the transformer sees them",
}


@torch.no_grad()
def test_the_models_own_positions_change_nothing(family: Case) -> None:
    if TINY_MODELS[family.name].packed:
        pytest.skip("motion transfer, which moves positions, is not open to it")
    subject = Subject.random(family.backbone, frames=3, batch=1, seed=0)
    arguments = subject.arguments()
    given = forward_arguments(subject.transformer, (), arguments)
    grid = family.backbone.layout().read_call(subject.transformer, given).grid
    tables = positional_tables(family.backbone, subject.transformer, arguments, grid)
    expected = subject.prediction()
    with tables.applied(subject.transformer, tables.original):
        torch.testing.assert_close(subject.prediction(), expected, rtol=1e-4, atol=1e-5)
    moved = {key: table + torch.linspace(-1, 1, table.shape[-1]) for key, table in tables.original.items()}
    with tables.applied(subject.transformer, moved):
        assert (subject.prediction() - expected).abs().max() > 1e-3


def test_decoding_undoes_the_encoding(family: Case) -> None:
    """Latents go back to the codec as they came from it."""
    backbone, video = family.backbone, family.video[: family.backbone.fitting_frames(len(family.video))]
    clip = (torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(backbone.dtype)
    with torch.no_grad():
        codec = backbone.pipe.vae.decode(
            backbone.posterior(clip).mode(), **backbone.decoder_arguments, return_dict=False
        )[0][0].transpose(0, 1)
    decoded = backbone.decode(backbone.encode_video(video))
    torch.testing.assert_close(decoded, codec, rtol=1e-3, atol=1e-3)


def test_every_limit_is_of_a_use_that_is_known() -> None:
    for backbone in BACKBONES:
        assert {*backbone.limits, *backbone.partly} <= set(USES)
