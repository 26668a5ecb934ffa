"""Generating prompt by prompt: the comparison, the Lightning modules and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline

from corrdit import MotionTransfer
from corrdit.cli import generate as command
from corrdit.cli import main
from corrdit.integrations.diffusers import backbone_of
from corrdit.integrations.diffusers.backbones.presets import GuidancePreset
from corrdit.integrations.diffusers.backbones.published_models import default_layers
from corrdit.integrations.diffusers.guidance import CrossAttentionGuidance, comparison
from corrdit.integrations.embedded.pipeline import build_pipeline, build_transformer
from corrdit.integrations.lightning import GenerationModule, GuidanceCallback, PromptDataModule
from corrdit.testing import tiny_generation, tiny_pipeline
from corrdit.video import read_video, resize_frame

CALL = {"num_frames": 4, "num_inference_steps": 2}
GUIDANCE = {"layers": (1,), "scale": 3.0}
PROMPTS = ["a red disc moves left", "a blue square stands still", "a green ring circles clockwise"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = build_pipeline(build_transformer(layers=2, heads=2, head_dim=16, frames=4, size=32))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "pipeline"
    pipe.save_pretrained(path)
    return str(path)


def trainer(**options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def test_comparison_has_the_guided_and_the_plain_video_of_one_seed(pipe: Any) -> None:
    alone = comparison.generate(pipe, PROMPTS[0], 5, CALL)
    both = comparison.generate(pipe, PROMPTS[0], 5, CALL, GUIDANCE)
    with CrossAttentionGuidance(pipe, **GUIDANCE):
        guided = comparison.generate(pipe, PROMPTS[0], 5, CALL)
    assert alone.plain is None
    assert both.plain is not None
    np.testing.assert_array_equal(both.plain, alone.video)
    np.testing.assert_array_equal(both.video, guided.video)
    assert (both.video != both.plain).any()
    with pytest.raises(ValueError, match="takes no argument 'frames'; accepted are"):
        comparison.generate(pipe, PROMPTS[0], 5, {"frames": 3})


def test_a_backbone_is_guided_as_its_preset_says(pipe: Any) -> None:
    own = backbone_of(pipe).preset
    backbone = backbone_of(pipe, preset=replace(own, guidance=GuidancePreset((1,), renormalize=False)))
    guided = comparison.generate(backbone, PROMPTS[0], 5, CALL, {"scale": 2.0}).video
    zeroed, masked = (
        comparison.generate(pipe, PROMPTS[0], 5, CALL, {"layers": 1, "scale": 2.0, "renormalize": renormalize}).video
        for renormalize in (False, True)
    )
    np.testing.assert_array_equal(guided, zeroed)
    assert (guided != masked).any()


def panels_of(frames: np.ndarray) -> list[np.ndarray]:
    """The two pictures of 32 x 32, eight times as large, of a video of them side by side."""
    return [frames[:, 40 : 40 + 256, left : left + 256] for left in (16, 16 + 256 + 10)]


def test_default_layers(pipe: Any) -> None:
    backbone = backbone_of(pipe)
    assert default_layers(backbone) == (backbone.preset.reading.layer,)


def test_modules_generate_every_prompt_once_and_resume(pipe: Any, tmp_path: Path) -> None:
    backbone = backbone_of(pipe, name="tiny")
    module = GenerationModule(backbone, output=tmp_path, call=CALL, guidance=GUIDANCE, vbench=True)
    data = PromptDataModule(PROMPTS, samples=2, seed=10, output=tmp_path)
    assert [item["seed"] for item in data.items] == [10, 11, 12, 13, 14, 15]
    results = trainer(limit_predict_batches=2).predict(module, data)
    assert [result["name"] for result in results] == ["0000_0", "0000_1"]
    results = trainer().predict(module, PromptDataModule(PROMPTS, samples=2, seed=10, output=tmp_path))
    assert [result["seed"] for result in results] == [12, 13, 14, 15]
    made = comparison.generate(pipe, PROMPTS[1], 13, CALL, GUIDANCE)
    written = read_video(tmp_path / "0001_1" / "side_by_side.mp4").frames
    for panel, frames in zip(panels_of(written), (made.plain, made.video), strict=True):
        shown = np.stack([resize_frame(frame, 32, 32) for frame in panel])
        assert np.abs(shown.astype(int) - frames).mean() < 12
    assert sorted(path.name for path in (tmp_path / "vbench" / "guided").iterdir()) == sorted(
        f"{prompt}-{sample}.mp4" for prompt in PROMPTS for sample in range(2)
    )
    details = json.loads((tmp_path / "0001_1" / "generation.json").read_text())
    assert (details["prompt"], details["seed"], details["guidance"]["scale"]) == (PROMPTS[1], 13, 3.0)
    assert not list(tmp_path.glob(".part-*"))
    with pytest.raises(ValueError, match="another prompt or seed"):
        trainer().predict(module, PromptDataModule(PROMPTS, samples=2, seed=11, output=tmp_path))
    other = GenerationModule(backbone, output=tmp_path, call=CALL, guidance={"layers": (0,)})
    with pytest.raises(ValueError, match="made with other settings: guidance "):
        trainer().predict(other, PromptDataModule(PROMPTS, samples=2, seed=10, output=tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [({"call": {"steps": 2}}, "takes no argument 'steps'"), ({"guidance": {"layers": (9,)}}, "layer 9 is outside")],
)
def test_bad_settings_stop_before_anything_is_written(
    pipe: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    module = GenerationModule(backbone_of(pipe), output=tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        trainer().predict(module, PromptDataModule(PROMPTS))
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_reads_no_prompt_is_refused() -> None:
    pipe = tiny_pipeline("ltx")
    for call in (
        lambda: comparison.generate(pipe, "a dog", 0, CALL),
        lambda: MotionTransfer(backbone_of(pipe), block=1)(np.zeros((9, 64, 64, 3), np.uint8), "a dog"),
    ):
        with pytest.raises(ValueError, match="LTXPipeline has no text_encoder, so it cannot generate from a prompt"):
            call()


def test_an_image_to_video_model_without_an_image_is_refused() -> None:
    pipe, embeds = LTXImageToVideoPipeline(**tiny_pipeline("ltx").components), {"prompt_embeds": torch.zeros(1)}
    with pytest.raises(ValueError, match="makes a video of an image, and none is given"):
        comparison.generate(pipe, "a dog", 0, embeds)
    comparison.check_generation(pipe, {"image": object(), **embeds})


def test_scales_that_are_none_are_refused(pipe: Any) -> None:
    for value in (float("nan"), float("inf"), "6", 1e300):
        with pytest.raises(ValueError, match="guidance_scale must be"):
            comparison.generate(pipe, "a dog", 0, {"guidance_scale": value})


def test_prompts_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a dog\n\n# a cat\n  ein Igel läuft \n", encoding="utf-8")
    assert PromptDataModule(file).prompts == ["a dog", "ein Igel läuft"]
    file.write_text("a dog\n", encoding="utf-8-sig")
    assert PromptDataModule(file).prompts == ["a dog"]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        PromptDataModule(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        PromptDataModule(file)
    with pytest.raises(ValueError, match="no file of prompts"):
        PromptDataModule(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="at least one text"):
        PromptDataModule(["a dog", " "])


def test_equal_prompts_are_numbered_as_samples_of_one(pipe: Any, tmp_path: Path) -> None:
    data = PromptDataModule(["a dog", "a cat", "a dog"], samples=2, output=tmp_path)
    assert [item["sample"] for item in data.items] == [0, 1, 0, 1, 2, 3]
    assert [item["name"] for item in data.items][-2:] == ["0002_0", "0002_1"]
    module = GenerationModule(backbone_of(pipe), output=tmp_path, call=CALL, vbench=True)
    trainer().predict(module, data)
    assert len(list((tmp_path / "vbench" / "plain").iterdir())) == 6


def test_long_prompts_are_cut_in_vbenchs_layout_and_listed(pipe: Any, tmp_path: Path) -> None:
    """Two long prompts that begin alike keep files of their own, and the list says whose each is."""
    prompts = ["ü" * 120, "ü" * 119 + "/o", "x" * 200]
    module = GenerationModule(backbone_of(pipe), output=tmp_path, call=CALL, vbench=True)
    trainer().predict(module, PromptDataModule(prompts))
    names = {path.name for path in (tmp_path / "vbench" / "plain").iterdir()}
    assert len(names) == 3
    assert all(len(name.encode()) <= 220 for name in names)
    assert f"{prompts[2]}-0.mp4" in names
    listed = json.loads((tmp_path / "vbench" / "prompts.json").read_text(encoding="utf-8"))
    assert set(listed) == names
    assert sorted(listed.values()) == sorted(prompts)
    assert comparison.vbench_name("a/b", 3) == "a-b-3.mp4"


def test_all_prompts_may_have_one_seed() -> None:
    data = PromptDataModule(["a", "b"], samples=2, seed=42, same_seed=True)
    assert [item["seed"] for item in data.items] == [42, 43, 42, 43]
    assert [item["seed"] for item in PromptDataModule(["a", "b"], seed=42).items] == [42, 43]


def test_a_broken_result_is_named(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "0000").mkdir()
    for text in ("{", "[]", '{"prompt": 1}'):
        (tmp_path / "0000" / "generation.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"0000/generation.json is not what a generation writes.*remove the folder"
        ):
            trainer().predict(
                GenerationModule(backbone_of(pipe), output=tmp_path, call=CALL),
                PromptDataModule(["a"], output=tmp_path),
            )


def test_a_callback_guides_the_generation_module_and_its_results_say_so(pipe: Any, tmp_path: Path) -> None:
    def run(callbacks: list[Any], **options: Any) -> None:
        module = GenerationModule(backbone_of(pipe), output=tmp_path / "out", call=CALL, **options)
        trainer(callbacks=callbacks).predict(module, PromptDataModule(PROMPTS[:1], seed=5, output=tmp_path / "out"))

    run([GuidanceCallback(layers=iter([1]), scale=3.0)])
    details = json.loads((tmp_path / "out" / "0000" / "generation.json").read_text())
    assert details["guidance"] is None
    assert (details["guidance_callback"]["layers"], details["guidance_callback"]["scale"]) == ([1], 3.0)
    guided = comparison.generate(pipe, PROMPTS[0], 5, CALL, GUIDANCE).video
    written = read_video(tmp_path / "out" / "0000" / "video.mp4").frames.astype(int)
    assert np.abs(written - guided).mean() < 12
    with pytest.raises(ValueError, match="made with other settings: guidance_callback "):
        run([])
    with pytest.raises(ValueError, match="both have guidance"):
        run([GuidanceCallback(layers=1)], guidance=GUIDANCE)


class SeededModule(lightning.LightningModule):
    """Anyone's module that generates."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.pipe = tiny_pipeline("wan")
        self.fail = fail

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("stop")
        return self.pipe(**tiny_generation("wan", steps=2, seed=int(batch))).frames


