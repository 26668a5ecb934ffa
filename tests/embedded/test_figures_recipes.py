"""A killed run goes on, TensorBoard agrees with CSV, the GPU recipe steps, absolute positions work from end to end."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from corrdit.integrations.embedded import load_embedded_pipeline
from corrdit.integrations.embedded.pipeline import build_pipeline
from corrdit.integrations.embedded.training.evaluation import matching_table
from corrdit.integrations.embedded.training.module import GeneratedBatches, TrainingConfig
from corrdit.integrations.embedded.training.recipe import export_checkpoint, load_recipe, newest_checkpoint, train
from corrdit.integrations.embedded.world import HELD_OUT_SEEDS, WorldConfig
from corrdit.integrations.lightning import CorrespondenceMonitor, WorldProbe

TINY = {"batch_size": 2, "shapes": ((3, 16, 16), (2, 16, 24)), "layers": 2, "heads": 2, "head_dim": 16}
KILLED = """
import os, pathlib, signal, sys
import lightning
from corrdit.integrations.embedded.training.recipe import load_recipe, train

class Kill(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train(load_recipe("smoke", steps=6), pathlib.Path(sys.argv[1]), checkpoint_every=3, progress=False, callbacks=[Kill()])
"""


def csv_losses(output: pathlib.Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for path in sorted((output / "logs").glob("part_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            found |= {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}
    return found


@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_goes_on_with_the_same_losses_in_both_logs(tmp_path: pathlib.Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(load_recipe("smoke", steps=6), whole, checkpoint_every=3, progress=False)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(killed)], cwd=tmp_path, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert newest_checkpoint(killed).stem == "step-3"
    train(load_recipe("smoke", steps=6), killed, checkpoint_every=3, progress=False, resume=True)
    expected = csv_losses(whole)
    assert sorted(expected) == list(range(6))
    resumed = csv_losses(killed)
    assert sorted(resumed)[-3:] == [3, 4, 5]
    assert all(resumed[step] == expected[step] for step in resumed)
    events = accumulator.EventAccumulator(str(whole / "tensorboard" / "part_0"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert sorted(logged) == list(range(6))
    np.testing.assert_allclose([logged[step] for step in range(6)], [expected[step] for step in range(6)], rtol=1e-6)


def test_gpu_recipe_is_the_cpu_recipe_scaled_up_and_steps(tmp_path: pathlib.Path) -> None:
    gpu, cpu = load_recipe("gpu"), load_recipe("cpu")
    for name in ("layers", "heads", "head_dim", "positions", "shapes", "optimizer", "matrix_rate", "slowing_share"):
        assert getattr(gpu, name) == getattr(cpu, name), name
    assert gpu.steps * gpu.batch_size > 50 * cpu.steps * cpu.batch_size
    small = dataclasses.replace(gpu, steps=2, precision="32-true", workers=1, **TINY)
    module = train(small, tmp_path, progress=False)
    assert module.trainer.global_step == 2
    assert np.isfinite(list(csv_losses(tmp_path).values())).all()


def test_workers_render_the_same_batches_in_order() -> None:
    config = TrainingConfig(steps=6, **TINY)
    expected = list(GeneratedBatches(config, first_step=1))
    loaded = list(DataLoader(GeneratedBatches(config, first_step=1), batch_size=None, num_workers=2))
    assert [batch["step"] for batch in loaded] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(loaded, expected, strict=True):
        torch.testing.assert_close(ours["video"], theirs["video"], atol=0, rtol=0)
        assert ours["prompts"] == theirs["prompts"]


def test_seeds_of_training_end_before_the_held_out_ones() -> None:
    assert TrainingConfig(steps=10**9 // 8, batch_size=8).seed == 0
    with pytest.raises(ValueError, match="held-out"):
        TrainingConfig(steps=10**9 // 8 + 1, batch_size=8)
    with pytest.raises(ValueError, match="workers"):
        TrainingConfig(workers=-1)


@pytest.mark.filterwarnings("ignore")
def test_absolute_positions_train_export_generate_and_are_read(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(load_recipe("smoke", steps=2), positions="absolute")
    train(config, tmp_path, progress=False)
    pipe = load_embedded_pipeline(export_checkpoint(newest_checkpoint(tmp_path), tmp_path / "pipeline"))
    assert not pipe.transformer.config.use_rotary_positional_embeddings
    frames = pipe(
        "a striped disc moves left over grass",
        num_inference_steps=2,
        num_frames=4,
        height=16,
        width=16,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert frames.shape == (1, 4, 16, 16, 3)
    assert np.isfinite(frames).all()
    seeds = range(HELD_OUT_SEEDS, HELD_OUT_SEEDS + 2)
    table = matching_table(pipe, WorldConfig(frames=4, height=16, width=16), seeds, (300,))
    assert {"query-key 1 mean", "query-key 0 head 1", "block output 0", "patches"} <= set(table["readings"]["300"])


def test_the_monitor_follows_the_averaged_weights_without_changing_the_run(tmp_path: pathlib.Path) -> None:
    config = load_recipe("smoke", steps=2)
    monitor = CorrespondenceMonitor(
        every=1,
        probe=WorldProbe(clips=1, frames=3, height=16, width=16, timesteps=(300,), points=4),
        pipeline=lambda module: build_pipeline(module.average),
    )
    train(config, tmp_path / "watched", progress=False, callbacks=[monitor])
    train(config, tmp_path / "plain", progress=False)
    logged = (tmp_path / "watched" / "logs" / "part_0" / "metrics.csv").read_text(encoding="utf-8")
    assert "correspondence/train/layer_1/noise_300/accuracy" in logged
    assert csv_losses(tmp_path / "watched") == csv_losses(tmp_path / "plain")
