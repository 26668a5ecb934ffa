"""Motion transfer through unmodified tiny pipelines of every family."""

import numpy as np
import pytest
import torch

from corrdit.integrations.diffusers.layouts import forward_arguments, layout_of
from corrdit.integrations.diffusers.motion_transfer import MotionTransfer, step_reference
from corrdit.integrations.diffusers.motion_transfer.embeddings import positional_tables
from corrdit.integrations.diffusers.motion_transfer.latents import codec_latents
from corrdit.integrations.diffusers.testing.subject import Subject

FAMILIES = ("cogvideox", "cogvideox-rotary", "cogvideox-1.5", "hunyuanvideo", "wan", "ltx", "mochi")
SETTINGS = {"steps": 3, "guided_share": 0.6, "optimisation_steps": 3, "learning_rate": 0.05}


def state_of(pipe):
    transformer = pipe.transformer
    modules = layout_of(transformer).attention_modules(transformer)
    return {
        "scheduler": pipe.scheduler,
        "processors": [module.processor for module in modules],
        "forward": transformer.__dict__.get("forward"),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules()],
        "trained": [weight.requires_grad for weight in transformer.parameters()],
        "weights": float(sum(weight.detach().double().sum() for weight in transformer.parameters())),
        "checkpointing": getattr(transformer, "gradient_checkpointing", None),
    }


@pytest.mark.parametrize("optimise", ["latent", "embedding"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_falls_and_the_model_is_left_as_it_was(case, name, optimise):
    backbone, video, arguments = case(name)
    before = state_of(backbone.pipe)
    result = MotionTransfer(backbone, block=1, optimise=optimise, **SETTINGS)(video, **arguments)
    assert state_of(backbone.pipe) == before
    assert result.video.dtype == np.uint8
    assert result.video.shape == video.shape
    assert result.losses.shape == (2, 3)
    assert np.isfinite(result.losses).all()
    assert result.losses[0, 2] < result.losses[0, 0]
    assert result.losses[1, 2] < result.losses[0, 0]
    grid = backbone.grid(len(backbone.latent_frame_map(len(video))), *_latent_size(backbone, video))
    assert result.flow.shape == (grid.frames, grid.frames, grid.height, grid.width, 2)
    plain = MotionTransfer(backbone, method="backbone", steps=3)(video, **arguments)
    assert plain.losses.size == 0
    assert (plain.video != result.video).any()


def _latent_size(backbone, video):
    return video.shape[1] // backbone.spatial_compression, video.shape[2] // backbone.spatial_compression


@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_a_plain_run_is_the_pipelines_own(case, name):
    backbone, video, arguments = case(name)
    mine = MotionTransfer(backbone, method="backbone", steps=2)(video, seed=7, **arguments)
    own = backbone.pipe(
        num_inference_steps=2,
        num_frames=len(video),
        output_type="np",
        generator=torch.Generator().manual_seed(7),
        **arguments,
    ).frames[0]
    np.testing.assert_array_equal(mine.video, (own * 255).round().astype(np.uint8))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_models_own_tables_change_nothing(case, name):
    backbone, _, _ = case(name)
    subject = Subject.random(backbone, frames=3, batch=1, seed=0)
    arguments = subject.arguments()
    layout = backbone.layout()
    grid = layout.read_call(subject.transformer, forward_arguments(subject.transformer, (), arguments)).grid
    tables = positional_tables(backbone, subject.transformer, arguments, grid)
    expected = subject.prediction()
    with tables.applied(subject.transformer, tables.original):
        torch.testing.assert_close(subject.prediction(), expected, rtol=1e-4, atol=1e-5)
    moved = {key: table + torch.linspace(-1, 1, table.shape[-1]) for key, table in tables.original.items()}
    with tables.applied(subject.transformer, moved):
        assert (subject.prediction() - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["cogvideox-rotary", "wan"])
def test_queries_and_keys_have_tables_of_their_own(case, name):
    backbone, video, arguments = case(name)
    result = MotionTransfer(backbone, block=1, optimise="embedding", **SETTINGS)(video, **arguments)
    tables = result.optimised.tensors[1]
    assert set(tables) == {"query_cos", "query_sin", "key_cos", "key_sin"}
    assert not torch.equal(tables["query_cos"], tables["key_cos"])


def test_the_absolute_table_has_no_text_rows(case):
    backbone, video, arguments = case("cogvideox")
    result = MotionTransfer(backbone, block=1, optimise="embedding", **SETTINGS)(video, **arguments)
    width = backbone.transformer.config.num_attention_heads * backbone.transformer.config.attention_head_dim
    assert result.optimised.tensors[0]["table"].shape == (1, 3 * 16, width)


def test_an_image_model_keeps_its_condition(case):
    backbone, video, arguments = case("cogvideox-image")
    result = MotionTransfer(backbone, block=1, **SETTINGS)(video, **arguments)
    assert result.losses[1, 2] < result.losses[0, 0]
    assert result.optimised.tensors[0]["latent"].shape == (1, 3, backbone.latent_channels, 8, 8)


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cogvideox-rotary", "hunyuanvideo"))]
)
def test_injection_into_compiled_blocks(case, name):
    options = {"method": "injection", "injection_blocks": (0, 1, 2), "steps": 12, "guided_share": 1.0}
    backbone, video, arguments = case(name)
    expected = MotionTransfer(backbone, **options)(video, **arguments)
    torch._dynamo.reset()
    for module_list in backbone.layout().block_lists(backbone.transformer):
        for block in getattr(backbone.transformer, module_list):
            block.compile(backend="eager", fullgraph=True)
    compiled = MotionTransfer(backbone, **options)(video, **arguments)
    torch._dynamo.reset()
    np.testing.assert_array_equal(compiled.video, expected.video)
    plain = MotionTransfer(case(name)[0], method="backbone", steps=12)(video, **arguments)
    assert (compiled.video != plain.video).any()


@pytest.mark.parametrize("name", ["cogvideox-rotary", "wan", "hunyuanvideo"])
def test_the_injected_reference_has_the_runs_own_noise(case, name, monkeypatch):
    backbone, video, arguments = case(name)
    given, timesteps = [], []
    own, add_noise = step_reference.attention_parts_of, backbone.add_noise

    def spied(transformer, layout, call, grid, layers, parts):
        given.append(call["hidden_states"].clone())
        return own(transformer, layout, call, grid, layers, parts)

    def timed(latents, noise, timestep):
        timesteps.append(timestep)
        return add_noise(latents, noise, timestep)

    monkeypatch.setattr(step_reference, "attention_parts_of", spied)
    monkeypatch.setattr(backbone, "add_noise", timed)
    transfer = MotionTransfer(backbone, method="injection", injection_blocks=(0,), **SETTINGS)
    transfer(video, seed=5, **arguments)
    clean = backbone.call_arguments(codec_latents(backbone, transfer.reference_motion(video).latents), 0.0, {})
    noise = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(5))
    assert len(given) == len(timesteps) == 2
    for hidden, timestep in zip(given, timesteps, strict=True):
        torch.testing.assert_close(hidden, add_noise(clean["hidden_states"], noise, timestep))