def test_callback_guides_each_batch_and_leaves_the_model_as_it_was() -> None:
    module = SeededModule()
    seeds = torch.utils.data.DataLoader([3, 4], batch_size=None)
    plain = trainer().predict(module, seeds)
    guided = trainer(callbacks=[GuidanceCallback(layers=1, scale=2.0)]).predict(module, seeds)
    with CrossAttentionGuidance(module.pipe, 1, scale=2.0):
        expected = module.pipe(**tiny_generation("wan", steps=2, seed=4)).frames
    assert torch.equal(guided[1], expected)
    assert not torch.equal(guided[1], plain[1])
    again = trainer().predict(module, seeds)
    assert all(torch.equal(*pair) for pair in zip(again, plain, strict=True))


def test_callback_guides_the_layers_of_the_backbone_that_a_module_holds() -> None:
    module = SeededModule()
    pipe = module.pipe
    module.pipe = None
    module.backbone = backbone_of(pipe, name="held")
    module.predict_step = lambda batch, batch_idx: pipe(**tiny_generation("wan", steps=2, seed=int(batch))).frames
    seeds = torch.utils.data.DataLoader([4], batch_size=None)
    (guided,) = trainer(callbacks=[GuidanceCallback(scale=2.0)]).predict(module, seeds)
    with CrossAttentionGuidance(module.backbone, scale=2.0):
        expected = pipe(**tiny_generation("wan", steps=2, seed=4)).frames
    assert torch.equal(guided, expected)
    assert not torch.equal(guided, module.predict_step(torch.tensor(4), 0))


