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
        scheduler.set_timesteps = LaterTimesteps(scheduler, settings.strength)
    return scheduler


class LaterTimesteps:
    """A scheduler's set_timesteps, by which it makes its steps over the cleaner part of a schedule.

    Noise levels lie as those of a schedule of more steps whose first are left out, which for flow matching are the
    levels of the whole one times the strength, before any shift. A deep copy of the scheduler (LTX-2 makes one for its
    audio) begins as late; a pickled one, which is loaded without this package too, has its class's own.

    Args:
        scheduler: whose timesteps are set.
        strength: the share of the schedule that is left.
    """

    def __init__(self, scheduler: Any, strength: float) -> None:
        self._own = type(scheduler).set_timesteps.__get__(scheduler)
        functools.update_wrapper(self, self._own)
        self._scheduler, self._strength = scheduler, strength

    def __call__(self, *args: object, **kwargs: object) -> None:
        scheduler, strength = self._scheduler, self._strength
        bound = inspect.signature(self._own).bind(*args, **kwargs)
        given = bound.arguments
        if given.get("sigmas") is not None:
            given["sigmas"] = np.asarray(given["sigmas"], dtype=np.float64) * strength
            self._own(*bound.args, **bound.kwargs)
            return
        steps = int(given["num_inference_steps"])
        given["num_inference_steps"] = whole = max(steps, round(steps / strength))
        self._own(*bound.args, **bound.kwargs)
        scheduler.timesteps = scheduler.timesteps[whole - steps :]
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) == whole + 1:
            scheduler.sigmas = sigmas[whole - steps :]

    def __deepcopy__(self, memo: dict[int, Any]) -> object:
        return LaterTimesteps(memo[id(self._scheduler)], self._strength)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, str]]:
        return (getattr, (self._scheduler, "set_timesteps"))


class SteeredStep:
    """A scheduler's step as a run has it; that of a copy (LTX-2 makes one for its audio) is the copy's own.

    So is that of a pickled one, which is loaded without this package too.

    Args:
        scheduler: whose step is replaced.
        step: what runs instead.
    """

    def __init__(self, scheduler: Any, step: Callable[..., object]) -> None:
        functools.update_wrapper(self, scheduler.step)
        self._scheduler, self._step = scheduler, step

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._step(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Any, str]]:
        # Of the scheduler that is being made, which at that moment has its class's step alone.
        return (getattr, (self._scheduler, "step"))
