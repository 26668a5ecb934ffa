"""Rows of several dataloaders, of several runs and of repeated samples in what `CorrespondenceCallback` writes."""

from __future__ import annotations

import csv
import pathlib
import warnings

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from corrdit.integrations.lightning import CorrespondenceCallback
from corrdit.integrations.lightning.data_modules import EachOnceSampler
from corrdit.integrations.lightning.reading import repeated_items

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*Using `DistributedSampler`")


def trainer(folder: pathlib.Path, callback: CorrespondenceCallback, logger=False, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def table(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: pathlib.Path, kind: str) -> list[str]:
    return sorted(path.name for path in (folder / "correspondence").glob(f"*.{kind}"))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_several_dataloaders_are_kept_apart(held, tmp_path, stage):
    logger = CSVLogger(tmp_path, name="", version="")
    callback = CorrespondenceCallback(layers=[0], batches=2, pictures=1)
    loaders = [held.single_latents(5, 2), held.single_latents(3, 1, seed=1)]
    getattr(trainer(tmp_path, callback, logger), stage)(held.SeveralLoadersModule(), loaders)
    rows = table(tmp_path / "correspondence" / f"{stage}_000000.csv")
    assert list(rows[0])[:3] == ["dataloader_idx", "batch", "sample"]
    assert [(row["dataloader_idx"], row["batch"], row["sample"], float(row["timestep"])) for row in rows] == [
        *(("0", batch, sample, 2 * int(batch) + int(sample)) for batch in "01" for sample in "01"),
        *(("1", batch, "0", 100 + int(batch)) for batch in "01"),
    ]
    (logged,) = table(tmp_path / "metrics.csv")
    for loader in "01":
        mean = np.mean([float(row["score"]) for row in rows if row["dataloader_idx"] == loader])
        name = f"correspondence/{stage}/step_0/layer_0/score/dataloader_idx_{loader}"
        assert float(logged[name]) == pytest.approx(mean, rel=1e-5)
    assert f"correspondence/{stage}/step_0/layer_0/score" not in logged
    assert files(tmp_path, "png") == [
        f"{stage}_{name}_dataloader_idx_{loader}_000000.png"
        for name in ("consistency", "matches_0_0")
        for loader in "01"
    ]


def test_a_second_run_leaves_the_files_of_the_first(held, tmp_path):
    run = trainer(tmp_path, CorrespondenceCallback(layers=[0], pictures=1))
    module = held.SeveralLoadersModule()
    for stage in ("validate", "test", "validate", "test", "validate"):
        for count in (1, 2) if stage == "test" else (1,):
            getattr(run, stage)(module, held.single_latents(count, 1))
    versions = {"validate": ["", "-v1", "-v2"], "test": ["", "-v1", "-v2", "-v3"]}
    assert set(files(tmp_path, "csv")) == {
        f"{stage}_000000{version}.csv" for stage, names in versions.items() for version in names
    }
    assert [len(table(tmp_path / "correspondence" / f"test_000000{name}.csv")) for name in versions["test"]] == [
        1,
        2,
        1,
        2,
    ]
    assert set(files(tmp_path, "png")) >= {
        f"{stage}_{name}_000000{version}.png"
        for stage, names in versions.items()
        for version in names
        for name in ("consistency", "matches_0_0")
    }


def test_loggers_keep_both_runs_too(held, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="run")
    run = trainer(tmp_path, CorrespondenceCallback(layers=[0], pictures=0), logger)
    for _ in range(2):
        run.validate(held.SeveralLoadersModule(), held.single_latents(1, 1))
    logger.experiment.flush()
    events = event_accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    assert sorted(events.Tags()["images"]) == [
        "correspondence/validate/consistency",
        "correspondence/validate/consistency-v1",
    ]


@pytest.mark.parametrize("processes, count", [(2, 3), (2, 4), (3, 7), (4, 1), (4, 5), (5, 2)])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_item_is_counted_on_exactly_one_process(processes, count, batch_size, shuffle):
    items = torch.arange(count)
    counted = []
    for rank in range(processes):
        sampler = DistributedSampler(items, processes, rank, shuffle=shuffle)
        loader = DataLoader(items, batch_size=batch_size, sampler=sampler)
        for number, batch in enumerate(loader):
            repeated = repeated_items(loader, number) or [False] * batch.numel()
            assert len(repeated) == batch.numel()
            assert rank > 0 or not any(repeated)
            counted += [item for item, again in zip(batch.reshape(-1).tolist(), repeated, strict=True) if not again]
    assert sorted(counted) == list(range(count))


def test_samplers_that_repeat_nothing_lose_nothing():
    items = list(range(3))
    for sampler in (
        DistributedSampler(items, 2, 1, drop_last=True),
        EachOnceSampler(items, 2, 1, neighbours=True),
        None,
    ):
        loader = DataLoader(items, batch_size=1, sampler=sampler)
        assert not any(any(repeated_items(loader, number)) for number in range(len(loader)))


def on_second_of_two(held, count: int, batch_size: int | None) -> DataLoader:
    """The loader of the second of two processes, for one process to run."""
    items = held.single_latents(count, 1).dataset
    return held.single_latents(count, batch_size, sampler=DistributedSampler(items, 2, 1, shuffle=False))


@pytest.mark.parametrize("stage", ["validate", "predict"])
@pytest.mark.parametrize("batch_size, batches", [(1, "01"), (2, "0"), (3, "0")])
def test_repeated_samples_have_no_rows(held, tmp_path, stage, batch_size, batches):
    # Of five items the second process has 1, 3 and, to be even with the first, 0 again.
    loader = on_second_of_two(held, 5, batch_size)
    callback = CorrespondenceCallback(layers=[0, 1], pictures=9)
    getattr(trainer(tmp_path, callback), stage)(held.SeveralLoadersModule(), loader)
    rows = table(tmp_path / "correspondence" / f"{stage}_000000.csv")
    assert sorted({row["batch"] for row in rows}) == list(batches)
    assert sorted(float(row["timestep"]) for row in rows) == [1, 1, 3, 3]
    assert len([name for name in files(tmp_path, "png") if "matches" in name]) == 2


def test_validation_within_a_fit_counts_once_too(held, tmp_path):
    run = trainer(tmp_path, CorrespondenceCallback(layers=[0], pictures=0), max_epochs=1, num_sanity_val_steps=0)
    run.fit(held.DenoisingModule(), held.latent_batches(1), on_second_of_two(held, 5, 2))
    assert len(table(tmp_path / "correspondence" / "validate_000001.csv")) == 2
    run.validate(held.DenoisingModule(), held.single_latents(5, 2))
    assert len(table(tmp_path / "correspondence" / "validate_000001-v1.csv")) == 5


def test_samples_generated_one_after_another_belong_to_their_items(held, tmp_path):
    class OneByOne(held.GeneratingModule):
        def validation_step(self, batch, batch_idx):
            for seed in batch:
                self.generate(seed)

    items = torch.arange(3)
    alone = DataLoader(items[1:2], batch_size=1)
    second = DataLoader(items, batch_size=2, sampler=DistributedSampler(items, 2, 1, shuffle=False))
    rows = []
    for name, loader in (("alone", alone), ("second", second)):
        trainer(tmp_path / name, CorrespondenceCallback(layers=[0], pictures=0)).validate(OneByOne(), loader)
        rows.append(table(tmp_path / name / "correspondence" / "validate_000000.csv"))
    assert rows[0] == rows[1]


class Backwards(BatchSampler):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def test_repeated_samples_that_cannot_be_told_are_warned_of(held, tmp_path):
    class Halved(held.DenoisingModule):
        def validation_step(self, batch, batch_idx):
            self.loss({name: value[:2] for name, value in batch.items()})

    class Both(held.DenoisingModule):
        def validation_step(self, batch, batch_idx):
            for part in batch:
                self.loss(part)

    loader = on_second_of_two(held, 5, 3)
    backwards = Backwards(loader.sampler, 3, False)
    for name, module, data in (
        ("fewer", Halved(), loader),
        ("order", held.DenoisingModule(), DataLoader(loader.dataset, batch_sampler=backwards)),
        ("together", Both(), CombinedLoader([loader, loader], "max_size")),
    ):
        run = trainer(tmp_path / name, CorrespondenceCallback(layers=[0], pictures=0), use_distributed_sampler=False)
        with pytest.warns(UserWarning, match="which samples they are cannot be told"):
            run.validate(module, data)
    even = held.single_latents(4, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot be told")
        run = trainer(tmp_path / "even", CorrespondenceCallback(layers=[0], pictures=0))
        run.validate(Both(), CombinedLoader([even, even], "max_size"))
    assert len(table(tmp_path / "even" / "correspondence" / "validate_000000.csv")) == 8