@pytest.mark.parametrize("method", ["ditflow", "injection"])
def test_no_step_is_guided_behind_the_share(case, method):
    backbone, video, arguments = case("cogvideox", guided=False)
    forwards, after = [], []
    backbone.transformer.register_forward_pre_hook(lambda module, args: forwards.append(1))
    options = {"block": 1, "injection_blocks": (0,), "optimisation_steps": 1}
    transfer = MotionTransfer(backbone, method=method, steps=4, guided_share=0.5, **options)
    transfer(video, report=lambda done, steps, losses: after.append(len(forwards)), **arguments)
    _, *by_step = np.diff([0, *after]).tolist()
    assert by_step == [3 if method == "ditflow" else 2, 1, 1]


@pytest.mark.parametrize(
    "name", ["cogvideox", "cogvideox-rotary", "cogvideox-image", "hunyuanvideo", "wan", "wan-image", "ltx", "mochi"]
)
def test_every_family_can_be_planned(name, case):
    from corrdit.integrations.diffusers.motion_transfer.plan import transfer_plan

    backbone, video, _ = case(name)
    settings = MotionTransfer(backbone, block=1).settings
    plan = transfer_plan(backbone, settings, video.shape[:3], optimises=True, reads=True)
    grid = backbone.encode_video(video)
    rows, columns = (side // stride for side, stride in zip(video.shape[1:3], backbone.token_stride, strict=True))
    assert plan.tokens == len(grid) * rows * columns
    assert 0 < plan.seconds < 3600
