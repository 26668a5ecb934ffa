"""Captures in other people's LightningModules: found, logged, restored, and nothing else changed."""

from __future__ import annotations

import csv
import os
import pathlib
import subprocess
import sys

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from corrdit import TokenGrid, ops
from corrdit.integrations.diffusers.testing.tiny_models import tiny_backbone, tiny_pipeline
from corrdit.integrations.lightning import CorrespondenceCallback
from corrdit.integrations.lightning.discovery import find_video_model
from corrdit.integrations.lightning.measurement import MatchMeasurement
from corrdit.integrations.lightning.reports import draw_by_layer, draw_matches

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
FIGURES = ["score", "consistency", "motion", "text", "own_frame", "other_frames"]


def trainer(logger=False, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def table(folder: pathlib.Path, name: str) -> list[dict[str, str]]:
    with open(folder / "correspondence" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(folder: pathlib.Path) -> dict[str, float]:
    """The latest of each figure that a CSVLogger wrote."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def processors(transformer: torch.nn.Module) -> list[str]:
    return [type(module.processor).__name__ for module in transformer.modules() if hasattr(module, "processor")]


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_of_a_module_with_a_pipeline_is_read_and_its_output_unchanged(held, tmp_path, stage):
    module = held.GeneratingModule()
    plain = held.GeneratingModule()
    before = processors(module.pipe.transformer)
    logger = CSVLogger(tmp_path, name="run", version=0)
    callback = CorrespondenceCallback(layers=[0, -1], steps=[0, -1])
    getattr(trainer(logger, callbacks=[callback]), stage)(module, held.seeds(2))
    getattr(trainer(), stage)(plain, held.seeds(2))
    assert all(torch.equal(*pair) for pair in zip(module.generated, plain.generated, strict=True))
    assert processors(module.pipe.transformer) == before

    folder = tmp_path / "run" / "version_0"
    rows = table(folder, f"{stage}_000000.csv")
    last = str(len(module.pipe.transformer.transformer_blocks) - 1)
    assert [(row["batch"], row["step"], row["layer"]) for row in rows] == [
        (batch, step, layer) for batch in "01" for step in "02" for layer in ("0", last)
    ]
    assert list(rows[0]) == ["batch", "sample", "step", "timestep", "layer", *FIGURES]
    for row in rows:
        attention = sum(float(row[name]) for name in ("text", "own_frame", "other_frames"))
        assert attention == pytest.approx(1, abs=1e-5)
        assert 0 <= float(row["consistency"]) <= 1
    assert float(rows[0]["timestep"]) > float(rows[2]["timestep"])
    pictures = sorted(path.name for path in (folder / "correspondence").glob("*.png"))
    assert pictures == [
        f"{stage}_consistency_000000.png",
        f"{stage}_matches_0_0_000000.png",
        f"{stage}_matches_1_0_000000.png",
    ]
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        (logged,) = csv.DictReader(file)
    mean = np.mean([float(row["score"]) for row in rows if (row["step"], row["layer"]) == ("2", last)])
    assert float(logged[f"correspondence/{stage}/step_2/layer_{last}/score"]) == pytest.approx(mean, rel=1e-5)


def test_a_pipeline_is_read_at_its_last_step_by_default_and_batches_are_limited(held, tmp_path):
    module = held.GeneratingModule("wan")
    logger = CSVLogger(tmp_path, name="", version="")
    callback = CorrespondenceCallback(layers=[1], batches=1, pictures=0)
    trainer(logger, callbacks=[callback]).validate(module, held.seeds(2))
    (row,) = table(pathlib.Path(logger.log_dir), "validate_000000.csv")
    assert (row["batch"], row["step"], row["layer"]) == ("0", "2", "1")
    assert float(row["text"]) == 0
    assert len(list(pathlib.Path(logger.log_dir).rglob("*.png"))) == 1


def test_a_bare_transformer_is_read_sample_by_sample(held, tmp_path):
    module = held.DenoisingModule()
    batches = held.latent_batches(1)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(logger, callbacks=[CorrespondenceCallback()]).validate(module, batches)
    rows = table(pathlib.Path(logger.log_dir), "validate_000000.csv")
    timesteps = next(iter(batches))["timestep"].tolist()
    assert [(row["sample"], row["layer"], float(row["timestep"])) for row in rows] == [
        (str(sample), str(layer), float(timesteps[sample]))
        for layer in range(len(module.transformer.transformer_blocks))
        for sample in (0, 1)
    ]


def test_tensorboard_gets_figures_a_table_and_pictures(held, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run")
    trainer(logger, callbacks=[CorrespondenceCallback(layers=[0])]).validate(held.GeneratingModule(), held.seeds(1))
    logger.experiment.flush()
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert "correspondence/validate/step_2/layer_0/score" in events.Tags()["scalars"]
    assert sorted(events.Tags()["images"]) == [
        "correspondence/validate/consistency",
        "correspondence/validate/matches_0_0",
    ]
    assert any("correspondence/validate" in tag for tag in events.Tags()["tensors"])


def test_an_operation_of_ones_own_fills_the_table(held, tmp_path):
    def sharpness(q, k, grid, key_mask):
        return {"largest": (q @ k.transpose(-1, -2)).amax((1, 2, 3)), "map": q.new_zeros(len(q), 2, 2)}

    logger = CSVLogger(tmp_path, name="", version="")
    callback = CorrespondenceCallback(layers=[0], operation=sharpness)
    trainer(logger, callbacks=[callback]).test(held.GeneratingModule(), held.seeds(1))
    (row,) = table(pathlib.Path(logger.log_dir), "test_000000.csv")
    assert list(row) == ["batch", "sample", "step", "timestep", "layer", "largest"]


def test_stages_left_out_are_not_read(held, tmp_path):
    callback = CorrespondenceCallback(stages="test")
    trainer(callbacks=[callback], default_root_dir=tmp_path).validate(held.GeneratingModule(), held.seeds(1))
    assert list(tmp_path.iterdir()) == []


class NoModel(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(2, 2)
        self.helper = TokenGrid(2, 2, 2)

    def validation_step(self, batch, batch_idx):
        return None


def test_a_module_without_a_transformer_is_told_what_was_found(held):
    with pytest.raises(ValueError, match=r"NoModel holds no .* found backbone \(Linear\), helper \(TokenGrid\)"):
        trainer(callbacks=[CorrespondenceCallback()]).validate(NoModel(), held.seeds(1))


def test_the_model_is_restored_after_an_error_in_a_batch(held):
    class Breaking(held.GeneratingModule):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise RuntimeError("broken batch")

    module = Breaking()
    before = processors(module.pipe.transformer)
    with pytest.raises(RuntimeError, match="broken batch"):
        trainer(callbacks=[CorrespondenceCallback()]).validate(module, held.seeds(1))
    assert processors(module.pipe.transformer) == before
    assert not module.pipe.transformer._forward_pre_hooks


def test_a_batch_that_never_runs_the_transformer_is_an_error(held):
    class Idle(held.GeneratingModule):
        def validation_step(self, batch, batch_idx):
            return None

    module = Idle()
    with pytest.raises(ValueError, match="never fired"):
        trainer(callbacks=[CorrespondenceCallback()]).validate(module, held.seeds(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [9]}, r"which has layers 0 to \d"),
        ({"attribute": "model.transformer"}, "no attribute 'model.transformer'; it holds pipe"),
        ({"attribute": "family"}, "family is a str"),
        ({"attribute": "pipe.nothing"}, "no attribute 'pipe.nothing'"),
    ],
)
def test_wrong_layers_and_names_are_refused(held, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[CorrespondenceCallback(**options)]).validate(held.GeneratingModule(), held.seeds(1))


def test_unknown_stages_and_results_are_refused(held):
    with pytest.raises(ValueError, match="stages must be some of"):
        CorrespondenceCallback(stages=["fit"])
    with pytest.raises(ValueError, match="stages must be some of"):
        CorrespondenceCallback(stages=[])
    callback = CorrespondenceCallback(layers=[0], operation=lambda q, k, grid, key_mask: q.mean())
    with pytest.raises(ValueError, match="must return a dict of tensors"):
        trainer(callbacks=[callback]).validate(held.GeneratingModule(), held.seeds(1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": True}, "layers must be whole numbers, got True"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "most"}, 'whole numbers or "all"'),
        ({"steps": "last"}, "steps must be whole numbers"),
        ({"batches": 0}, "batches must be a whole number of at least 1"),
        ({"pictures": -1}, "pictures must be a whole number of at least 0"),
        ({"name": "a/b"}, "name must be a word"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        CorrespondenceCallback(**options)


@pytest.mark.parametrize(
    "result, message",
    [
        ({}, "dict of tensors with the batch first"),
        ({"a": torch.zeros(())}, "dict of tensors with the batch first"),
        ({"a": torch.zeros(1), "b": torch.zeros(2)}, "dict of tensors with the batch first"),
        ({"a": torch.zeros(9)}, "dict of tensors with the batch first"),
        ({"layer": torch.zeros(1)}, "layer, a column of the table"),
        ({"match_xy": torch.zeros(1, 3)}, r"match_xy must be \[B, F - 1, h, w, 2\]"),
    ],
)
def test_results_that_make_no_table_are_refused(held, result, message):
    module = held.GeneratingModule()
    callback = CorrespondenceCallback(layers=[0], operation=lambda q, k, grid, key_mask: result)
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[callback]).validate(module, held.seeds(1))
    assert not module.pipe.transformer._forward_pre_hooks


def test_layers_and_steps_may_come_from_generators(held, tmp_path):
    callback = CorrespondenceCallback((layer for layer in (0, 1)), (step for step in (0, -1)), pictures=0)
    for stage in ("validate", "test"):
        run = trainer(callbacks=[callback], default_root_dir=tmp_path)
        getattr(run, stage)(held.GeneratingModule(), held.seeds(2))
        assert len(table(tmp_path, f"{stage}_000000.csv")) == 8


def test_both_transformers_of_wan_2_2_are_read_with_their_own_timesteps(held, tmp_path):
    callback = CorrespondenceCallback(layers=[0], steps=[0, 1, 2], pictures=0)
    module = held.GeneratingModule("wan-2.2")
    trainer(callbacks=[callback], default_root_dir=tmp_path).validate(module, held.seeds(1))
    times = [float(row["timestep"]) for row in table(tmp_path, "validate_000000.csv")]
    assert times == pytest.approx(module.pipe.scheduler.timesteps.tolist())
    assert times[0] > times[1] > times[2]


def test_timesteps_of_each_token_count_once_for_a_sample():
    from corrdit.integrations.diffusers.layouts import ForwardCall
    from corrdit.integrations.lightning.reading import sample_timesteps

    grid = TokenGrid(2, 2, 2)
    for given, expected in (
        (torch.tensor([[0.0, 500.0], [0.0, 300.0]]), [500, 300]),
        (torch.tensor(7), [7, 7]),
        (torch.tensor([7.0]), [7, 7]),
        (9.0, [9, 9]),
    ):
        assert sample_timesteps(ForwardCall(2, grid, given)).tolist() == expected


def test_two_pipelines_of_one_module_each_with_a_callback(held, tmp_path):
    class Two(held.GeneratingModule):
        def __init__(self):
            super().__init__("wan")
            self.draft = tiny_pipeline("ltx")

        def validation_step(self, batch, batch_idx):
            self.generate(batch)
            held.generated(self.draft, "ltx", batch)

    with pytest.raises(ValueError, match=r"several video models: pipe \(WanPipeline\), draft \(LTXPipeline\)"):
        trainer(callbacks=[CorrespondenceCallback()]).validate(Two(), held.seeds(1))
    alike = [CorrespondenceCallback(attribute=name, layers=[0]) for name in ("pipe", "draft")]
    with pytest.raises(ValueError, match="two CorrespondenceCallback log under the name 'correspondence'"):
        trainer(callbacks=alike).validate(Two(), held.seeds(1))
    apart = [CorrespondenceCallback(attribute=name, layers=[0], name=name) for name in ("pipe", "draft")]
    logger = CSVLogger(tmp_path, name="", version="")
    module = Two()
    trainer(logger, callbacks=apart).validate(module, held.seeds(1))
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        columns = set(csv.DictReader(file).fieldnames)
    assert {f"{name}/validate/step_2/layer_0/score" for name in ("pipe", "draft")} <= columns
    for name in ("pipe", "draft"):
        assert (tmp_path / name / "validate_000000.csv").is_file()
        assert not getattr(module, name).transformer._forward_pre_hooks


def test_one_callback_reads_two_trainers_runs_one_after_the_other(held, tmp_path):
    callback = CorrespondenceCallback(layers=[0], pictures=0)
    for name in ("cogvideox-rotary", "ltx"):
        run = trainer(callbacks=[callback], default_root_dir=tmp_path / name)
        run.validate(held.GeneratingModule(name), held.seeds(1))
        assert len(table(tmp_path / name, "validate_000000.csv")) == 1


def test_half_precision_modules_are_read(held, tmp_path):
    module = held.DenoisingModule()
    batches = [{**batch, "latents": batch["latents"].bfloat16()} for batch in held.latent_batches(1)]
    run = trainer(callbacks=[CorrespondenceCallback(layers=[0])], default_root_dir=tmp_path, precision="bf16-true")
    run.validate(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert len(table(tmp_path, "validate_000000.csv")) == 2


def test_pipelines_are_found_in_private_attributes_submodules_and_collections(held):
    first, second = tiny_pipeline("cogvideox"), tiny_pipeline("cogvideox", seed=1)
    module = NoModel()
    module._hidden = first
    assert find_video_model(module) is first
    module = NoModel()
    module.part = torch.nn.Module()
    module.part.pipe = first
    assert find_video_model(module) is first
    module = NoModel()
    module.pipes = {"sharp": first, "fast": [second]}
    assert find_video_model(module) is first
    assert find_video_model(module, "pipes.fast.0") is second
    module.pipes = [first, second]
    with pytest.raises(ValueError, match=r"pipes\.0 \(CogVideoXPipeline\), pipes\.1"):
        find_video_model(module)
    assert find_video_model(module, "pipes.1") is second
    with pytest.raises(ValueError, match=r"no attribute 'pipes\.2'"):
        find_video_model(module, "pipes.2")


def test_the_model_is_found_where_people_keep_it(held):
    pipe, backbone = tiny_pipeline("cogvideox"), tiny_backbone("cogvideox")
    module = NoModel()
    module.deep = torch.nn.Module()
    module.deep.model = pipe.transformer
    assert find_video_model(module) is pipe.transformer
    module.deep.second = backbone.transformer
    with pytest.raises(ValueError, match=r"several video models: deep\.model .*deep\.second"):
        find_video_model(module)
    assert find_video_model(module, "deep.second") is backbone.transformer
    module.transformer = backbone.transformer
    assert find_video_model(module) is backbone.transformer
    module.generator = pipe
    assert find_video_model(module) is pipe
    module.reader = backbone
    with pytest.raises(ValueError, match=r"several video models: generator .*reader"):
        find_video_model(module)
    assert find_video_model(module, "reader") is backbone.pipe


def test_the_measurement_knows_a_perfect_translation():
    # Each token's query and key are a one-hot of its content, which moves one token to the right each frame.
    grid = TokenGrid(3, 4, 6, text_tokens=2)
    content = torch.arange(24).reshape(4, 6)
    frames = [content.roll(shift, 1).flatten() for shift in range(3)]
    vectors = torch.nn.functional.one_hot(torch.stack(frames).flatten(), 24).float() * 12
    q = torch.cat([torch.zeros(2, 24), vectors])[None, None]
    figures = MatchMeasurement(backend="reference")(q, q, grid, None)
    assert figures["consistency"].item() == 1
    xy = figures["match_xy"][0, 1, 2, :4]
    assert xy.tolist() == [[2, 2], [3, 2], [4, 2], [5, 2]]
    assert figures["text"].item() + figures["own_frame"].item() + figures["other_frames"].item() == pytest.approx(1)
    assert figures["other_frames"].item() == pytest.approx(2 * figures["own_frame"].item(), rel=1e-4)
    expected = ops.match(q, q, grid, backend="reference")
    assert torch.equal(figures["match_xy"], expected.xy)
    assert figures["score"].item() == pytest.approx(expected.score.mean().item())
    with pytest.raises(ValueError, match="at least two latent frames"):
        MatchMeasurement()(q[:, :, :26], q[:, :, :26], TokenGrid(1, 4, 6, text_tokens=2), None)


@pytest.mark.slow
def test_two_processes_put_their_rows_together(held, tmp_path):
    script = pathlib.Path(__file__).with_name("validate_process.py")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "two"), "2"],
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    logger = CSVLogger(tmp_path, name="one", version="")
    callback = CorrespondenceCallback(layers=[0, 1], pictures=1)
    trainer(logger, callbacks=[callback]).validate(held.GeneratingModule(), held.seeds(3))
    alone, both = (table(tmp_path / name, "validate_000000.csv") for name in ("one", "two"))
    # Lightning gives each process as many batches as the other, so the first batch comes twice and is counted once.
    assert [row["batch"] for row in both] == ["0", "0", "1", "1", "2", "2"]
    assert [[row[name] for name in FIGURES] for row in both] == [[row[name] for name in FIGURES] for row in alone]
    pictures = [path.name for path in (tmp_path / "two" / "correspondence").glob("validate_matches*_000000.png")]
    assert sorted(pictures) == [f"validate_matches_{batch}_0_000000.png" for batch in (0, 2)]

    logger = CSVLogger(tmp_path, name="one, several", version="")
    loaders = [held.single_latents(5, 2), held.single_latents(1, 2, seed=1)]
    trainer(logger, callbacks=[CorrespondenceCallback(layers=[0, 1])]).validate(held.SeveralLoadersModule(), loaders)
    alone = table(tmp_path / "one, several", "validate_000000.csv")
    both = table(tmp_path / "two", "validate_000000-v1.csv")

    def by_item(rows):
        key = ("dataloader_idx", "timestep", "layer")
        return {tuple(row[name] for name in key): [float(row[name]) for name in FIGURES] for row in rows}

    assert len(both) == len(alone) == 12
    assert by_item(both).keys() == by_item(alone).keys()
    for key, figures in by_item(alone).items():
        assert by_item(both)[key] == pytest.approx(figures, rel=1e-4)
    logged = [metrics(tmp_path / name) for name in ("one, several", "two")]
    for loader in (0, 1):
        name = f"correspondence/validate/step_0/layer_1/motion/dataloader_idx_{loader}"
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-4)


def test_pictures_of_many_layers_show_some_of_them():
    own = np.stack(np.meshgrid(np.arange(3), np.arange(2)), -1).astype(float)
    few, many = ({f"layer {index}": own[None] for index in range(count)} for count in (3, 40))
    assert draw_matches(many, "t", most_rows=3).shape == draw_matches(few, "t").shape


def test_pictures_show_what_they_are_given():
    own = np.stack(np.meshgrid(np.arange(6), np.arange(4)), -1).astype(float)
    still = draw_matches({"layer 0": own[None]}, "still")
    turned = draw_matches({"layer 0": own[None, ::-1, ::-1]}, "still")
    assert still.dtype == np.uint8
    assert still.shape == turned.shape
    assert (still != turned).any()
    low = draw_by_layer({(0, "b"): 0.0, (0, "c"): 1.0}, "t", "a")
    high = draw_by_layer({(0, "b"): 1.0, (0, "c"): 0.0}, "t", "a")
    assert (low != high).any()
    assert draw_by_layer({(0, "b"): float("nan"), (0, "c"): 1.0}, "t", "a").shape == low.shape
