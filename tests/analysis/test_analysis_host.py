"""Analysing given videos and generation with real pipelines, all of them tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from corrdit import ops
from corrdit.analysis.counts import match_counts
from corrdit.analysis.protocols import FEATURE_READINGS, AnalysisOptions
from corrdit.analysis.results import analysis_folder, read_results
from corrdit.analysis.sources import AnalysisItem
from corrdit.geometry import sample_matches
from corrdit.integrations.diffusers import capture
from corrdit.integrations.diffusers.analysis import analyze_generation, analyze_item, analyze_video
from corrdit.integrations.diffusers.analysis.videos import encoded_video, noised, reading_operations
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone, tiny_generation
from corrdit.tracking import Tracks
from corrdit.tracking.pseudo_truth import starting_points

FAMILIES = ["cogvideox", "cogvideox-1.5", "hunyuanvideo", "wan", "ltx", "mochi"]


def standing(video: np.ndarray, queries: np.ndarray) -> Tracks:
    xy = np.repeat(queries[None, :, 1:], len(video), axis=0)
    return Tracks(xy=xy, visible=np.ones(xy.shape[:2], bool), score=np.ones(xy.shape[:2]))


def test_numbers_are_those_of_the_operations_on_what_the_layers_hold(tiny, moving_video):
    """Query-key counts by a capture of the same forward; features by hooks of our own on the projection."""
    options = AnalysisOptions(steps=(30,), layers=(0, 2), max_frames=4)
    table = analyze_video(tiny, *moving_video, options)
    assert (table.steps, table.layers, table.timesteps) == ((30,), (0, 2), (tiny.timestep(30),))
    assert table.thresholds == (4.0, 8.0, 16.0, 32.0, 64.0)
    encoded = encoded_video(tiny, *moving_video, options)
    assert len(encoded.latents) == 4
    latents = noised(tiny, encoded.latents, 30, tiny.timestep(30), options)
    features: dict[str, torch.Tensor] = {}

    def keep(module, inputs, output):
        features.update({"attention output": inputs[0], "projected output": output})

    hook = tiny.transformer.transformer_blocks[2].attn1.to_out[0].register_forward_hook(keep)
    match = {2: lambda q, k, grid, key_mask: ops.match(q, k, grid, heads="none").xy}
    per_head = tiny.forward(latents, tiny.timestep(30), match, early_exit=False)[2]
    hook.remove()
    stride = tiny.token_stride
    settings = {"stride": stride, "thresholds": table.thresholds, "options": options}
    found = sample_matches(per_head[0], encoded.truth.queries, stride)
    counts = match_counts(found, encoded.truth, **settings)
    assert np.array_equal(table.hits[0, 1, 1:3], counts.hits)
    assert table.cases[0, 1, 1] == counts.cases > 0
    assert table.moving_cases[0, 1, 0] == counts.moving_cases
    for name, values in features.items():
        video = torch.nn.functional.normalize(values[0, -4 * 16 :].unflatten(0, (4, 16)), dim=-1)
        best = torch.einsum("pc,fqc->fpq", video[0], video[1:]).argmax(-1)
        grid = tiny.grid(4, 8, 8)
        xy = grid.coordinates()[best].unflatten(1, (4, 4))[None]
        expected = match_counts(sample_matches(xy, encoded.truth.queries, stride), encoded.truth, **settings)
        assert np.array_equal(table.hits[0, 1, table.readings.index(name)], expected.hits[0])
    assert np.array_equal(table.accuracy()[0, 0, -1], table.accuracy()[0, 1, -1])  # standing still


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_analysed_while_it_generates_and_its_video_stays_the_same(family):
    backbone = tiny_backbone(family)
    call = tiny_generation(family, steps=3)
    call = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    came = []
    found = analyze_generation(
        backbone,
        "",
        tracker=standing,
        options=AnalysisOptions(steps=(0, -1), inference_steps=3),
        call=call,
        seed=5,
        on_reading=lambda step, layer, name, reading: came.append((step, layer, name)),
    )
    table = found.table
    assert table.steps == (0, 2)
    assert table.layers == tuple(range(backbone.layers))
    assert sorted(came) == sorted(
        (step, layer, name) for step in (0, 2) for layer in table.layers for name in ("attention", *FEATURE_READINGS)
    )
    assert (table.cases > 0).all()
    weights = sum(table.attention_score(part) for part in ("text", "own", "cross"))
    np.testing.assert_allclose(weights, 1, atol=1e-4)
    plain = backbone.pipe(**call, output_type="np", generator=torch.Generator().manual_seed(5)).frames[0]
    assert np.array_equal(found.video, np.round(np.asarray(plain) * 255).clip(0, 255).astype(np.uint8))


def test_generation_reads_the_conditional_branch():
    """Positions of the mean over heads equal those of a capture of branch "cond" in a second run."""
    backbone = tiny_backbone("cogvideox")
    call = tiny_generation("cogvideox", steps=2)
    call = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    kept = {}

    def on_reading(step, layer, name, reading):
        if name == "attention":
            kept[step, layer] = reading.positions[0]

    options = AnalysisOptions(steps=(-1,), layers=(1,), per_head=False, features=False)
    analyze_generation(backbone, "", tracker=standing, options=options, call=call, on_reading=on_reading)
    match = {}
    for branch in ("cond", "uncond"):
        with capture(backbone.pipe, layers=1, steps=-1, operation=_xy, branch=branch) as read:
            backbone.pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0))
        points = torch.from_numpy(starting_points("scene", 64, 64)[:, 1:])
        match[branch] = sample_matches(read[1, 1], points, backbone.token_stride)[0]
    torch.testing.assert_close(kept[1, 1], match["cond"])
    assert not torch.equal(match["cond"], match["uncond"])


def _xy(q, k, grid, key_mask):
    return ops.match(q, k, grid, key_mask=key_mask).xy


def test_image_to_video_is_analysed():
    backbone = tiny_backbone("cogvideox-image")
    call = tiny_generation("cogvideox-image", steps=2)
    call = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    found = analyze_generation(backbone, "", tracker=standing, options=AnalysisOptions(steps=(-1,)), call=call)
    assert (found.table.cases > 0).all()
    with pytest.raises(ValueError, match="takes no argument 'picture'"):
        analyze_generation(backbone, "", tracker=standing, call={"picture": 1})


def test_compressed_latents_and_clean_ones(tiny, moving_video):
    video, xy, visible = moving_video
    options = AnalysisOptions(steps=(-1,), latents="video", noise="clean", features=False, per_head=False)
    encoded = encoded_video(tiny, video, xy, visible, options)
    assert encoded.truth.frame_map == ((0,), (1, 2, 3, 4))
    assert len(encoded.latents) == 2
    assert noised(tiny, encoded.latents, 3, 500.0, options) is encoded.latents
    table = analyze_video(tiny, video, xy, visible, options)
    assert table.readings == ("query-key mean", "standing still")
    assert table.cases[0, 0, 0] == visible[1:].sum()


@pytest.mark.parametrize("latents", ["frames", "video"])
def test_frames_are_resized_twice_and_the_codecs_posterior_is_sampled(tiny, moving_video, latents):
    """The released two sizes without antialiasing, by hand; a sample keeps to the posterior and to its seed."""
    video, xy, visible = moving_video
    size = {"encoded_size": (32, 48), "resize_first": [24, 24], "antialias": False}
    options = {"latents": latents, "noise": "clean", **size}
    encoded = encoded_video(tiny, video, xy, visible, AnalysisOptions(**options))
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    for sides in ((24, 24), (32, 48)):
        frames = torch.nn.functional.interpolate(frames, sides, mode="bilinear", align_corners=False)
    clips = (frames / 127.5 - 1)[:, :, None] if latents == "frames" else (frames / 127.5 - 1).transpose(0, 1)[None]
    posterior = tiny.pipe.vae.encode(clips).latent_dist
    mean, std = (part.transpose(1, 2).flatten(0, 1) for part in (posterior.mean, posterior.std))
    scale = tiny.pipe.vae_scaling_factor_image
    torch.testing.assert_close(encoded.latents, mean * scale, atol=1e-4, rtol=1e-4)
    assert encoded.scale == (48 / 64, 32 / 64)

    def sampled(seed: int) -> torch.Tensor:
        drawn = AnalysisOptions(**options, posterior="sample", seed=seed)
        return encoded_video(tiny, video, xy, visible, drawn).latents

    noise = (sampled(0) - mean * scale) / (std * scale)
    assert 0.8 < noise.std() < 1.2
    assert noise.mean().abs() < 0.2
    assert torch.equal(sampled(0), sampled(0))
    assert not torch.equal(sampled(0), sampled(1))
    first = noise.unbind()
    assert not any(torch.allclose(first[0], other, atol=0.1) for other in first[1:])


def test_options_of_encoding_are_checked():
    for given, message in (
        ({"posterior": "median"}, "posterior must be one of mode, sample"),
        ({"encoded_size": (32,)}, r"encoded_size must be \(height, width\)"),
        ({"resize_first": (0, 8)}, "height of resize_first"),
        ({"encoded_size": (32, 32), "tokens_per_frame": 9}, "drop tokens_per_frame or encoded_size"),
    ):
        with pytest.raises(ValueError, match=message):
            AnalysisOptions(**given)


def test_latents_are_inverted_to_every_step_in_one_walk(tiny, moving_video, monkeypatch):
    """Each step is read at the inverted latents of that step; two steps cost four predictions, not five."""
    options = AnalysisOptions(steps=(1, 3), inference_steps=5, layers=(0,), noise="inverted", features=False)
    encoded = encoded_video(tiny, *moving_video, options)
    at = dict(tiny.inverted(encoded.latents, [1, 3], 5))
    read, predicted = {}, []
    predict = tiny.predict

    def counted(latents, timestep, *, image=None):
        predicted.append(timestep)
        return predict(latents, timestep, image=image)

    monkeypatch.setattr(tiny, "predict", counted)
    table = analyze_video(
        tiny, *moving_video, options, on_reading=lambda step, layer, name, reading: read.__setitem__(step, reading)
    )
    assert predicted == [tiny.timestep(step, 5) for step in (4, 3, 2, 1)]
    assert table.steps == (1, 3)
    attention, _ = reading_operations(tiny, encoded.truth.queries, options)
    for step in (1, 3):
        direct = tiny.forward(at[step], tiny.timestep(step, 5), {0: attention})[0]
        torch.testing.assert_close(read[step].positions, direct.positions)


def test_an_image_model_is_analysed_beside_its_clean_first_frame(moving_video):
    backbone = tiny_backbone("cogvideox-image")
    options = AnalysisOptions(steps=(0,), inference_steps=5, layers=(0,), features=False)
    encoded = encoded_video(backbone, *moving_video, options)
    read = {}
    analyze_video(backbone, *moving_video, options, on_reading=lambda *found: read.update({found[1]: found[3]}))
    attention, _ = reading_operations(backbone, encoded.truth.queries, options)
    latents = noised(backbone, encoded.latents, 0, backbone.timestep(0, 5), options)
    for image, same in ((encoded.latents[:1], True), (latents[:1], False)):
        direct = backbone.forward(latents, backbone.timestep(0, 5), {0: attention}, image=image)[0]
        assert torch.allclose(read[0].text, direct.text) is same


def test_noise_follows_from_seed_and_step_alone(tiny):
    latents = torch.zeros(2, 4, 8, 8)
    first = noised(tiny, latents, 3, 500.0, AnalysisOptions(seed=1))
    assert torch.equal(first, noised(tiny, latents, 3, 500.0, AnalysisOptions(seed=1)))
    assert not torch.equal(first, noised(tiny, latents, 4, 500.0, AnalysisOptions(seed=1)))
    assert not torch.equal(first, noised(tiny, latents, 3, 500.0, AnalysisOptions(seed=2)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": (7,)}, "layer 7 is outside tiny cogvideox-rotary, which has 3"),
        ({"steps": (50,)}, "step 50 is outside the schedule of 50 steps"),
    ],
)
def test_layers_and_steps_that_are_not_there_are_named(tiny, moving_video, options, message):
    with pytest.raises(ValueError, match=message):
        analyze_video(tiny, *moving_video, AnalysisOptions(**options))


def test_nan_weights_are_named_with_layer_step_and_leave_the_model_as_it_was(moving_video):
    backbone = tiny_backbone("cogvideox-rotary")
    attention = backbone.transformer.transformer_blocks[1].attn1
    processor = attention.processor
    with torch.no_grad():
        attention.to_q.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 49: the queries hold .* NaN"):
        analyze_video(backbone, *moving_video, AnalysisOptions(steps=(-1,)))
    assert attention.processor is processor
    assert not attention.to_out[0]._forward_hooks


def test_a_layer_whose_features_cannot_be_watched_leaves_the_model_as_it_was(moving_video):
    backbone = tiny_backbone("cogvideox-rotary")
    modules = [block.attn1 for block in backbone.transformer.transformer_blocks]
    processors = [module.processor for module in modules]
    del modules[1].to_out
    with pytest.raises(AttributeError, match="proj_out"):
        analyze_video(backbone, *moving_video, AnalysisOptions(steps=(-1,)))
    assert [module.processor for module in modules] == processors
    assert not modules[0].to_out[0]._forward_hooks


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda video, xy, visible: (video[:3], xy, visible), "the video has 3 frames, its tracks have 5"),
        (lambda video, xy, visible: (video, xy[:, :, 0], visible), "tracks must be xy"),
        (lambda video, xy, visible: (video, xy, visible & False), "no point is visible"),
        (lambda video, xy, visible: (video[:1], xy[:1], visible[:1]), "video has one frame"),
        (lambda video, xy, visible: (video.astype(np.float32), xy, visible), "must be uint8"),
    ],
)
def test_broken_videos_are_refused(tiny, moving_video, change, message):
    with pytest.raises(ValueError, match=message):
        analyze_video(tiny, *change(*moving_video), AnalysisOptions(steps=(-1,)))


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_a_video_too_large_for_the_memory_is_counted_and_other_errors_are_not_taken_for_it(tiny, tmp_path, error):
    def fail():
        raise error

    analysis_folder(tmp_path).begin({"model": "tiny"})
    said = analyze_item(tiny, AnalysisItem("large", fail, "exact"), tmp_path, AnalysisOptions(steps=(-1,)))
    assert "not enough memory for it" in said["error"]
    assert read_results(tmp_path).failures == {"large": said["error"]}

    def mistaken():
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        analyze_item(tiny, AnalysisItem("b", mistaken, "exact"), tmp_path, AnalysisOptions(steps=(-1,)))
