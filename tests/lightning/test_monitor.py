"""Matching accuracy while a module trains: right figures, and a training that does not notice."""

from __future__ import annotations

import csv
import pathlib

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from corrdit.integrations.diffusers.testing.tiny_models import tiny_pipeline
from corrdit.integrations.lightning import CorrespondenceCallback, CorrespondenceMonitor, WorldProbe
from corrdit.integrations.lightning.monitor import BatchTruth, latent_frames
from corrdit.metrics.matching import MatchingHits, matching_hits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*has no text encoder"),
]


def trainer(logger=False, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=logger,
        max_epochs=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def logged(folder: str | pathlib.Path) -> list[dict[str, str]]:
    with open(pathlib.Path(folder) / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.parameters()])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("probe", [None, WorldProbe(clips=1, frames=3, height=32, width=32, points=4)])
def test_training_goes_as_without_the_monitor(held, tmp_path, checkpointed, probe):
    runs = []
    for callbacks in ([], [CorrespondenceMonitor(every=2, probe=probe, pipeline=lambda module: module.pipe)]):
        module = held.DenoisingModule()
        pipe = tiny_pipeline("cogvideox")
        pipe.transformer = module.transformer
        module.pipe = pipe
        if checkpointed:
            module.transformer.enable_gradient_checkpointing()
        torch.manual_seed(0)
        trainer(callbacks=callbacks, default_root_dir=tmp_path).fit(module, held.latent_batches(5))
        runs.append((module.losses, weights(module), torch.rand(1)))
        assert module.transformer.training
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][2], runs[1][2])


