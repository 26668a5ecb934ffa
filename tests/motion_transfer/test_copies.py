"""What is pickled or copied of a pipeline while a transfer steers it does not depend on this package."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from corrdit.integrations.diffusers.layouts import layout_of
from corrdit.integrations.diffusers.motion_transfer import MotionTransfer
from corrdit.testing import tiny_backbone, tiny_generation

TRANSFER_SETS = ("num_inference_steps", "generator", "output_type", "num_frames")


@pytest.mark.parametrize(
    "settings",
    [
        {"block": 1},
        {"block": 1, "optimise": "embedding", "strength": 0.7},
        {"method": "injection", "injection_blocks": (0, 1)},
    ],
    ids=["latent", "embedding of a later beginning", "injection"],
)
def test_copies_made_in_a_transfer_are_the_stock_models(settings: dict[str, Any]) -> None:
    backbone = tiny_backbone("wan")
    transformer = backbone.transformer
    stock = {type(module.processor).__name__ for module in layout_of(transformer).attention_modules(transformer)}
    seen: list[str] = []
    own = type(transformer.blocks[0]).forward

    def look(*args: object, **kwargs: object) -> object:
        module = transformer.blocks[0]
        # A function of this test is no part of what is copied.
        del module.forward
        pipe = backbone.pipe
        for part in (transformer, pipe.scheduler):
            seen.extend(type(part).__name__ for _ in [0] if b"corrdit" in pickle.dumps(part))
        steered = "step" in vars(pipe.scheduler)
        copied = copy.deepcopy(pipe.scheduler)
        assert not steered or copied.step.__func__ is type(copied).step
        duplicate = copy.deepcopy(transformer)
        kinds = {type(m.processor).__name__ for m in layout_of(duplicate).attention_modules(duplicate)}
        assert kinds == stock
        seen.append("steered" if steered else "reading")
        module.forward = look
        return own(module, *args, **kwargs)

    transformer.blocks[0].forward = look
    generation = tiny_generation("wan")
    arguments = {key: generation[key] for key in generation if key not in TRANSFER_SETS}
    video = np.random.default_rng(0).integers(0, 256, (generation["num_frames"], 64, 64, 3), dtype=np.uint8)
    MotionTransfer(backbone, **{"steps": 2, "guided_share": 0.5, "optimisation_steps": 1, **settings})(
        video, **arguments
    )
    assert set(seen) == {"steered", "reading"}


def test_a_copy_of_a_scheduler_that_begins_later_begins_as_late() -> None:
    from corrdit.integrations.diffusers.motion_transfer.schedule import run_scheduler
    from corrdit.integrations.diffusers.transfer_settings import TransferSettings

    scheduler = run_scheduler(tiny_backbone("ltx"), TransferSettings(blocks=(1,), strength=0.5))
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(4, mu=1.0)
    untouched = scheduler.timesteps.clone()
    scheduler.set_timesteps(4, mu=1.0)
    assert torch.equal(copied.timesteps, scheduler.timesteps)
    assert not torch.equal(untouched, scheduler.timesteps)
