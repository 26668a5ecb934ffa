"""The scheduler of a run: of the settings' kind, and beginning where they say."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from corrdit.integrations.diffusers.backbones.base import Backbone
from corrdit.integrations.diffusers.transfer_settings import TransferSettings


def run_scheduler(backbone: Backbone, settings: TransferSettings) -> Any:
    """A scheduler for one run; the pipeline's own is left as it is.

    Raises:
        ValueError: a class that diffusers does not have.
    """
    import diffusers

    own = backbone.pipe.scheduler
    kind: Any = type(own)
    if settings.scheduler is not None:
        kind = getattr(diffusers, settings.scheduler, None)
        if kind is None:
            raise ValueError(f"diffusers has no scheduler {settings.scheduler!r}")
    spaced = "timestep_spacing" in own.config
    changes = {"timestep_spacing": settings.timestep_spacing} if spaced else {}
    scheduler = kind.from_config(own.config, **changes, **dict(settings.scheduler_options))
    if settings.strength < 1:
        _begin_later(scheduler, settings.strength)
    return scheduler


def _begin_later(scheduler: Any, strength: float) -> None:
    """Let a scheduler make its steps over the cleaner part of a schedule.

    Noise levels lie as those of a schedule of more steps whose first are left out, which for flow matching are the
    levels of the whole one times the strength, before any shift.
    """
    own = scheduler.set_timesteps

    @functools.wraps(own)
    def set_timesteps(*args: object, **kwargs: object) -> None:
        bound = inspect.signature(own).bind(*args, **kwargs)
        given = bound.arguments
        if given.get("sigmas") is not None:
            given["sigmas"] = np.asarray(given["sigmas"], dtype=np.float64) * strength
            own(*bound.args, **bound.kwargs)
            return
        steps = int(given["num_inference_steps"])
        given["num_inference_steps"] = whole = max(steps, round(steps / strength))
        own(*bound.args, **bound.kwargs)
        scheduler.timesteps = scheduler.timesteps[whole - steps :]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) == whole + 1:
            scheduler.sigmas = sigmas[whole - steps :]

    scheduler.set_timesteps = set_timesteps


class SteeredStep:
    """A scheduler's step as a run has it; that of a copy (LTX-2 makes one for its audio) is the copy's own.

    Args:
        scheduler: whose step is replaced.
        step: what runs instead.
    """

    def __init__(self, scheduler: Any, step: Callable[..., object]) -> None:
        functools.update_wrapper(self, scheduler.step)
        self._scheduler, self._step = scheduler, step

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._step(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return type(self._scheduler).step.__get__(memo[id(self._scheduler)])