def test_accuracy_is_that_of_the_matches_by_layer_and_noise_level(held, tmp_path):
    module = held.DenoisingModule()
    batches = held.latent_batches(4, seed=3)
    logger = CSVLogger(tmp_path, name="", version="")
    monitor = CorrespondenceMonitor(every=1, noise_levels=2, least_motion=0.5, threshold=1.5)
    fit = trainer(logger, callbacks=[monitor])
    fit.fit(module, batches)
    rows = logged(logger.log_dir)
    assert len(rows) == 4
    columns = [name for name in rows[0] if name.endswith("accuracy")]
    assert sorted(columns) == [
        f"correspondence/train/layer_{layer}/noise_{level}/accuracy"
        for layer in range(len(module.transformer.transformer_blocks))
        for level in ("0-500", "500-1000")
    ]
    for row, batch in zip(rows, batches, strict=True):
        for level, chosen in (("0-500", batch["timestep"] < 500), ("500-1000", batch["timestep"] >= 500)):
            shown = row[f"correspondence/train/layer_0/noise_{level}/score"]
            assert (shown != "") == bool(chosen.any())
    first = next(iter(batches))
    expected = {}
    from corrdit import capture, ops

    fresh = held.DenoisingModule()
    operation = lambda q, k, grid, key_mask: ops.match(q, k, grid).xy  # noqa: E731
    with torch.no_grad(), capture(fresh.transformer, layers=range(len(columns) // 2), operation=operation) as captured:
        fresh.loss(first)
    for (_, layer), match_xy in captured.items():
        for sample, xy in enumerate(match_xy):
            tracks, visible = first["tracks"][sample], first["visible"][sample]
            hits = matching_hits(xy, tracks, visible, source=0, stride=4, thresholds=(1.5,), least_motion=0.5)
            level = "0-500" if first["timestep"][sample] < 500 else "500-1000"
            expected[layer, level] = expected.get((layer, level), MatchingHits((0,), 0)) + hits
    for (layer, level), hits in expected.items():
        found = float(rows[0][f"correspondence/train/layer_{layer}/noise_{level}/accuracy"])
        assert found == pytest.approx(hits.accuracy[0], rel=1e-5)
    folder = pathlib.Path(logger.log_dir) / "correspondence"
    assert sorted(path.name for path in folder.iterdir()) == [
        "train_000004.csv",
        "train_accuracy_000004.png",
    ]


def test_monitor_and_callback_share_a_run(held, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [CorrespondenceMonitor(layers=[0], every=1), CorrespondenceCallback(layers=[0], pictures=0)]
    fit = trainer(logger, callbacks=callbacks, num_sanity_val_steps=1)
    module = held.DenoisingModule()
    fit.fit(module, held.latent_batches(2), held.latent_batches(1))
    names = sorted(path.name for path in (pathlib.Path(logger.log_dir) / "correspondence").iterdir())
    assert names == [
        "train_000002.csv",
        "train_accuracy_000002.png",
        "validate_000002.csv",
        "validate_consistency_000002.png",
    ]
    assert not module.transformer._forward_pre_hooks


def test_measurements_come_every_so_many_steps_also_with_accumulated_gradients(held, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit = trainer(logger, callbacks=[CorrespondenceMonitor(layers=[0], every=2)], accumulate_grad_batches=2)
    fit.fit(held.DenoisingModule(), held.latent_batches(8))
    assert len(logged(logger.log_dir)) == 2


def test_a_probe_measures_generated_videos_at_its_own_noise_levels(held, tmp_path):
    module = held.DenoisingModule()
    pipe = tiny_pipeline("cogvideox")
    pipe.transformer = module.transformer
    logger = CSVLogger(tmp_path, name="", version="")
    probe = WorldProbe(clips=2, frames=3, height=64, width=64, timesteps=(50, 900), points=8, least_motion=0.1)
    monitor = CorrespondenceMonitor(layers=[1], every=2, probe=probe, pipeline=lambda held_module: pipe)
    trainer(logger, callbacks=[monitor]).fit(module, held.latent_batches(2))
    (row,) = logged(logger.log_dir)
    figures = {name: float(value) for name, value in row.items() if name.endswith("accuracy")}
    assert sorted(figures) == [f"correspondence/train/layer_1/noise_{level}/accuracy" for level in (50, 900)]
    assert all(0 <= value <= 1 for value in figures.values())


def test_a_probe_finds_what_a_model_that_sees_positions_would():
    class Perfect:
        """A backbone whose attention matches each token by the true motion of the probe's own video."""

        transformer = torch.nn.Linear(1, 1)

        def __init__(self, probe):
            self.clips, _ = probe._videos()

        def encode_frames(self, video, *, height, width):
            self.clip = next(clip for clip in self.clips if clip.video is video or np.array_equal(clip.video, video))
            return torch.zeros(len(video), 1, height, width)

        def add_noise(self, latents, noise, timestep):
            return latents

        def forward(self, latents, timestep, operations):
            rows, columns = 16, 16
            y, x = np.meshgrid(np.arange(rows) * 2 + 1.0, np.arange(columns) * 2 + 1.0, indexing="ij")
            starts = np.stack((np.zeros_like(x), x, y), -1).reshape(-1, 3)
            truth = torch.as_tensor(self.clip.tracks(starts).xy[1:]) / 2 - 0.5
            return {layer: truth.unflatten(1, (rows, columns))[None] for layer in operations}

    probe = WorldProbe(clips=6, frames=4, least_motion=0.5, points=16, timesteps=(100,))
    (hits,) = probe.measure(Perfect(probe), [0]).values()
    assert hits.cases > 100
    assert hits.accuracy[0] > 0.95


def test_layers_that_a_probed_model_has_not_are_refused_before_it_trains(held):
    module = held.DenoisingModule()
    module.pipe = tiny_pipeline("cogvideox")
    probe = WorldProbe(clips=1, frames=3, height=32, width=32, points=4)
    with pytest.raises(ValueError, match="layer 9 is outside the model"):
        trainer(callbacks=[CorrespondenceMonitor(layers=[9], every=1, probe=probe)]).fit(module, held.latent_batches(1))
    assert module.losses == []


def test_truth_can_be_switched_off_or_given_by_a_function(held, tmp_path):
    without = CSVLogger(tmp_path, name="without", version="")
    trainer(without, callbacks=[CorrespondenceMonitor(every=1, truth=False)]).fit(
        held.DenoisingModule(), held.latent_batches(1)
    )
    assert {name.split("/")[-1] for name in logged(without.log_dir)[0]} - {"epoch", "step"} == {"score", "consistency"}

    def truth(batch):
        return BatchTruth(batch["tracks"], batch["visible"], 16, 16)

    given = CSVLogger(tmp_path, name="given", version="")
    trainer(given, callbacks=[CorrespondenceMonitor(every=1, truth=truth)]).fit(
        held.DenoisingModule(), held.latent_batches(1)
    )
    assert any(name.endswith("accuracy") for name in logged(given.log_dir)[0])


def test_a_batch_without_truth_and_a_module_without_a_model_are_refused(held):
    batches = [{key: value for key, value in batch.items() if key != "tracks"} for batch in held.latent_batches(1)]
    module = held.DenoisingModule()
    with pytest.raises(ValueError, match=r"needs the truth: .* the batch holds latents, timestep, visible, video"):
        trainer(callbacks=[CorrespondenceMonitor(every=1)]).fit(
            module, torch.utils.data.DataLoader(batches, batch_size=None)
        )
    assert not module.transformer._forward_pre_hooks

    class NoModel(held.DenoisingModule):
        def __init__(self):
            super().__init__()
            self.transformer = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"no transformer that is known; found transformer \(Linear\)"):
        trainer(callbacks=[CorrespondenceMonitor()]).fit(NoModel(), held.latent_batches(1))
    with pytest.raises(ValueError, match="a transformer but no pipeline"):
        trainer(callbacks=[CorrespondenceMonitor(probe=WorldProbe())]).fit(
            held.DenoisingModule(), held.latent_batches(1)
        )


def test_the_model_is_restored_after_an_error_in_a_step(held):
    class Breaking(held.DenoisingModule):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("broken step")

    module = Breaking()
    before = [type(block.attn1.processor) for block in module.transformer.transformer_blocks]
    with pytest.raises(RuntimeError, match="broken step"):
        trainer(callbacks=[CorrespondenceMonitor(every=1)]).fit(module, held.latent_batches(1))
    assert [type(block.attn1.processor) for block in module.transformer.transformer_blocks] == before
    assert not module.transformer._forward_pre_hooks


def test_a_skipped_batch_is_passed_over_and_the_next_one_measured(held, tmp_path):
    class Skipping(held.DenoisingModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="", version="")
    module = Skipping()
    fit = trainer(logger, callbacks=[CorrespondenceMonitor(layers=[0], every=2)])
    fit.fit(module, held.latent_batches(6))
    assert len(module.losses) == 4
    measured = [row for row in logged(logger.log_dir) if any(row.values())]
    assert len(measured) == 2
    assert not module.transformer._forward_pre_hooks


def test_a_loss_without_the_transformer_is_an_error_and_leaves_the_model_restored(held):
    class Elsewhere(held.DenoisingModule):
        def training_step(self, batch, batch_idx):
            return sum(parameter.sum() for parameter in self.parameters())

    module = Elsewhere()
    with pytest.raises(ValueError, match="never fired"):
        trainer(callbacks=[CorrespondenceMonitor(every=1)]).fit(module, held.latent_batches(1))
    assert not module.transformer._forward_pre_hooks


def test_manual_optimisation_with_several_backward_passes(held, tmp_path):
    class Manual(held.DenoisingModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for _ in range(2):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    logger = CSVLogger(tmp_path, name="", version="")
    module = Manual()
    monitor = CorrespondenceMonitor((layer for layer in [0]), every=2)
    trainer(logger, callbacks=[monitor]).fit(module, held.latent_batches(3))
    assert len([row for row in logged(logger.log_dir) if any(name.endswith("accuracy") for name in row)]) == 3
    assert not module.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    "truth, message",
    [
        (lambda batch: batch["tracks"], "a BatchTruth of the 2 samples the transformer ran, got Tensor"),
        (lambda batch: BatchTruth(batch["tracks"][:1], batch["visible"][:1], 16, 16), r"got tracks \(1, 3, 20, 2\)"),
    ],
)
def test_truth_that_does_not_fit_the_batch_is_refused(held, truth, message):
    with pytest.raises(ValueError, match=message):
        trainer(callbacks=[CorrespondenceMonitor(every=1, truth=truth)]).fit(
            held.DenoisingModule(), held.latent_batches(1)
        )


def test_two_monitors_need_names(held, tmp_path):
    monitors = [CorrespondenceMonitor(layers=[layer], every=1, truth=False) for layer in (0, 1)]
    with pytest.raises(ValueError, match="two CorrespondenceMonitor log under the name"):
        trainer(callbacks=monitors).fit(held.DenoisingModule(), held.latent_batches(1))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CorrespondenceMonitor(layers=[False]), "layers must be whole numbers"),
        (lambda: CorrespondenceMonitor(truth="tracks"), "truth must be a function"),
        (lambda: CorrespondenceMonitor(name=""), "name must be a word"),
        (lambda: CorrespondenceMonitor(every=0), "every must be"),
        (lambda: CorrespondenceMonitor(noise_levels=0), "noise_levels must be"),
        (lambda: CorrespondenceMonitor(history=0), "history must be"),
        (lambda: WorldProbe(frames=1), "frames must be at least 2"),
        (lambda: WorldProbe(timesteps=()), "timesteps is empty"),
        (lambda: latent_frames(48, 13), "a multiple of 13 - 1"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_latent_frames_of_a_causal_codec():
    assert latent_frames(49, 13) == list(range(0, 49, 4))
    assert latent_frames(5, 5) == [0, 1, 2, 3, 4]


def test_another_fit_to_the_same_step_leaves_the_table_of_the_first(held, tmp_path):
    for _ in range(2):
        run = trainer(callbacks=[CorrespondenceMonitor(layers=[0], every=1)], default_root_dir=tmp_path)
        run.fit(held.DenoisingModule(), held.latent_batches(2))
    names = [path.name for path in (tmp_path / "correspondence").iterdir()]
    assert sorted(names) == sorted(
        f"train{name}_000002{version}.{kind}"
        for version in ("", "-v1")
        for name, kind in (("", "csv"), ("_accuracy", "png"))
    )