def test_callback_restores_after_an_exception_and_refuses_modules_without_a_pipeline() -> None:
    module = SeededModule(fail=True)
    seeds = torch.utils.data.DataLoader([3], batch_size=None)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[GuidanceCallback(layers=1)]).predict(module, seeds)
    assert not module.pipe.transformer._forward_hooks
    with pytest.raises(ValueError, match="layer 5 is outside"):
        trainer(callbacks=[GuidanceCallback(layers=5)]).predict(module, seeds)
    module.pipe = None
    with pytest.raises(ValueError, match="holds no diffusers video pipeline"):
        trainer(callbacks=[GuidanceCallback(layers=1)]).predict(module, seeds)


def test_command_for_one_prompt(folder: str, pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", folder, "--num-frames", "4", "--steps", "2", "--seed", "5"]
    guided = ["--cag", "--cag-layers", "1", "--cag-scale", "3", "--cag-variant", "zeroed", "--cag-heads", "1"]
    guided += ["--cag-adaptive-scale", "0.001"]
    out = tmp_path / "out"
    assert main(["generate", PROMPTS[0], "--output", str(out), *options, *guided]) == 0
    printed = capsys.readouterr().out
    assert "4 frames of 32 x 32" in printed
    assert "guided in layers 1" in printed
    names = ["video.mp4", "plain.mp4", "side_by_side.mp4", "sheet.png", "generation.json"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert all(str(out / name) in printed for name in names)
    expected = comparison.generate(
        pipe, PROMPTS[0], 5, CALL, {**GUIDANCE, "renormalize": False, "heads": 1, "adaptive_scale": 0.001}
    )
    details = json.loads((out / "generation.json").read_text())
    assert details["guidance"]["renormalize"] is False
    assert (details["guidance"]["heads"], details["guidance"]["adaptive_scale"]) == ([1], 0.001)
    for name, frames in (("video.mp4", expected.video), ("plain.mp4", expected.plain)):
        assert np.abs(read_video(out / name).frames.astype(int) - frames).mean() < 12
    assert main(["generate", PROMPTS[0], "--output", str(tmp_path / "plain"), *options]) == 0
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["generation.json", "sheet.png", "video.mp4"]
    assert main(["generate", "another", "--output", str(tmp_path / "plain"), *options]) == 2
    assert "holds results made with other settings: prompt" in capsys.readouterr().err


def test_command_for_a_file_of_prompts(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[:2]))
    out = tmp_path / "out"
    arguments = ["generate", "--prompts", str(prompts), "--output", str(out), "--model", folder, "--device", "cpu"]
    arguments += ["--pipeline", '{"num_frames": 4, "num_inference_steps": 2}', "--cag"]
    assert main(arguments) == 0
    assert "2 of 2 videos generated" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["0000", "0001", "settings.json"]
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert "0 of 2 videos generated" in again.out
    assert not again.err, "nothing of Lightning's about an empty loader"
    assert main(["generate", "a disc", "--output", str(out), "--model", folder]) == 2
    assert "holds the videos of a run with --prompts" in capsys.readouterr().err
    (out / "settings.json").rename(out / "generation.json")
    assert main(arguments) == 2
    assert "holds the video of a single PROMPT" in capsys.readouterr().err


@pytest.mark.slow
def test_command_over_two_processes_makes_each_video_once(folder: str, tmp_path: Path) -> None:
    """The installed command on two processes writes what one process writes, and counts every video once."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["generate", "--prompts", str(prompts), "--model", folder, "--device", "cpu"]
    arguments += ["--pipeline", '{"num_frames": 4, "num_inference_steps": 2}']
    executable = Path(sysconfig.get_path("scripts")) / "corrdit"
    done = subprocess.run(
        [str(executable), *arguments, "--devices", "2", "--output", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("3 of 3 videos generated") == 1
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    for name in ("0000", "0001", "0002"):
        one, two = (read_video(tmp_path / run / name / "video.mp4").frames for run in ("one", "two"))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "neither was given"),
        (["a dog", "--prompts", "x.txt"], "both were given"),
        ([" "], "PROMPT is empty"),
        (["a dog", "--samples", "2"], "go with --prompts"),
        (["a dog", "--cag", "--cag-layers", "1;2"], "--cag-layers 1;2 is not a list"),
        (["a dog", "--cag", "--cag-layers", "1", "--cag-scale", "-1"], "scale must be a finite number"),
        (["a dog", "--cag", "--cag-layers", "7"], "layer 7 is outside"),
        (["a dog", "--cag", "--cag-heads", "2"], "must be different numbers from 0 to 1, got [2]"),
        (["a dog", "--cag", "--cag-heads", "x"], "--cag-heads x is not a list of heads"),
        (["a dog", "--cag", "--cag-adaptive-scale", "-1"], "adaptive_scale must be a finite number"),
        (["a dog", "--cag-adaptive-scale", "1"], "--cag-adaptive-scale goes with --cag"),
        (["a dog", "--pipeline", '{"length": 3}'], "takes no argument 'length'"),
        (["--prompts", "nothing.txt"], "no file of prompts"),
        (["a dog", "--cag-scale", "2"], "--cag-scale goes with --cag"),
        (["a dog", "--cag-layers", "1", "--cag-span", "1"], "--cag-layers, --cag-span go with --cag"),
        (["a dog", "--steps", "0"], "num_inference_steps must be a whole number of at least 1, got 0"),
        (["a dog", "--num-frames", "0"], "num_frames must be a whole number of at least 1, got 0"),
        (["a dog", "--size", "0x32"], "height must be a whole number of at least 1, got 0"),
        (["a dog", "--pipeline", '{"generator": 1}'], "generator is set for every video"),
        (["a dog", "--pipeline", '{"num_videos_per_prompt": 2}'], "num_videos_per_prompt is set for every video"),
        (
            ["--prompts", "prompts.txt", "--processes", "0"],
            "--processes 0 was given; accepted is a number of 1 or more",
        ),
        (["--prompts", "prompts.txt", "--fps", "0"], "fps=0.0 was given"),
    ],
)
def test_command_refuses_bad_input_in_one_line(
    folder: str,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a dog")
    status = main(["generate", *arguments, "--model", folder, "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_command_says_what_it_writes() -> None:
    assert "side_by_side.mp4" in (command.__doc__ or "")
